"""The CV itself in forms 1 and 2: literal definitions, a simulated truth, pooling, degenerate data."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks.calibration_truths import conditional_variances, gradient_of
from gradvar.estimators import (
    RULES,
    advantages,
    cv_table,
    find_rule,
    fit_variance_law,
    form_table,
    total_cv_form,
    within_length_variance,
)
from gradvar.estimators.form_cvs import _group_weights, _noise, baseline_moves, form_moments
from gradvar.estimators.form_ratios import log_ratio
from gradvar.estimators.forms import _measured
from gradvar.estimators.inputs import generator
from gradvar.estimators.intervals import reach_of_sum
from gradvar.estimators.noise_scale import noise_moments
from gradvar.estimators.spread import nearest_in_length
from tests.estimators import references, simulator
from tests.estimators.test_tables import only, pick, prompts

FORMS = ("cv_form_1", "cv_form_2")
LAW = {"beta": 1.0, "signal": 3.0, "p": 0.5}


def literal_squared_gradient(gram, rewards):
    """Mean over all different responses, term by term."""
    n = range(len(rewards))
    terms = [(rewards[i] - rewards[k]) * (rewards[j] - rewards[m]) * gram[i, j] for i, j, k, m in itertools.permutations(n, 4)]  # fmt: skip # noqa: E501
    return math.fsum(terms) / len(terms)


def straightened(v, lengths, near):
    """V_i v(L_i) / E V_i, of a law that is fitted with E V_i = k/(k + 1) (v_i + (1/k^2) sum_j v_j)."""
    k = near.shape[1]
    law = fit_variance_law(lengths, v, near=near)
    fitted = law.scale.value * lengths**law.exponent.value
    expected = [k / (k + 1) * (fitted[i] + sum(fitted[j] for j in near[i]) / k**2) for i in range(len(v))]
    return v * fitted / np.array(expected)


@pytest.mark.parametrize("advantage", ["grpo", "mean", "rloo", "raw", "opo"])
@pytest.mark.parametrize(("rule", "alpha"), [("grpo", None), ("dapo", None), ("vl_norm", 0.5), ("token_sum", None)])
def test_both_forms_are_the_definition(rule, alpha, advantage):
    n, size = 12, 4
    one = simulator.prompt("p", n, rng=np.random.default_rng(5), **LAW)
    factors = advantages(one.rewards, advantage, lengths=one.lengths)
    v = within_length_variance(one.gram, one.lengths, advantages=factors, rng=generator(7, "p", "neighbours"))
    v = straightened(v, one.lengths, nearest_in_length(one.lengths, 5, rng=generator(7, "p", "neighbours")))
    gradient = literal_squared_gradient(one.gram, one.rewards)
    if advantage in ("grpo", "mean", "rloo"):
        # In the scale of r - mean, whose square has the expectation (1 - 1/n) Var r.
        scale = factors[0] / (one.rewards[0] - one.rewards.mean())
        v = v / scale**2 / (1 - 1 / n)
    x = references.weights(rule, one.lengths, alpha=alpha, max_length=3000)
    table = form_table([one], rules=(rule,), alphas=(alpha or 1.0,), advantage=advantage, group_size=size, seed=7)
    law = fit_variance_law(one.lengths, v).families["proportional"]
    per_token = float(np.mean(v / one.lengths))
    assert list(law.parameters.values()) == pytest.approx([per_token])
    for form, variances in (("cv_form_1", per_token * one.lengths), ("cv_form_2", v)):
        noise = n / size * math.fsum(x**2 * variances) / math.fsum(x) ** 2
        row = only(table, quantity=form, rule=rule)
        assert (row["group_size"], row["n"], row["level"], row["seed"], row["estimand"]) == (
            size, n, 0.95, 7, "these prompts",
        )  # fmt: skip
        assert row["verdict"] == "resolved"
        assert row["value"] == pytest.approx(math.sqrt(noise / gradient), rel=1e-9)
        assert row["low"] < row["value"] < row["high"]


def test_the_score_has_no_gradient_to_compare_with():
    one = prompts(1, n=48, targets=("a",), signal=3.0)[0]
    for row in form_table([one], rules=("grpo",), advantage="score", seed=0).to_dict("records")[:2]:
        assert row["quantity"] in FORMS
        assert (row["verdict"], row["high"]) == ("unresolved", math.inf)
        assert math.isnan(row["value"])
        assert row["low"] > 0


def truth(one, rule, n, p=0.5, signal=1.5):
    """At p = 1/2 the simulator's g = (r - p) s has v = p (1 - p) L / 150 and E g = p (1 - p) signal, whatever L."""
    variance = p * (1 - p) * one.lengths / simulator.TYPICAL_LENGTH
    x = references.weights(rule, one.lengths)
    return math.sqrt(len(x) / n * float(x**2 @ variance)) / (float(x.sum()) * p * (1 - p) * signal)


@pytest.mark.parametrize("n", [64, 128])
def test_intervals_cover_and_values_are_centred(n):
    """200 prompts of CV 0.5; binomial bound at 93%, medians within four standard errors."""
    draws, hits, errors = 200, {}, {}
    for t in range(draws):
        one = simulator.prompt("p", n, rng=np.random.default_rng([8, n, t]), beta=1.0, signal=1.5, p=0.5)
        table = form_table([one], rules=("grpo", "dapo"), seed=t)
        for form, rule in itertools.product(FORMS, ("grpo", "dapo")):
            row, true = only(table, quantity=form, rule=rule), truth(one, rule, 8)
            hits[form, rule] = hits.get((form, rule), 0) + (row["low"] <= true <= row["high"])
            errors.setdefault((form, rule), []).append(math.log(row["value"] / true))
    assert min(hits.values()) >= stats.binom.ppf(1e-4, draws, 0.93), hits
    for key, logs in errors.items():
        # The standard error of a median is 1.25 of a mean's; 1% is the bias of a ratio at these sizes.
        assert abs(np.median(logs)) < 4 * 1.25 * np.std(logs) / math.sqrt(draws) + 0.01, key


def test_ratios_are_covered_where_all_share_the_baseline():
    """300 prompts of 16 with a law of L^2 and a mean that moves with L: 80% without what the baseline adds."""
    law = {"beta": 2.0, "signal": 1.5, "drift": 0.3, "reward_slope": -0.7, "p": 0.4}
    hits = draws = 0
    while draws < 300:
        one = simulator.prompt("p", 16, rng=np.random.default_rng([10, draws, hits]), **law)
        if len(set(one.rewards)) == 1:
            one = simulator.prompt("p", 16, rng=np.random.default_rng([11, draws, hits]), **law)
        row = only(form_table([one], rules=("dapo",), seed=draws), quantity="cv_ratio_form_2", rule="dapo")
        v = conditional_variances(law, "grpo", one.lengths)[1]
        x, y = (references.weights(rule, one.lengths) for rule in ("dapo", "grpo"))
        true = np.sqrt((x**2 @ v) / (y**2 @ v)) / x.sum() * y.sum()
        hits += not (row["low"] > true or row["high"] < true)  # none where few are right
        draws += 1
    assert hits >= stats.binom.ppf(1e-4, draws, 0.93), hits


@pytest.mark.slow
def test_ratios_and_cvs_are_covered_where_the_law_bends():
    """200 prompts of 512 whose mean moves with L: v(L) rises again at the short end, where vl_norm 2 puts its weight.

    By residuals around a power law the ratio was covered 81%, the CV 82%.
    """
    law = {"beta": 1.0, "signal": 1.0, "drift": 0.3, "reward_slope": -0.7, "p": 0.4, "dimensions": 20, "decay": 0.9}
    draws, hits = 200, {"cv_form_2": 0, "cv_ratio_form_2": 0}
    gradient = float(np.linalg.norm(gradient_of(law)))
    for t in range(draws):
        one = simulator.prompt("p", 512, rng=np.random.default_rng([12, t]), **law)
        table = form_table([one], rules=("vl_norm",), alphas=(2.0,), seed=t)
        v = conditional_variances(law, "grpo", one.lengths)[1]
        x = references.weights("vl_norm", one.lengths, alpha=2.0, max_length=3000)
        y = references.weights("grpo", one.lengths)
        cv, other = (math.sqrt(512 / 8 * (w**2 @ v)) / w.sum() / gradient for w in (x, y))
        for quantity, true in (("cv_form_2", cv), ("cv_ratio_form_2", cv / other)):
            row = only(table, quantity=quantity, rule="vl_norm", alpha=2.0)
            hits[quantity] += row["low"] <= true <= row["high"]
    # Binomial bound at 93%: 81% is below it with 99% probability.
    assert min(hits.values()) >= stats.binom.ppf(1e-3, draws, 0.93), hits


def test_the_spread_of_those_alike_counts_where_residuals_are_small():
    """Replicates of the noise: its own part is that of the residuals, or of responses alike in length if larger."""
    measured = _measured(simulator.prompt("p", 40, rng=np.random.default_rng(4), beta=1.0, signal=1.0), "mean", 5, 0)
    w, zeros = measured.lengths**-2.0, np.zeros(40)
    alone = replace(measured, shared=lambda q: 0.0 * q, slope=zeros)

    def size(one):
        value, without = _noise(one, w, zeros)
        assert value == pytest.approx(w @ measured.within)
        return np.linalg.norm(without - without.mean())

    own = w * (measured.within - measured.centre) * 40 / 39
    assert size(replace(alone, spread=zeros)) == pytest.approx(np.linalg.norm(own - own.mean()))
    spread = 3.0 * np.linalg.norm(own) / np.linalg.norm(w) * np.ones(40)
    assert size(replace(alone, spread=spread)) == pytest.approx(3.0 * np.linalg.norm(own - own.mean()))


def test_hard_signals_are_covered_resolved_or_not():
    hits, resolved, draws = 0, 0, 60
    for t in range(draws):
        one = simulator.prompt("p", 64, rng=np.random.default_rng([9, t]), beta=1.0, signal=0.15, p=0.5)
        row = only(form_table([one], rules=("dapo",), seed=t), quantity="cv_form_2")
        true = truth(one, "dapo", 8, signal=0.15)
        hits += row["low"] <= true <= row["high"]
        resolved += row["verdict"] == "resolved"
        assert row["verdict"] == "resolved" or (math.isnan(row["value"]) and row["high"] == math.inf)
    assert hits >= stats.binom.ppf(1e-4, draws, 0.93), hits
    assert resolved < draws / 2


def test_rare_short_responses_do_not_take_their_neighbours_noise():
    """1% of 2 tokens under V L: their neighbours' noise is 75 times theirs, and vl_norm 2 rests on them alone."""
    ratios = []
    for t in range(40):
        one = simulator.prompt("p", 128, rng=np.random.default_rng([5, t]), beta=1.0, signal=0.02, decay=0.9)
        short = one.lengths.argmin()
        lengths, scale = one.lengths.copy(), np.ones(128)
        scale[short], lengths[short] = math.sqrt(2.0 / lengths[short]), 2.0
        one = replace(one, lengths=lengths, gram=one.gram * np.outer(scale, scale))
        row = only(form_table([one], alphas=(2.0,), seed=t), quantity="cv_ratio_form_2", rule="vl_norm")
        ratios.append(row["value"] / math.sqrt(noise_given(lengths, 2.0) / noise_given(lengths, 1.0)))
    assert 0.75 < np.median(ratios) < 1.15


def noise_given(lengths, falls):
    """Of weights L^-falls that sum to 1, given the lengths, up to V."""
    x = lengths**-falls
    return float(x**2 @ lengths) / float(x.sum()) ** 2


def test_replicates_follow_the_baseline():
    """The derivative of sum w V to the baseline is that of V taken with other baselines, and what it is scaled by."""
    one = simulator.prompt("p", 30, rng=np.random.default_rng(4), beta=1.0, signal=1.0, p=0.2)
    measured = _measured(one, "mean", 5, 0)
    rng = generator(0, "p", "neighbours")
    other = within_length_variance(one.gram, one.lengths, advantages=measured.factors + 1e-6, rng=rng)
    rng = generator(0, "p", "neighbours")
    before = within_length_variance(one.gram, one.lengths, advantages=measured.factors, rng=rng)
    straight = measured.within / before
    assert straight * (other - before) / 1e-6 == pytest.approx(measured.slope, rel=1e-3, abs=1e-4)
    moved = baseline_moves(measured)
    without = [np.delete(one.rewards, i).mean() for i in range(30)]
    assert moved == pytest.approx(one.rewards.mean() - np.array(without))


def test_the_papers_order_is_exact_in_form_1():
    groups = prompts(3, n=40, targets=("a", "b"), **LAW)
    table = form_table(groups, alphas=(0.0, 0.25, 0.75, 1.0), seed=0)
    first = table[(table["quantity"] == "cv_form_1") & table["prompt_id"].notna()]
    for _, own in first.groupby(["prompt_id", "target"]):
        value = {(r, None if math.isnan(a) else a): v for r, a, v in zip(own["rule"], own["alpha"], own["value"], strict=True)}  # fmt: skip # noqa: E501
        assert value["vl_norm", 1.0] == pytest.approx(value["grpo", None])
        assert value["vl_norm", 0.0] == pytest.approx(value["dapo", None])
        assert value["dr_grpo", None] == pytest.approx(value["dapo", None])
        assert value["grpo", None] < value["vl_norm", 0.75] < value["vl_norm", 0.25] < value["dapo", None]
    # The ratios of the same table are those of the values.
    for form in (1, 2):
        of = {r: only(table, quantity=f"cv_form_{form}", prompt_id="p1", target="a", rule=r) for r in ("grpo", "dapo")}
        row = only(table, quantity=f"cv_ratio_form_{form}", prompt_id="p1", target="a", rule="dapo")
        assert of["dapo"]["value"] / of["grpo"]["value"] == pytest.approx(row["value"])


def test_group_sizes_and_constants_change_what_they_should():
    one = prompts(1, n=96, targets=("a",), **LAW)[0]
    plain, larger, scaled = (
        form_table([p], group_size=size, seed=0)
        for p, size in ((one, 8), (one, 32), (replace(one, rewards=7 + 3 * one.rewards), 8))
    )
    for rule, form in itertools.product(("grpo", "dapo", "dr_grpo"), FORMS):
        value = only(plain, quantity=form, rule=rule)["value"]
        assert only(larger, quantity=form, rule=rule)["value"] == pytest.approx(value / 2)
        for end in ("value", "low", "high"):
            assert only(scaled, quantity=form, rule=rule)[end] == pytest.approx(
                only(plain, quantity=form, rule=rule)[end], rel=1e-4
            )


def squared_gradient(g):
    """||grad J||^2 over the variance of the rewards: in the scale of grpo's advantage."""
    return noise_moments(g.gram, g.rewards).cross / (np.std(g.rewards, ddof=1) + 1e-6) ** 2


def test_pooled_is_the_sum_over_prompts_in_the_rules_own_scale():
    groups = prompts(5, n=48, targets=("a",), **LAW)
    groups[0] = replace(groups[0], rewards=np.ones(48))
    groups[1] = groups[1].select(np.arange(4))
    table = form_table(groups, rules=("grpo", "dapo", "token_sum"), seed=0)
    silent, small = (pick(table, quantity="cv_form_1", prompt_id=name) for name in ("p0", "p1"))
    assert list(silent["verdict"]) == ["silent: all rewards equal"]
    assert "fewer than 5" in small["method"].iloc[0]
    for rule, form in itertools.product(("grpo", "dapo", "token_sum"), FORMS):
        noise, signal = 0.0, 0.0
        for g in groups[2:]:
            x = references.weights(rule, g.lengths)
            own = squared_gradient(g) * float(x.sum()) ** 2
            signal += own
            noise += own * only(table, quantity=form, rule=rule, prompt_id=g.prompt_id)["value"] ** 2
        here, like = (
            only(table, quantity=form, rule=rule, prompt_id=None, estimand=e)
            for e in ("these prompts", "prompts like these")
        )
        assert here["value"] == pytest.approx(math.sqrt(noise / signal))
        assert here["clusters"] == 4  # the silent one counts with its zeros, as in form 3
        assert here["low"] < here["value"] < here["high"]
        assert not like["high"] < here["high"]


def test_the_three_forms_agree_where_lengths_are_all_alike():
    """One length: V L and v(L) are one; form 3 has the group's own mean reward, 8/7 of the noise."""
    groups = [replace(g, lengths=np.full_like(g.lengths, 150.0)) for g in prompts(4, n=128, targets=("a",), **LAW)]
    table = form_table(groups, seed=0)
    total = total_cv_form(cv_table(groups, permutations=64, seed=0))
    for rule in ("grpo", "dapo"):
        first, second = (only(table, quantity=q, prompt_id="p0", rule=rule)["value"] for q in FORMS)
        assert first == pytest.approx(second)
        where = {"prompt_id": None, "rule": rule, "estimand": "these prompts"}
        third, pooled = only(total, **where), only(table, quantity="cv_form_2", **where)
        assert (third["quantity"], third["verdict"], pooled["verdict"]) == ("cv_form_3", "resolved", "resolved")
        assert third["low"] / math.sqrt(8 / 7) < pooled["high"]
        assert pooled["low"] < third["high"]


def test_degenerate_prompts_are_defined():
    one = prompts(1, n=40, targets=("a",), **LAW)[0]
    # One response, repeated: the rewards differ, and no product tells a gradient.
    repeated = replace(one, gram=np.ones((40, 40)), lengths=np.full(40, 90.0))
    table = form_table([repeated], rules=("grpo",), seed=0)
    for form in FORMS:
        row = only(table, quantity=form)
        assert row["verdict"] == "unresolved"
        assert math.isnan(row["value"])
        assert row["high"] == math.inf or math.isnan(row["high"])
    # Every response twice.
    twice = one.select(np.repeat(np.arange(20), 2))
    for row in pick(form_table([twice], rules=("grpo",), seed=0), quantity="cv_form_2").to_dict("records"):
        assert not row["low"] > row["high"]
    alone = form_table([one.select(np.arange(1))], rules=("grpo",), seed=0)
    assert set(alone["quantity"]) == set(FORMS)
    assert alone["value"].isna().all()
    dead = form_table([replace(one, gram=np.zeros((40, 40)))], rules=("grpo",), seed=0)
    assert set(dead["verdict"]) == {"no gradient: all are 0"}


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_has_both_forms(rule):
    one = prompts(1, n=40, targets=("a",), **LAW)[0]
    table = form_table([one], rules=(rule,), alphas=(1.0,), seed=0)
    assert (table[table["quantity"].isin(FORMS)]["value"] > 0).sum() == 2


@pytest.mark.parametrize("count", [1, 2])
def test_ends_of_a_ratio_by_hand(count):
    """The mean of the prompts' log ratios: influences and spreads over K, every V_i with its own skewness."""
    several = [
        replace(one, prompt_id=f"q{k}") for k, one in enumerate(prompts(count, n=40, targets=("a",), signal=2.0))
    ]
    table = form_table(several, rules=("vl_norm",), alphas=(2.0,), seed=5)
    name = "q0" if count == 1 else None
    row = only(table, quantity="cv_ratio_form_2", rule="vl_norm", alpha=2.0, prompt_id=name, estimand="these prompts")
    logs, influence, spread, skewness = [], [], [], []
    for one in several:
        measured = _measured(one, "grpo", 5, 5)
        x, y = (references.weights(rule, one.lengths, alpha=2.0, max_length=3000) for rule in ("vl_norm", "grpo"))
        gain = 0.5 * (x**2 / (x**2 @ measured.within) - y**2 / (y**2 @ measured.within))
        found = log_ratio(x, y, measured)
        logs.append(0.5 * math.log((x**2 @ measured.within) / (y**2 @ measured.within)) - math.log(x.sum() / y.sum()))
        influence.append(found.influence / count)
        spread.append(gain * measured.spread / count)
        skewness.append(measured.skewness)
    below, above = reach_of_sum(
        np.concatenate(influence), np.concatenate(spread), np.concatenate(skewness), most=39 * count, level=0.95
    )
    value = math.exp(sum(logs) / count)
    assert (row["value"], row["low"], row["high"]) == pytest.approx(
        (value, value * math.exp(-below), value * math.exp(above))
    )
    half = reach_of_sum(np.concatenate(influence), np.concatenate(spread), 0.0, most=39 * count, level=0.95)[0]
    assert below != pytest.approx(half, rel=0.01)


def test_influences_of_a_ratio_by_leaving_out_one_by_one():
    """Logs of both sums without a response: its own V_i's distance from the law, its neighbours' and the baseline's."""
    one = prompts(1, n=40, targets=("a",), signal=2.0)[0]
    measured = _measured(one, "grpo", 5, 5)
    x, y = (references.weights(rule, one.lengths, alpha=2.0, max_length=3000) for rule in ("vl_norm", "grpo"))
    v, n = measured.within, 40
    logs = np.log(one.lengths) - np.log(one.lengths).mean()
    apart = (v - measured.centre) / (1 - 1 / n - logs**2 / (logs @ logs))
    owed = measured.shared(np.eye(n))  # V_j - V_j without i at [i, j]
    pulled = references.advantage(one.rewards, "grpo") / (n - 1)  # what the others' advantages rise by without i
    gone = []
    for i in range(n):
        change = owed[i] - pulled[i] * measured.slope
        change[i] += apart[i]
        left = [max((w**2 @ (v - change)) / (w**2 @ v), 0.05) for w in (x, y)]
        gone.append(0.5 * (math.log(left[1]) - math.log(left[0])))
    found = log_ratio(x, y, measured).influence
    assert found == pytest.approx(np.array(gone) - np.mean(gone))
    linear = (0.5 * (x**2 / (x**2 @ v) - y**2 / (y**2 @ v))) @ (
        owed - np.outer(pulled, measured.slope) + np.diag(apart)
    ).T
    assert np.corrcoef(found, linear)[0, 1] > 0.9


def test_skewed_noise_bends_a_cv():
    """Beside what pairs bend: 2/3 of the third central moment of sum w V along its slope, cubed."""
    measured = _measured(prompts(1, n=40, targets=("a",), signal=2.0)[0], "grpo", 5, 5)
    variant = (find_rule("vl_norm"), 2.0)
    found = form_moments(measured, [variant], 8)[variant, "cv_form_2"]
    spread = 40 / 39 * 40 / 8 * _group_weights(measured, variant, 8) ** 2 * measured.spread
    third = float(measured.skewness @ spread**3)
    plain = replace(found, third_root=0.0).combined(0.3, -0.7, 8)
    assert third > 0.0
    assert found.combined(0.3, -0.7, 8) == (plain[0], pytest.approx(plain[1] + 2 / 3 * 0.3**3 * third))


@pytest.mark.parametrize("scale", [1e-85, 1e90])
def test_ends_do_not_depend_on_the_unit_of_the_gradients(scale):
    """Further than float32 gradients reach; a third moment is a Gram's third power."""
    one = prompts(1, n=48, targets=("a",), signal=2.0)[0]
    mine, far = (
        form_table([replace(one, gram=one.gram * factor)], rules=("dapo", "vl_norm"), alphas=(2.0,), seed=5)
        for factor in (1.0, scale)
    )
    for end in ("value", "low", "high"):
        np.testing.assert_allclose(far[end], mine[end], rtol=1e-6, err_msg=end)
