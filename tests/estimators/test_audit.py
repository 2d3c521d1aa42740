import math
from dataclasses import replace

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.estimators import advantages, audit_table, find_rule, identity_table, law_table, token_covariance
from gradvar.estimators.additive import Sums, of_prompts_like_these, of_these_prompts, ratio_of_signals
from gradvar.estimators.baselines import Baselines, log_independence_ratio
from gradvar.estimators.groups import draw_groups
from gradvar.estimators.length_bins import bin_products, length_bins
from gradvar.runs.records import TABLE_COLUMNS
from tests.estimators import references, simulator
from tests.estimators.test_tables import only, pick, prompts, same


def tolerance(p, trials):
    return 5 * math.sqrt(p * (1 - p) / trials)


@pytest.fixture(scope="module")
def groups():
    return prompts(4, n=64, targets=("a", "b"), signal=3.0)


@pytest.fixture(scope="module")
def table(groups):
    return audit_table(groups, permutations=64, seed=3)


def test_every_assumption_for_prompts_targets_and_both_estimands(table):
    assert list(table.columns[: len(TABLE_COLUMNS)]) == list(TABLE_COLUMNS)
    assert sorted(set(table["assumption"])) == [0, 1, 2, 3, 4]
    assert set(table["target"]) == {"a", "b", "sum"}
    judged = ("identity_signal", "within_exponent", "deviation_exponent", "baseline_ratio", "between_length_share")
    for quantity in judged:
        rows = table[table["quantity"] == quantity]
        assert set(rows["verdict"]) <= {"supported", "rejected", "undetermined"}
        assert rows["margin_high"].notna().all()
        assert rows["n_needed"].notna().all()
        for target in ("a", "sum"):
            pooled = pick(rows, target=target, prompt_id=None)
            assert list(pooled["estimand"]) == ["these prompts", "prompts like these"], quantity
            assert len(pick(rows, target=target)) == 6
    assert (table["seed"] == 3).all()
    assert not table.duplicated([*TABLE_COLUMNS[:8], "estimand"]).any()


def test_cosines_of_bins_stay_within_one(table):
    cosines = table[table["quantity"] == "bin_cosine"][["value", "low", "high"]].dropna()
    assert len(cosines) > 10
    assert cosines.abs().to_numpy().max() <= 1.0
    # Some estimates lie beyond: their ends were brought in.
    assert (cosines["high"] == 1.0).any()


def test_bins_without_a_signal_have_no_cosine():
    """Squares that are noise: cosines of theirs covered 80% of the time what is 1 here."""
    missed = 0
    for k in range(8):
        weak = simulator.prompt(
            "p", 96, rng=np.random.default_rng([5, k]), beta=1.6, signal=0.2, dimensions=20, decay=0.7
        )
        rows = audit_table([weak], seed=k)
        known = rows[rows["quantity"] == "bin_square"].set_index("scope")["low"] > 0.0
        for row in pick(rows, quantity="bin_cosine").to_dict("records"):
            one, other = (known[f"length bin {b} of 4"] for b in (row["scope"].split()[2], row["scope"].split()[4]))
            assert (row["low"] == -math.inf) == (not (one and other)) == row["method"].endswith("unresolved")
            missed += row["high"] < 1.0
    assert missed <= 3


def test_rows_are_the_other_tables_numbers(table, groups):
    where = {"prompt_id": "p1", "target": "a"}
    other = only(identity_table(groups, seed=3), quantity="identity_signal", **where)
    assert only(table, quantity="identity_signal", **where)["high"] == other["high"]
    law = law_table(groups, advantages_studied=("grpo",), subsets=False, seed=3)
    row = only(table, quantity="within_exponent", **where)
    other = only(law, quantity="within_exponent", **where)
    assert (row["value"], row["low"], row["n_needed"]) == (other["value"], other["low"], other["n_needed"])


def test_numbers_repeat_and_do_not_depend_on_other_prompts(table, groups):
    alone = audit_table([g for g in groups if g.prompt_id == "p1"], permutations=64, seed=3)
    same(pick(alone, prompt_id="p1"), pick(table, prompt_id="p1"))


def test_taus_that_are_absent_are_said_with_the_command(table, groups):
    rows = table[table["assumption"] == 1]
    assert set(rows["verdict"]) == {"not measured"}
    assert rows["method"].str.contains("gradvar measure RUN --probes", regex=False).all()
    assert rows["value"].isna().all()
    taus = {(g.prompt_id, g.target): np.diagonal(g.gram) * 0.99 for g in groups}
    rows = audit_table(groups, permutations=8, taus=taus, seed=3)
    rows = rows[rows["assumption"] == 1]
    both = pick(rows, target="sum", prompt_id=None, scope="all responses")
    assert list(both["value"]) == pytest.approx([0.01, 0.01])
    assert set(both["verdict"]) == {"supported"}
    assert any(scope.startswith("reward 1") for scope in rows["scope"])


# Assumption 1 ------------------------------------------------------------------------------------------------------


def test_share_is_a_ratio_of_sums_with_its_jackknife():
    rng = np.random.default_rng(0)
    scores, rewards, lengths = simulator.draw(60, rng=rng)
    taus = (scores**2).sum(axis=1) * rng.uniform(0.5, 1.0, 60)
    found = token_covariance(scores @ scores.T, taus, np.full(60, 0.01), lengths, rewards)
    squares = [float(s @ s) for s in scores]
    share = found[0].share
    assert share.value == pytest.approx(1 - sum(taus) / sum(squares))
    without = np.array([1 - (sum(taus) - t) / (sum(squares) - s) for t, s in zip(taus, squares, strict=True)])
    of_sums = Sums(value=np.array([0.0]), without=without[:, None])
    direct = of_these_prompts([of_sums], lambda p: p[..., 0], level=0.95, method="")
    assert share.high - share.value == pytest.approx(direct.high - direct.value)
    assert found[0].verdict == "rejected"
    assert 0 < found[0].probe_part < 1
    scopes = {s.scope for s in found}
    assert {"all responses", "reward 0, length bin 1 of 2", "reward 1, length bin 2 of 2"} <= scopes
    one = next(s for s in found if s.scope == "reward 0, length bin 2 of 2")
    rows = (rewards == 0) & (lengths >= one.length_low) & (lengths <= one.length_high)
    assert one.share.n == rows.sum()
    assert one.share.value == pytest.approx(1 - taus[rows].sum() / np.array(squares)[rows].sum())


def test_token_covariance_with_known_truth():
    """Tokens share a part of variance kappa: E S_ii = L + kappa L (L - 1), tau = L. Coverage and wrong verdicts."""
    covered, wrong, trials, length, dimensions = 0, 0, 150, 10, 20
    kappa = 0.05
    truth = 1 - 1 / (1 + kappa * (length - 1))
    for t in range(trials):
        rng = np.random.default_rng([1, t])
        tokens = rng.normal(size=(64, length, dimensions)) * math.sqrt(1 - kappa)
        tokens += rng.normal(size=(64, 1, dimensions)) * math.sqrt(kappa)
        scores = tokens.sum(axis=1)
        signs = rng.choice([-1.0, 1.0], size=(64, 4, length))
        probes = (np.einsum("nkl,nld->nkd", signs, tokens) ** 2).sum(axis=2)
        errors = probes.std(axis=1, ddof=1) / 2
        (overall, *_) = token_covariance(
            scores @ scores.T, probes.mean(axis=1), errors, np.full(64, 10.0), np.zeros(64)
        )
        covered += overall.share.low <= truth <= overall.share.high
        wrong += overall.verdict == "supported"
    assert abs(covered / trials - 0.95) < tolerance(0.95, trials), covered / trials
    assert wrong <= 0.05 * trials


def test_token_covariance_degenerate_and_refused():
    gram, ones = np.eye(6), np.ones(6)
    (few,) = token_covariance(gram, ones, None, ones, ones)
    assert few.share.value == 0.0
    assert math.isnan(few.share.low)
    assert few.verdict == "undetermined"
    assert "below 8" in few.share.method
    assert math.isnan(few.probe_part)
    gap = np.where(np.arange(20) < 4, np.nan, 1.0)
    overall = token_covariance(np.eye(20), gap, None, np.ones(20), np.full(20, np.nan))
    assert [s.scope for s in overall] == ["all responses"]
    assert overall[0].share.n == 16
    for arguments, words in (
        ((gram, ones[:3], None, ones, ones), "taus"),
        ((gram, ones * np.nan, None, ones, ones), "missing"),
        ((gram, -ones, None, ones, ones), "negative"),
        ((gram, ones, ones[:2], ones, ones), "tau_errors"),
    ):
        with pytest.raises(GradvarError, match=words):
            token_covariance(*arguments)
    with pytest.raises(GradvarError, match="margin"):
        token_covariance(gram, ones, None, ones, ones, margin=0.0)


# Assumption 3 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", "mean", "rloo", "opo", "raw", "score"])
def test_baseline_parts_by_definition(kind):
    rng = np.random.default_rng(2)
    scores, _, lengths = simulator.draw(12, rng=rng)
    rewards = rng.normal(size=12)
    drawn = draw_groups(12, 3, 4, rng=rng)
    got = Baselines.of(drawn, rewards, lengths, find_rule("grpo"), advantage=kind).sums(scores @ scores.T)
    expected = references.baseline_parts(scores, rewards, lengths, drawn.tolist(), "grpo", kind)
    np.testing.assert_allclose(got.value, expected, rtol=1e-9)
    for i in (0, 7):
        expected = references.baseline_parts(scores, rewards, lengths, drawn.tolist(), "grpo", kind, without=i)
        np.testing.assert_allclose(got.without[i], expected, rtol=1e-9)
    if kind in ("raw", "score"):
        # No baseline: nothing differs.
        assert log_independence_ratio(got.value) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("law", "dependent"), [({}, False), ({"shift": 1.0}, True)])
def test_baseline_ratio_with_known_truth(law, dependent):
    """Scores around 0 are independent (ratio 1, though the group's std alone makes the variance ratio 0.86); a common
    shift of all scores is cancelled by the group's baseline (ratio 0.55)."""
    groups_drawn, trials, covered, verdicts = 25_000, 16, 0, []
    rng = np.random.default_rng(5)
    scores, rewards, lengths = simulator.draw(groups_drawn * 8, rng=rng, **law)
    shape = (groups_drawn, 8)
    vectors, r, x = scores.reshape(*shape, -1), rewards.reshape(shape), 1 / lengths.reshape(shape)
    squares, parts = (vectors**2).sum(axis=2), []
    for a in (advantages(r, "grpo"), (r - 0.4) / math.sqrt(0.24)):
        updates = np.einsum("gn,gnd->gd", x * a, vectors)
        variance = (updates**2).sum() / groups_drawn - (updates.mean(axis=0) ** 2).sum()
        parts.append((variance, ((x * a) ** 2 * squares).sum() / groups_drawn))
    truth = parts[0][0] / parts[1][0] * parts[1][1] / parts[0][1]
    assert (truth < 0.7) == dependent
    for t in range(trials):
        one = simulator.prompt("p", 256, rng=np.random.default_rng([6, t]), **law)
        drawn = draw_groups(256, 8, 100, rng=np.random.default_rng(t))
        sums = Baselines.of(drawn, one.rewards, one.lengths, find_rule("grpo"), advantage="grpo").sums(one.gram)
        found = of_these_prompts([sums], log_independence_ratio, level=0.95, method="", back=math.exp)
        covered += found.low <= truth <= found.high
        verdicts.append(found.high < 0.9 if dependent else found.low > 0.9 and found.high < 1.1)
    assert covered / trials > 0.95 - tolerance(0.95, trials)
    assert np.mean(verdicts) > 0.8


# Assumption 4 ------------------------------------------------------------------------------------------------------


def test_length_bins():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 30, size=97).astype(float)
    bins = length_bins(lengths)
    assert bins.max() == 3
    assert np.bincount(bins).min() >= 16
    order = np.argsort(lengths)
    assert (np.diff(bins[order]) >= 0).all()
    assert all(len(set(bins[lengths == v])) == 1 for v in set(lengths))
    assert set(length_bins(np.full(50, 7.0))) == {0}
    assert set(length_bins(np.arange(1.0, 16.0))) == {0}
    assert list(np.bincount(length_bins(np.arange(1.0, 17.0)))) == [8, 8]
    # Most responses at the limit: they cannot be cut.
    heaped = np.concatenate([np.arange(1.0, 21.0), np.full(80, 512.0)])
    assert list(np.bincount(length_bins(heaped)))[-1] == 80
    assert np.bincount(length_bins(heaped)).min() >= 8


@pytest.mark.parametrize("kind", ["grpo", "mean", "opo", "score"])
def test_length_signals_by_definition(kind):
    rng = np.random.default_rng(4)
    scores, rewards, lengths = simulator.draw(24, rng=rng)
    bins = length_bins(lengths)
    got = bin_products(scores @ scores.T, rewards, lengths, bins, advantage=kind).signals()

    def expected(keep):
        g = references.advantage(rewards[keep], kind, lengths[keep])[:, None] * scores[keep]
        return references.length_bin_signals(g, bins[keep])

    np.testing.assert_allclose(got.value, expected(np.arange(24)), rtol=1e-9)
    for i in (0, 5, 23):
        np.testing.assert_allclose(got.without[i], expected(np.delete(np.arange(24), i)), rtol=1e-9)


def lengths_and_signal(t, n, slope):
    """g = r s with E[g | L] = m (1 + slope z), z standardised log length, on an axis of its own."""
    rng = np.random.default_rng([7, t])
    z = rng.normal(size=n)
    scores = rng.normal(size=(n, 12)) * 0.4
    scores[:, 0] += 1.0
    scores[:, 1] += slope * z
    return scores, np.round(150 * np.exp(0.5 * z)), n


@pytest.mark.parametrize(("slope", "right"), [(0.0, "supported"), (0.4, "supported"), (0.9, "rejected")])
def test_between_length_share_with_known_truth(slope, right):
    """Truth by a large draw: between / ||m||^2 = slope^2 times the variance of the bins' mean z (about 0.86)."""
    trials, covered, verdicts = 80, 0, []
    z = np.random.default_rng(8).normal(size=100_000)
    quarters = np.searchsorted(np.quantile(z, [0.25, 0.5, 0.75]), z)
    truth = slope**2 * float(np.var([z[quarters == b].mean() for b in range(4)]))
    for t in range(trials):
        scores, lengths, n = lengths_and_signal(t, 128, slope)
        sums = bin_products(scores @ scores.T, np.zeros(n), lengths, length_bins(lengths), advantage="score").signals()
        share, inside, needed = ratio_of_signals([sums], margin=0.25, level=0.95, method="")
        # With bins at the sample's quantiles the target moves by 1/N: a margin of 0.01.
        covered += share.low - 0.01 * truth <= truth <= share.high + 0.01 * truth
        verdicts.append({1: "supported", -1: "rejected", 0: "undetermined"}[inside])
        assert needed >= n
    assert covered / trials > 0.95 - tolerance(0.95, trials), covered / trials
    wrong = {"supported": "rejected", "rejected": "supported"}[right]
    assert verdicts.count(wrong) <= 0.05 * trials
    assert verdicts.count(right) > 0.6 * trials


def test_between_length_share_without_a_signal_is_unresolved():
    trials, decided = 100, 0
    for t in range(trials):
        rng = np.random.default_rng([9, t])
        scores = rng.normal(size=(64, 10))
        lengths = rng.integers(10, 500, size=64).astype(float)
        sums = bin_products(scores @ scores.T, np.zeros(64), lengths, length_bins(lengths), advantage="score").signals()
        share, inside, _ = ratio_of_signals([sums], margin=0.25, level=0.95, method="")
        decided += inside != 0
        assert math.isnan(share.value) == (not (math.isfinite(share.low) and math.isfinite(share.high)))
    assert decided <= 0.05 * trials + 5 * math.sqrt(0.05 * 0.95 * trials)


def test_fieller_keeps_a_lower_end_where_the_divisor_vanishes():
    moved = np.random.default_rng(0).normal(size=(50, 2)) * [0.02, 0.02]
    strong = Sums(value=np.array([5.0, 0.05]), without=np.array([5.0, 0.05]) + moved)
    share, inside, _ = ratio_of_signals([strong], margin=0.25, level=0.95, method="")
    assert math.isnan(share.value)
    assert share.low > 0.25
    assert share.high == math.inf
    assert inside == -1
    negative = Sums(value=np.array([1.0, -5.0]), without=np.array([1.0, -5.0]) + moved)
    share, inside, _ = ratio_of_signals([negative], margin=0.25, level=0.95, method="")
    assert (share.low, share.high, inside) == (-math.inf, math.inf, 0)


def test_prompts_like_these_by_definition_and_not_below_four():
    rng = np.random.default_rng(1)
    sums = [Sums(value=v, without=np.stack([v, v])) for v in rng.uniform(1, 2, size=(6, 2))]
    ratio = lambda p: p[..., 0] / p[..., 1]  # noqa: E731
    got = of_prompts_like_these(sums, ratio, level=0.95, method="")
    values = np.array([s.value for s in sums])
    without = [np.delete(values, k, axis=0).sum(axis=0) for k in range(6)]
    moved = np.array([w[0] / w[1] for w in without])
    error = math.sqrt(5 / 6 * ((moved - moved.mean()) ** 2).sum())
    assert got.high - got.value == pytest.approx(2.5705818 * error)
    assert math.isnan(of_prompts_like_these(sums[:3], ratio, level=0.95, method="").value)
    share, inside, needed = ratio_of_signals(sums[:3], margin=0.25, level=0.95, method="", across=True)
    assert (inside, math.isnan(share.value), math.isnan(needed)) == (0, True, True)


# Degenerate --------------------------------------------------------------------------------------------------------


def test_silent_prompts_one_length_and_few_responses(groups):
    mixed = [g for g in groups if g.target == "a"]
    mixed[0] = replace(mixed[0], rewards=np.ones(64))
    mixed[1] = replace(mixed[1], lengths=np.full(64, 9.0))
    mixed[2] = mixed[2].select(np.arange(12))
    table = audit_table(mixed, permutations=16, seed=0)
    for quantity in ("within_exponent", "baseline_ratio", "between_length_share"):
        row = only(table, quantity=quantity, prompt_id="p0")
        assert (row["verdict"], row["silent"]) == ("silent: all rewards equal", 1)
    row = only(table, quantity="between_length_share", prompt_id="p1")
    assert row["verdict"] == "undetermined"
    assert "no two length bins" in row["method"]
    assert math.isfinite(only(table, quantity="baseline_ratio", prompt_id="p1")["value"])
    row = only(table, quantity="baseline_ratio", prompt_id="p2")
    assert row["verdict"] == "undetermined"
    assert "fewer than 24" in row["method"]
    repeated = replace(groups[0], gram=np.full((64, 64), 2.0))
    row = only(audit_table([repeated], permutations=16, seed=0), quantity="between_length_share")
    assert row["verdict"] in ("undetermined", "supported", "rejected")
    unverified = replace(groups[0], rewards=np.full(64, np.nan))
    table = audit_table([unverified], permutations=16, seed=0)
    assert only(table, quantity="baseline_ratio")["verdict"] == "silent: all rewards equal"
    score = audit_table([unverified], advantage="score", permutations=16, seed=0)
    assert only(score, quantity="baseline_ratio")["value"] == pytest.approx(1.0)


def test_refuses(groups):
    with pytest.raises(GradvarError, match="margins"):
        audit_table(groups, length_margin=0.0, seed=0)
    with pytest.raises(GradvarError, match="unknown advantage"):
        audit_table(groups, advantage="x", seed=0)
    with pytest.raises(GradvarError, match="alpha"):
        audit_table(groups, rule="vl_norm", seed=0)


def test_a_prompt_of_one_response_does_not_stop_the_others():
    groups = prompts(2, n=64, targets=("a",), signal=3.0)
    one = groups[1].select(np.arange(64) == 3)
    both, alone = audit_table([groups[0], one], seed=0), audit_table([groups[0]], seed=0)
    row = only(both, quantity="identity_signal", prompt_id="p1")
    assert row["verdict"] == "undetermined"
    assert "fewer than 2 responses" in row["method"]
    mine = pick(both, quantity="identity_signal", prompt_id="p0")["value"]
    assert list(mine) == list(pick(alone, quantity="identity_signal", prompt_id="p0")["value"])
    found = only(identity_table([groups[0], one], seed=0), quantity="identity_signal", prompt_id="p1")
    assert (found["verdict"], found["n_needed"]) == ("undetermined", 2.0)
