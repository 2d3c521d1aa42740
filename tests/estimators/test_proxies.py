import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradvar.errors import GradvarError
from gradvar.estimators import advantages, proxy_table
from gradvar.estimators.intervals import effective_degrees, t_quantile
from gradvar.estimators.prediction import Pair, predictions
from gradvar.estimators.proxies import prompt_pairs
from gradvar.runs.records import TABLE_COLUMNS
from tests.estimators import references, simulator
from tests.estimators.test_tables import only, pick, prompts, same


@pytest.fixture(scope="module")
def groups():
    return prompts(5, n=48, targets=("a", "b"))


@pytest.fixture(scope="module")
def table(groups):
    return proxy_table(groups, seed=1)


def test_numbers_by_scipy(table, groups):
    g = next(g for g in groups if g.prompt_id == "p1" and g.target == "a")
    a = advantages(g.rewards, "grpo")
    truth = a**2 * np.diagonal(g.gram)
    for proxy, x in (("length", g.lengths), ("advantage_square", a**2), ("advantage_square_length", a**2 * g.lengths)):
        where = {"prompt_id": "p1", "target": "a", "proxy": proxy, "truth": "norm_square"}
        rank = only(table, quantity="rank_correlation", **where)
        assert rank["value"] == pytest.approx(stats.spearmanr(x, truth).statistic)
        line = only(table, quantity="explained_variance", **where)
        assert line["value"] == pytest.approx(stats.linregress(x, truth).rvalue ** 2)
        z = [math.atanh(stats.linregress(np.delete(x, i), np.delete(truth, i)).rvalue) for i in range(48)]
        error = math.sqrt(47 / 48 * ((np.array(z) - np.mean(z)) ** 2).sum())
        middle = math.atanh(stats.linregress(x, truth).rvalue)
        assert math.tanh(middle + 1.9 * error) ** 2 < line["high"], "t at most N - 1 degrees"


def test_scopes_truths_and_columns(table):
    assert list(table.columns[: len(TABLE_COLUMNS)]) == list(TABLE_COLUMNS)
    assert set(table["truth"]) == {"norm_square", "within"}
    pooled = pick(table, target="sum", prompt_id=None)
    assert set(pooled["scope"]) == {"within prompts", "between prompts"}
    row = only(
        pooled, scope="between prompts", proxy="reward_variance", truth="norm_square", quantity="rank_correlation"
    )
    assert (row["clusters"], row["n"]) == (5, 240)
    assert pick(table, scope="within prompts", proxy="reward_variance").empty
    assert (table["seed"] == 1).all()
    keys = ["prompt_id", "target", "quantity", "scope", "proxy", "truth"]
    assert not table.duplicated(keys).any()


def test_pooled_is_a_line_with_a_constant_a_prompt(table, groups):
    mine = [g for g in groups if g.target == "a"]
    x = [g.lengths - g.lengths.mean() for g in mine]
    y = []
    for g in mine:
        truth = advantages(g.rewards, "grpo") ** 2 * np.diagonal(g.gram)
        y.append(truth - truth.mean())
    x, y = np.concatenate(x), np.concatenate(y)
    row = only(
        table,
        quantity="explained_variance",
        prompt_id=None,
        target="a",
        proxy="length",
        truth="norm_square",
        scope="within prompts",
    )
    assert row["value"] == pytest.approx((x @ y) ** 2 / (x @ x) / (y @ y))


def test_given_proxies_come_alone_and_weighted(groups):
    mine = [g for g in groups if g.target == "a"]
    exact = {g.prompt_id: np.diagonal(g.gram).copy() for g in mine}
    exact["p0"][3] = np.nan
    table = proxy_table(mine, proxies={"entropy": exact}, seed=0)
    row = only(
        table, quantity="explained_variance", prompt_id="p0", proxy="advantage_square_entropy", truth="norm_square"
    )
    assert row["value"] == pytest.approx(1.0)
    assert row["n"] == 47
    assert not pick(table, proxy="entropy").empty
    score = proxy_table(mine, proxies={"entropy": exact}, advantage="score", seed=0)
    assert only(score, quantity="rank_correlation", prompt_id="p1", proxy="entropy", truth="norm_square")[
        "value"
    ] == pytest.approx(1.0)
    with pytest.raises(GradvarError, match="entropy"):
        proxy_table(mine, proxies={"entropy": {"p0": np.ones(3)}}, seed=0)


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_coverage_with_known_truth(rho):
    """Normal pairs: rank correlation and R^2 (at rho 0 its lower end must be 0); lognormal ones for R^2 of the logs."""
    trials = 300

    def draw(rng, n):
        x = rng.normal(size=n)
        return x, rho * x + math.sqrt(1 - rho**2) * rng.normal(size=n)

    x, y = draw(np.random.default_rng(0), 400_000)
    truths = (stats.spearmanr(x, y).statistic, rho**2, rho**2)
    covered = np.zeros(3)
    for t in range(trials):
        x, y = draw(np.random.default_rng([2, t]), 64)
        plain = predictions([Pair.of(x, y)], level=0.95)
        logs = predictions([Pair.of(np.exp(x), np.exp(y))], level=0.95)
        found = [plain[0][1], plain[1][1], logs[2][1]]
        covered += [e.low <= truth <= e.high for e, truth in zip(found, truths, strict=True)]
    bound = 5 * math.sqrt(0.95 * 0.05 / trials)
    assert (np.abs(covered / trials - 0.95) < bound).all(), covered / trials


@pytest.mark.parametrize("advantage", ["grpo", "opo", "raw", "score"])
def test_replicates_leave_a_response_out_of_the_baseline_too(groups, advantage):
    """Jackknife of Fisher's z by doing the whole estimate again without each response."""
    mine = next(g for g in groups if g.target == "a").select(np.arange(16))
    mine = replace(mine, rewards=np.round(np.random.default_rng(1).random(16) * 3))

    def z_of(chosen):
        part = mine.select(chosen)
        r, ell = part.rewards, part.lengths.astype(float)
        a = references.advantage(r, advantage, ell)
        if advantage == "grpo":
            a = (r - r.mean()) / (r.std(ddof=1) + 1e-6)
        norm = a**2 * np.diagonal(part.gram)
        proxy = a**2 * ell if advantage != "score" else ell
        return [math.atanh(stats.spearmanr(proxy, norm).statistic), math.atanh(np.corrcoef(proxy, norm)[0, 1])]

    everyone = np.arange(16)
    value = z_of(everyone)
    without = np.array([z_of(np.delete(everyone, i)) for i in everyone])
    errors = np.sqrt(15 / 16 * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    name = "length" if advantage == "score" else "advantage_square_length"
    pair = prompt_pairs(mine, advantage, seed=0).pair(name, "norm_square")
    rank, explained, _ = predictions([pair], level=0.95)
    assert math.atanh(rank[1].value) == pytest.approx(value[0])
    assert math.sqrt(explained[1].value) == pytest.approx(math.tanh(value[1]))
    for k, (_, estimate, _), error, back in (
        (0, rank, errors[0], lambda x: x),
        (1, explained, errors[1], math.sqrt),
    ):
        influence = without[:, k].mean() - without[:, k]
        bias = 15 * (without[:, k].mean() - value[k])
        degrees = effective_degrees(influence, 15)
        quantile = t_quantile(0.95, min(8.0, degrees))
        # No more bias than error, and wider by the cube root where less than one response in eight carries the error.
        rare = max(1.0, 16 / (8 * degrees)) ** (1 / 3)
        high = value[k] + quantile * rare * math.hypot(error, min(abs(bias), error))
        assert back(estimate.high) == pytest.approx(math.tanh(high))


@pytest.mark.parametrize("n", [2, 3, 40])
@pytest.mark.parametrize("case", ["plain", "outlier", "far", "constant", "one", "line"])
def test_sums_less_one_response_are_those_of_the_others(case, n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    y = x + rng.normal(size=n)
    if case == "outlier":
        x[0], y[0] = 1e6, 1e6
    elif case == "far":
        x = x + 1e4
    elif case == "constant":
        x[:] = 0.1
    elif case == "one":
        x[:] = np.arange(n) == 1
    elif case == "line":
        y = 2.5 * x
    got = Pair.of(x, y).sums.without
    for i in range(n):
        a, b = np.delete(x, i), np.delete(y, i)
        a, b = a - a.mean(), b - b.mean()
        size = math.sqrt((a @ a) * (b @ b))
        assert got[i, 1:] == pytest.approx(np.array([a @ a, b @ b]), rel=1e-6, abs=1e-18)
        assert got[i, 0] == pytest.approx(a @ b, abs=1e-9 * size + 1e-18)


def test_a_proxy_of_one_value_without_a_response_gives_no_interval(groups):
    """16 of 31 right: A^2 is one value as soon as a right response is left out, and rounding is no correlation."""
    one = next(g for g in groups if g.target == "a").select(np.arange(31))
    rewards = (np.random.default_rng(0).permutation(31) < 16).astype(float)
    found = []
    for factor, shift in ((1.0, 0.0), (3.0, 0.1), (0.7, -5.0)):
        for kind in ("grpo", "mean", "rloo"):
            table = proxy_table([replace(one, rewards=factor * rewards + shift)], advantage=kind, seed=0)
            rows = pick(table, proxy="advantage_square", truth="norm_square")
            assert rows["low"].isna().all()
            found.append(rows["value"].to_numpy())
    np.testing.assert_allclose(found, np.broadcast_to(found[0], np.shape(found)), rtol=1e-6)


def test_repeated_responses_have_the_ranks_of_ties(groups):
    """Advantages of another scale change no rank, nor does the order in which products are rounded."""
    one = next(g for g in groups if g.target == "a")
    again = np.where(np.arange(48) % 3 == 0, 5, np.arange(48))
    one = replace(one, gram=one.gram[np.ix_(again, again)], lengths=one.lengths[again])
    tables = [proxy_table([one], advantage=kind, seed=0) for kind in ("mean", "rloo")]
    values, others = (pick(t, quantity="rank_correlation")[["value", "low", "high"]].to_numpy() for t in tables)
    np.testing.assert_allclose(values, others, rtol=1e-9)


@pytest.mark.parametrize(("n", "bounded"), [(19, False), (20, True)])
def test_r2_of_logs_needs_20_responses(n, bounded):
    one = simulator.prompt("p", n, rng=np.random.default_rng(0), signal=1.0)
    rows = proxy_table([one], seed=0)
    mine = rows[(rows["proxy"] == "length") & (rows["truth"] == "norm_square")].set_index("quantity")
    assert math.isfinite(mine.loc["explained_variance_log", "low"]) == bounded
    assert math.isfinite(mine.loc["explained_variance", "low"])
    assert ("below 20 responses" in mine.loc["explained_variance_log", "method"]) != bounded


def test_logs_leave_out_what_is_not_positive():
    x = np.arange(20.0)
    y = x**3
    y[5] = 0.0
    quantity, explained, verdict = predictions([Pair.of(x, y)], level=0.95)[2]
    assert (quantity, verdict, explained.n) == ("explained_variance_log", None, 18)
    assert explained.value == pytest.approx(1.0)


def test_degenerate(groups):
    mine = [g for g in groups if g.target == "a"][:3]
    mine[0] = replace(mine[0], rewards=np.zeros(48))
    mine[1] = replace(mine[1], lengths=np.full(48, 5.0))
    table = proxy_table(mine, seed=0)
    assert only(table, prompt_id="p0")["verdict"] == "silent: all rewards equal"
    row = only(table, quantity="rank_correlation", prompt_id="p1", proxy="length", truth="within")
    assert (row["verdict"], math.isnan(row["value"])) == ("constant", True)
    between = pick(table, scope="between prompts")
    assert set(between["verdict"]) == {"undetermined"}
    few = proxy_table([mine[2].select(np.arange(6))], seed=0)
    row = only(few, quantity="explained_variance", proxy="length", truth="norm_square")
    assert math.isfinite(row["value"])
    assert math.isnan(row["low"])
    two = proxy_table([mine[2].select(np.arange(2))], seed=0, advantage="score")
    assert "fewer than 3" in only(two)["method"]
    holes = replace(mine[2], rewards=np.where(np.arange(48) < 5, np.nan, mine[2].rewards))
    assert set(proxy_table([holes], seed=0)["n"]) == {43}


def test_repeats_and_does_not_depend_on_other_prompts(table, groups):
    alone = proxy_table([g for g in groups if g.prompt_id == "p2"], seed=1)
    same(pick(alone, prompt_id="p2"), pick(table, prompt_id="p2"))
