import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradvar.errors import GradvarError
from gradvar.estimators import alpha_table, compare_table, cv_table, law_table
from gradvar.estimators.comparison import estimate_difference, mean_of_pairs
from gradvar.runs.records import TABLE_COLUMNS, Estimate
from tests.estimators import simulator
from tests.estimators.test_tables import only, pick, same

OPTIONS = {"permutations": 64, "grid": (0.0, 1.0, 2.0), "seed": 5}


def run(number, count=5, n=64, *, signal=4.0, targets=("a",), **law):
    return [
        simulator.prompt(f"p{q}", n, rng=np.random.default_rng([number, q, k]), target=target, signal=signal, **law)
        for q in range(count)
        for k, target in enumerate(targets)
    ]


@pytest.fixture(scope="module")
def runs():
    return {"early": run(1), "late": run(2, 7, signal=1.2, beta=2.0)}


@pytest.fixture(scope="module")
def table(runs):
    return compare_table(runs, **OPTIONS)


def estimate(value, low, high):
    return Estimate(value=value, low=low, high=high, level=0.95, method="", n=10, clusters=1, seed=0)


def test_a_runs_numbers_are_the_other_tables(table, runs):
    cv = cv_table(runs["late"], rules=("grpo",), permutations=64, seed=5)
    law = law_table(runs["late"], advantages_studied=("grpo",), subsets=False, seed=5)
    alpha = alpha_table(runs["late"], rules=("grpo",), grid=(0.0, 1.0, 2.0), permutations=64, seed=5)
    for prompt in (None, "p6"):
        mine = pick(table, run="late", against=None, prompt_id=prompt)
        these = {"prompt_id": prompt, "estimand": "these prompts"}
        for quantity, other in (
            ("cv", only(cv, quantity="cv", rule="grpo", **these)),
            ("within_exponent", only(law, quantity="within_exponent", **these)),
            ("eta", only(alpha, quantity="eta", rule="grpo", **these)),
            ("alpha_star_eta", only(alpha, quantity="alpha_star_eta", **these)),
        ):
            row = only(mine, quantity=quantity)
            assert (row["value"], row["low"], row["high"]) == pytest.approx(
                (other["value"], other["low"], other["high"]), nan_ok=True
            )
    row, noise = (only(table, run="early", against=None, prompt_id=None, quantity=q) for q in ("cv", "noise_scale"))
    assert noise["value"] == pytest.approx(8 * row["value"] ** 2)
    assert noise["high"] == pytest.approx(8 * row["high"] ** 2)


def test_differences_use_shared_prompts_only(table, runs):
    differences = table[table["against"].notna()]
    assert set(differences["run"]) == {"late"}
    assert set(differences["against"]) == {"early"}
    assert set(differences["prompt_id"].dropna()) == {f"p{q}" for q in range(5)}
    shared = [g for g in runs["late"] if g.prompt_id in {f"p{q}" for q in range(5)}]
    later, early = (
        only(
            law_table(g, advantages_studied=("grpo",), subsets=False, seed=5),
            quantity="within_exponent",
            prompt_id=None,
            estimand="these prompts",
        )
        for g in (shared, runs["early"])
    )
    row = only(differences, quantity="within_exponent_difference", prompt_id=None, estimand="these prompts")
    assert row["value"] == pytest.approx(later["value"] - early["value"])
    assert row["high"] - row["value"] == pytest.approx(
        math.hypot(later["high"] - later["value"], early["value"] - early["low"])
    )
    assert row["verdict"] == "higher"
    assert row["n"] == 2 * 5 * 64
    own = pick(differences, quantity="within_exponent_difference", estimand="these prompts")
    values = own[own["prompt_id"].notna()]["value"]
    across = only(differences, quantity="within_exponent_difference", estimand="prompts like these")
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (across["value"], across["low"], across["high"]) == pytest.approx((values.mean(), *expected))
    ratio = only(differences, quantity="cv_ratio", prompt_id=None, estimand="these prompts")
    assert ratio["verdict"] == "higher"
    assert ratio["low"] > 1


def test_columns_seed_and_reference(table, runs):
    assert list(table.columns[: len(TABLE_COLUMNS)]) == list(TABLE_COLUMNS)
    assert (table["seed"] == 5).all()
    keys = ["prompt_id", "target", "quantity", "run", "against", "estimand"]
    assert not table.duplicated(keys).any()
    same(compare_table(runs, **OPTIONS), table)
    turned = compare_table(runs, reference="late", **OPTIONS)
    row = only(turned, quantity="cv_ratio", prompt_id=None, estimand="these prompts")
    other = only(table, quantity="cv_ratio", prompt_id=None, estimand="these prompts")
    assert (row["run"], row["against"]) == ("early", "late")
    assert (row["value"], row["low"], row["high"]) == pytest.approx(
        (1 / other["value"], 1 / other["high"], 1 / other["low"])
    )


def test_mover_and_pairs_by_definition():
    got = estimate_difference("eta", estimate(0.5, 0.4, 0.7), estimate(0.2, 0.1, 0.25))
    assert got.value == pytest.approx(0.3)
    assert got.low == pytest.approx(0.3 - math.sqrt(0.1**2 + 0.05**2))
    assert got.high == pytest.approx(0.3 + math.sqrt(0.2**2 + 0.1**2))
    got = estimate_difference("cv", estimate(2.0, 1.0, 4.0), estimate(1.0, 0.5, 2.0))
    assert (got.value, got.low * got.high) == pytest.approx((2.0, 4.0))
    assert got.high == pytest.approx(2 * 2 ** math.sqrt(2))
    got = estimate_difference("cv", estimate(math.nan, 1.0, math.inf), estimate(1.0, 0.5, 2.0))
    assert (math.isnan(got.value), got.low, got.high) == (True, 0.0, math.inf)
    got = estimate_difference("alpha_star_eta", estimate(1.0, 0.5, 1.5), estimate(2.0, 1.0, 3.0))
    assert (got.value, got.low, got.high) == pytest.approx(
        (-1.0, -1.0 - math.hypot(0.5, 1.0), -1.0 + math.hypot(0.5, 1.0))
    )
    got = estimate_difference("cv", estimate(1.0, 0.0, 2.0), estimate(1.0, 0.5, 2.0))
    assert got.low == 0.0
    three = [estimate(v, v, v) for v in (1.0, 2.0, 4.0)]
    assert "below 4" in mean_of_pairs("cv", three, level=0.95).method
    assert mean_of_pairs("cv", [*three, three[1]], level=0.95).value == pytest.approx(2.0)
    broken = mean_of_pairs("cv", [*three, estimate(math.nan, 0, math.inf)], level=0.95)
    assert "unresolved in 1 of 4" in broken.method


def test_coverage_of_a_difference_of_exponents_and_wrong_verdicts():
    """Laws 1 and 2: truth 1 on V. Both runs draw afresh; MOVER's interval must cover, no verdict may be reversed."""
    from gradvar.estimators.inputs import generator
    from gradvar.estimators.law import fit_exponent
    from gradvar.estimators.spread import within_dependence, within_length_variance

    def exponent(number, beta):
        g = simulator.prompt("p", 64, rng=np.random.default_rng([3, number]), beta=beta)
        rng = [generator(0, "p", "neighbours") for _ in range(2)]
        v = within_length_variance(g.gram, g.lengths, rng=rng[0])
        return fit_exponent(g.lengths, v, dependence=within_dependence(g.gram, g.lengths, rng=rng[1])).exponent

    trials, covered, null = 200, 0, 0
    for t in range(trials):
        one, two, three = exponent(3 * t, 2.0), exponent(3 * t + 1, 1.0), exponent(3 * t + 2, 1.0)
        got = estimate_difference("within_exponent", one, two)
        covered += got.low <= 1.0 <= got.high
        nothing = estimate_difference("within_exponent", two, three)
        null += not nothing.low <= 0.0 <= nothing.high
    bound = 5 * math.sqrt(0.05 * 0.95 / trials)
    assert abs(covered / trials - 0.95) < bound, covered / trials
    assert null / trials < 0.05 + bound


def test_one_prompt_silent_prompts_and_nothing_shared():
    one = run(4, 1)
    table = compare_table({"x": one, "y": run(5, 1)}, **OPTIONS)
    row = only(table, run="x", against=None, prompt_id=None, quantity="eta")
    assert row["value"] == only(table, run="x", against=None, prompt_id="p0", quantity="eta")["value"]
    assert math.isfinite(only(table, quantity="eta_difference", prompt_id=None, estimand="these prompts")["value"])
    apart = compare_table({"x": one, "y": [replace(g, prompt_id="other") for g in run(5, 1)]}, **OPTIONS)
    assert apart["against"].isna().all()
    silent = [replace(g, rewards=np.ones(64)) if g.prompt_id == "p0" else g for g in run(6, 2)]
    table = compare_table({"x": silent, "y": run(7, 2)}, **OPTIONS)
    assert only(table, quantity="cv_ratio", prompt_id="p0")["verdict"] == "unresolved"
    assert only(table, run="x", against=None, quantity="eta", prompt_id=None)["verdict"] in ("resolved", "unresolved")
    everything = compare_table({"x": [replace(g, rewards=np.ones(64)) for g in run(8, 2)]}, **OPTIONS)
    assert set(everything["verdict"]) == {"unresolved"}


@pytest.mark.parametrize("lost", ["silent", "small", "one length"])
def test_a_prompt_without_an_estimate_in_one_run_makes_no_difference(lost):
    """A checkpoint that solved its loudest prompt: nothing else changed, so no pooled quantity may differ."""
    early, late = run(11, 5), run(12, 5)
    loud = {"signal": 1.0, "beta": 0.0}
    early[0], late[0] = (run(number, 1, **loud)[0] for number in (13, 14))
    early[0], late[0] = (replace(one, gram=400 * one.gram) for one in (early[0], late[0]))
    late[0] = {
        "silent": lambda one: replace(one, rewards=np.ones(64)),
        "small": lambda one: one.select(np.arange(20)),
        "one length": lambda one: replace(one, lengths=np.full(64, 50.0)),
    }[lost](late[0])
    table = compare_table({"early": early, "late": late}, **OPTIONS)
    pooled = pick(table, prompt_id=None, against="early", estimand="these prompts").set_index("quantity")
    without = {name: [g for g in one if g.prompt_id != "p0"] for name, one in (("early", early), ("late", late))}
    expected = compare_table(without, **OPTIONS)
    expected = pick(expected, prompt_id=None, against="early", estimand="these prompts").set_index("quantity")
    left_out = [
        name
        for name in expected.index
        if lost == "silent" or name.endswith("exponent_difference") == (lost == "one length")
    ]
    assert len(left_out) >= 2
    same(pooled.loc[left_out], expected.loc[left_out])
    assert (pooled.loc[left_out, "clusters"] == 4).all()
    assert (pooled.drop(left_out)["clusters"] == 5).all()
    assert set(pooled.loc[left_out, "verdict"]) == {"undetermined"}
    across = only(table, prompt_id=None, quantity=left_out[0], estimand="prompts like these")
    assert (across["clusters"], math.isfinite(across["value"])) == (4, True)
    # Each run's own numbers stay over all its prompts.
    own = only(table, run="early", against=None, prompt_id=None, quantity="eta")
    assert own["clusters"] == 5


def test_no_prompt_with_an_estimate_in_both_runs():
    early, late = run(11, 2), run(12, 2)
    early[0], late[1] = (replace(one, rewards=np.ones(64)) for one in (early[0], late[1]))
    table = compare_table({"early": early, "late": late}, **OPTIONS)
    row = only(table, prompt_id=None, quantity="eta_difference", estimand="these prompts")
    assert (row["verdict"], math.isnan(row["value"])) == ("unresolved", True)
    assert "no shared prompt has an estimate in both runs" in row["method"]


def test_vl_norm_and_refusals(runs):
    table = compare_table({"x": run(9, 1)}, rule="vl_norm", alpha=0.6, **OPTIONS)
    assert only(table, quantity="eta", prompt_id=None)["alpha"] == 0.6
    assert math.isfinite(only(table, quantity="cv", prompt_id=None)["value"])
    # The best alpha is sought on the grid, whichever alpha the rule has.
    far = compare_table({"x": run(9, 1)}, rule="vl_norm", alpha=50.0, **OPTIONS)
    plain = compare_table({"x": run(9, 1)}, **OPTIONS)
    for quantity in ("alpha_star_eta", "alpha_star_cv"):
        same(pick(far, quantity=quantity), pick(plain, quantity=quantity))
    own = only(far, quantity="eta", prompt_id=None)
    assert (own["alpha"], 0.0 <= own["value"] <= 1.0) == (50.0, True)
    with pytest.raises(GradvarError, match="no runs"):
        compare_table({}, seed=0)
    with pytest.raises(GradvarError, match="none of the runs"):
        compare_table(runs, reference="x", seed=0)
    with pytest.raises(GradvarError, match="alpha"):
        compare_table(runs, rule="vl_norm", seed=0)
    with pytest.raises(GradvarError, match="run 'small'"):
        compare_table({"small": run(1, 1, 12)}, seed=0)
