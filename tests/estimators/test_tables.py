import math
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from gradvar.errors import GradvarError
from gradvar.estimators import (
    aggregator_rho,
    alpha_table,
    cv_table,
    deviations,
    find_rule,
    fit_variance_law,
    form_table,
    identity_table,
    law_table,
    planning_table,
    within_length_variance,
)
from gradvar.estimators.cv_rows import CvStudy, ratio_row
from gradvar.estimators.inputs import arrange, generator
from gradvar.estimators.law import fit_exponent
from gradvar.estimators.spread import deviation_dependence, nearest_in_length, within_dependence
from gradvar.runs.records import TABLE_COLUMNS, Estimate
from tests.estimators import simulator

SILENT = "silent: all rewards equal"


def prompts(count=2, n=40, targets=("a", "b"), *, signal=1.5, **law):
    out = []
    for q in range(count):
        for k, target in enumerate(targets):
            scores, rewards, lengths = simulator.draw(n, rng=np.random.default_rng([q]), signal=signal, **law)
            other = simulator.draw(n, rng=np.random.default_rng([q, k + 1]), signal=0.0)[0]
            scores = scores + k * other
            one = simulator.prompt(f"p{q}", n, rng=np.random.default_rng([q]), target=target)
            out.append(replace(one, gram=scores @ scores.T, rewards=rewards, lengths=lengths))
    return out


def pick(table, **labels):
    chosen = table
    for column, value in labels.items():
        chosen = chosen[chosen[column].isna()] if value is None else chosen[chosen[column] == value]
    return chosen


def only(table, **labels):
    chosen = pick(table, **labels)
    assert len(chosen) == 1, (labels, len(chosen))
    return chosen.iloc[0]


@pytest.fixture(scope="module")
def groups():
    return prompts()


@pytest.fixture(scope="module")
def law(groups):
    return law_table(groups, seed=3)


@pytest.fixture(scope="module")
def cv(groups):
    return cv_table(groups, seed=3, permutations=64, alphas=(0.0, 1.0))


def test_columns_seeds_and_levels(law, cv, groups):
    identity = identity_table(groups, seed=3)
    for table in (law, cv, identity):
        assert list(table.columns[: len(TABLE_COLUMNS)]) == list(TABLE_COLUMNS)
        assert (table["seed"] == 3).all()
        assert (table["level"] == 0.95).all()
        assert table["n"].notna().all()
        assert table["method"].str.len().min() > 0
        assert not table.duplicated([c for c in (*TABLE_COLUMNS[:8], "estimand") if c in table]).any(), (
            "two rows with the same labels"
        )


def test_law_rows_are_the_functions_own_numbers(law, groups):
    g = next(s for s in groups if s.prompt_id == "p1" and s.target == "b")
    dev = fit_variance_law(g.lengths, deviations(g.gram), n_centred=40, dependence=deviation_dependence(g.gram))
    rng = lambda: generator(3, "p1", "neighbours")  # noqa: E731
    within = fit_exponent(
        g.lengths,
        within_length_variance(g.gram, g.lengths, rng=rng()),
        dependence=within_dependence(g.gram, g.lengths, rng=rng()),
        near=nearest_in_length(g.lengths, 5, rng=rng()),
    )
    where = {"prompt_id": "p1", "target": "b", "advantage": "score", "scope": "all responses"}
    for quantity, expected in (
        ("deviation_exponent", dev.exponent),
        ("deviation_scale", dev.scale),
        ("deviation_level", dev.level_at_reference),
        ("deviation_loglog_slope", dev.loglog_slope),
        ("deviation_line_r2", dev.line_r2),
        ("deviation_rank_correlation", dev.rank_correlation),
        ("within_exponent", within.exponent),
    ):
        row = only(law, quantity=quantity, **where)
        assert row["value"] == pytest.approx(expected.value, rel=1e-12), quantity
        assert row["low"] == pytest.approx(expected.low, rel=1e-12, nan_ok=True), quantity
    row = only(law, quantity="deviation_exponent", **where)
    assert (row["verdict"], row["n_needed"]) == (dev.verdict, dev.n_needed)
    difference = only(law, quantity="exponent_difference", **where)
    assert difference["value"] == pytest.approx(dev.exponent.value - within.exponent.value)
    assert only(law, quantity="deviation_level", **where)["reference_length"] == pytest.approx(dev.reference_length)


def test_law_covers_advantages_subsets_sum_and_pool(law):
    exponents = law[law["quantity"] == "deviation_exponent"]
    assert set(exponents["advantage"]) == {"score", "grpo"}
    assert set(exponents["target"]) == {"a", "b", "sum"}
    assert {"all responses", "reward 0", "reward 1"} <= set(exponents["scope"])
    assert exponents["verdict"].notna().all()
    pooled = pick(exponents, prompt_id=None, target="sum", advantage="grpo", scope="all responses")
    assert set(pooled["estimand"]) == {"these prompts", "prompts like these"}
    assert (pooled["clusters"] == 2).all()
    assert math.isnan(pooled[pooled["estimand"] == "prompts like these"]["value"].iloc[0])
    where = {"target": "sum", "advantage": "grpo", "scope": "all responses", "prompt_id": None}
    assert only(law, quantity="deviation_exponent_tau", **where)["value"] >= 0
    assert 0 <= only(law, quantity="within_heterogeneity_p", **where)["value"] <= 1


def test_subset_keeps_the_mean_of_all_responses(law, groups):
    g = next(s for s in groups if s.prompt_id == "p0" and s.target == "a")
    keep = g.rewards == 0
    d = deviations(g.gram)
    expected = fit_exponent(
        g.lengths[keep],
        d[keep],
        n_centred=40,
        mean_deviation=d.mean(),
        dependence=deviation_dependence(g.gram, subset=keep),
    )
    row = only(law, quantity="deviation_exponent", prompt_id="p0", target="a", advantage="score", scope="reward 0")
    assert row["value"] == pytest.approx(expected.exponent.value)
    assert row["high"] == pytest.approx(expected.exponent.high)
    assert row["n"] == keep.sum()


def test_cv_rows_are_the_functions_own_numbers(cv, groups):
    g = next(s for s in groups if s.prompt_id == "p0" and s.target == "a")
    rho, moments = aggregator_rho(
        g.gram, g.rewards, g.lengths, "dapo", permutations=64, rng=generator(3, "p0", "groups")
    )
    row = only(cv, quantity="rho", prompt_id="p0", target="a", rule="dapo")
    assert (row["value"], row["low"], row["high"]) == pytest.approx((rho.value, rho.low, rho.high))
    other = aggregator_rho(g.gram, g.rewards, g.lengths, "grpo", permutations=64, rng=generator(3, "p0", "groups"))[1]
    ratio = only(cv, quantity="cv_ratio", prompt_id="p0", target="a", rule="dapo")
    assert ratio["value"] == pytest.approx(
        math.sqrt((moments.same / moments.cross - 1) / (other.same / other.cross - 1))
    )
    assert set(pick(cv, quantity="rho", prompt_id="p0", target="a")["rule"]) == {"grpo", "dapo", "dr_grpo", "vl_norm"}
    zero = only(cv, quantity="cv", prompt_id="p0", target="a", rule="vl_norm", alpha=0.0)
    plain = only(cv, quantity="cv", prompt_id="p0", target="a", rule="dr_grpo")
    assert zero["value"] == pytest.approx(plain["value"])
    assert len(pick(cv, quantity="cv", prompt_id=None, target="sum", rule="grpo")) == 2
    # Two prompts say nothing of prompts like these, which is not silence.
    likes = pick(cv, prompt_id=None, target="sum", rule="dapo", estimand="prompts like these")
    assert set(likes["quantity"]) == {"rho", "cv", "cv_ratio"}
    assert set(likes["verdict"]) == {"unresolved"}
    assert likes["value"].isna().all()
    here = {"prompt_id": None, "target": "sum", "estimand": "these prompts"}
    assert only(cv, quantity="cv_ratio", **here, rule="dapo")["verdict"] in (
        "higher",
        "lower",
        "undetermined",
    )
    sides = {"higher": "holds", "lower": "violated", "undetermined": "undetermined", "unresolved": "undetermined"}
    for row in cv[cv["quantity"] == "cv_ratio"].to_dict("records"):
        if row["rule"] == "vl_norm" and row["alpha"] == 1.0:
            assert row["paper"] == "equal"
            inside = row["low"] >= 1 / 1.05 and row["high"] <= 1.05
            outside = row["high"] < 1 / 1.05 or row["low"] > 1.05
            assert row["holds"] == ("holds" if inside else "violated" if outside else "undetermined")
        else:
            assert (row["paper"], row["holds"]) == ("at least 1", sides[row["verdict"]])
    # The reference has no ratio to itself.
    assert pick(cv, quantity="cv_ratio", rule="grpo").empty


def test_sum_target_adds_grams(groups):
    targets = arrange(groups)
    assert list(targets) == ["a", "b", "sum"]
    np.testing.assert_allclose(targets["sum"]["p0"].gram, targets["a"]["p0"].gram + targets["b"]["p0"].gram)
    assert list(arrange([*groups, *[replace(g, target="sum") for g in groups if g.target == "a"]])) == ["a", "b", "sum"]
    assert list(arrange([g for g in groups if g.target == "a"])) == ["a"]


def same(one, two):
    pd.testing.assert_frame_equal(one.reset_index(drop=True), two.reset_index(drop=True))


def test_numbers_do_not_depend_on_other_prompts_and_repeat(groups, law, cv):
    alone = [g for g in groups if g.prompt_id == "p1"]
    same(pick(law_table(alone, seed=3), prompt_id="p1"), pick(law, prompt_id="p1"))
    same(pick(cv_table(alone, seed=3, permutations=64, alphas=(0.0, 1.0)), prompt_id="p1"), pick(cv, prompt_id="p1"))
    both = identity_table(groups, seed=3)
    same(pick(identity_table(alone, seed=3), prompt_id="p1"), pick(both, prompt_id="p1"))
    same(identity_table(groups, seed=3), both)
    assert not identity_table(groups, seed=4)["value"].equals(both["value"])


def test_unverified_are_kept_for_the_score_and_counted():
    (g,) = prompts(1, targets=("a",))
    rewards = g.rewards.copy()
    rewards[[3, 7]] = np.nan
    holes = replace(g, rewards=rewards)
    table = law_table([holes], seed=0, subsets=False)
    score = only(table, quantity="deviation_exponent", advantage="score")
    weighted = only(table, quantity="deviation_exponent", advantage="grpo")
    assert (score["n"], score["left_out"]) == (40, 0)
    assert (weighted["n"], weighted["left_out"]) == (38, 2)
    table = cv_table([holes], seed=0, permutations=16)
    assert set(table["left_out"]) == {2}
    assert set(table["n"]) == {38}


def test_all_rewards_equal_everywhere_is_said_and_score_rows_remain():
    silent = [replace(g, rewards=np.ones(40)) for g in prompts(2, targets=("a",))]
    law = law_table(silent, seed=0)
    weighted = law[law["advantage"] == "grpo"]
    assert set(weighted["quantity"]) == {"deviation_exponent", "within_exponent"}
    assert set(weighted["verdict"]) == {SILENT}
    assert set(weighted["prompt_id"]) == {"p0", "p1"}
    score = law[(law["advantage"] == "score") & (law["quantity"] == "deviation_exponent")]
    assert score[score["estimand"] == "these prompts"]["value"].notna().all()
    table = cv_table(silent, seed=0, permutations=16)
    assert set(table["quantity"]) == {"silent_share", "cv"}
    assert set(table[table["quantity"] == "cv"]["verdict"]) == {SILENT}
    assert (table[table["quantity"] == "silent_share"]["value"] == 1.0).all()
    assert identity_table(silent, seed=0)["value"].notna().all()


def test_one_silent_prompt_among_others():
    mixed = prompts(3, targets=("a",))
    mixed[1] = replace(mixed[1], rewards=np.zeros(40))
    table = cv_table(mixed, seed=0, permutations=32, rules=("grpo", "dapo"))
    assert only(table, quantity="cv", prompt_id="p1")["verdict"] == SILENT
    pooled = pick(table, quantity="rho", prompt_id=None, rule="grpo", estimand="these prompts").iloc[0]
    assert (pooled["clusters"], pooled["silent"], pooled["n"]) == (3, 1, 120)
    assert math.isfinite(pooled["value"])
    assert only(table, quantity="silent_share", prompt_id="p1")["value"] == 1.0
    law = law_table(mixed, seed=0, subsets=False)
    pooled = only(law, quantity="deviation_exponent", prompt_id=None, advantage="grpo", estimand="these prompts")
    assert (pooled["clusters"], pooled["n"]) == (2, 80)


def test_no_verified_response_at_all():
    (g,) = prompts(1, targets=("a",))
    empty = replace(g, rewards=np.full(40, np.nan))
    law = law_table([empty], seed=0)
    assert only(law, quantity="deviation_exponent", advantage="grpo")["verdict"] == SILENT
    assert math.isfinite(only(law, quantity="deviation_exponent", advantage="score")["value"])
    table = cv_table([empty], seed=0)
    assert set(table["quantity"]) == {"cv"}
    assert table["value"].isna().all()
    assert (table["left_out"] == 40).all()


def test_one_length_and_repeated_and_single_responses():
    (g,) = prompts(1, targets=("a",))
    row = only(
        law_table([replace(g, lengths=np.full(40, 7.0))], seed=0, subsets=False),
        quantity="deviation_exponent",
        advantage="score",
    )
    assert row["verdict"] == "undetermined"
    assert "one length" in row["method"]
    repeated = replace(g, gram=np.full((40, 40), 2.0))
    row = only(law_table([repeated], seed=0, subsets=False), quantity="deviation_exponent", advantage="score")
    assert math.isnan(row["value"])
    assert "identical" in row["method"]
    cv = cv_table([repeated], seed=0, permutations=16)
    assert cv["method"].notna().all()
    one = g.select(np.arange(1))
    row = only(law_table([one], seed=0), quantity="deviation_exponent", advantage="score")
    assert "fewer than 3" in row["method"]
    with pytest.raises(GradvarError, match="at least 16 verified"):
        cv_table([one], seed=0)
    row = only(identity_table([one], seed=0), quantity="identity_signal")
    assert (row["verdict"], row["n_needed"]) == ("undetermined", 2.0)
    assert "fewer than 2 responses" in row["method"]


@pytest.mark.parametrize("advantage", ["raw", "grpo"])
def test_one_response_with_all_of_the_gradient_is_not_fitted(advantage, capfd):
    """Under raw rewards one right answer among wrong ones: LAPACK refused its fit, and printed so."""
    one = prompts(1, targets=("a",))[0]
    right = replace(one, rewards=(np.arange(40) == 7).astype(float))
    assert len(form_table([right], advantage=advantage, rules=("grpo", "dapo"), seed=0))
    rows = pick(law_table([right], advantages_studied=(advantage,), seed=0), quantity="within_exponent")
    assert advantage != "raw" or rows["low"].isna().all()
    alone = np.zeros((40, 40))
    alone[7, 7] = 1.0
    lone = replace(one, gram=alone)
    fitted = law_table([lone], advantages_studied=("score",), subsets=False, seed=0)
    assert only(fitted, quantity="deviation_exponent")["n"] == 40
    assert math.isnan(only(identity_table([lone], seed=0), quantity="identity_signal")["low"])
    assert capfd.readouterr() == ("", "")


def test_raw_rewards_that_are_all_zero_or_unknown_are_silent_and_others_are_not():
    made = prompts(4, targets=("a",))
    rewards = (np.zeros(40), np.full(40, np.nan), np.ones(40), made[3].rewards)
    made = [replace(one, rewards=r) for one, r in zip(made, rewards, strict=True)]
    table = law_table(made, advantages_studied=("raw",), seed=0)
    told = [only(table, quantity="within_exponent", prompt_id=one.prompt_id, scope="all responses") for one in made]
    assert [row["verdict"] == SILENT for row in told] == [True, True, False, False]
    assert (
        only(table, quantity="within_exponent", prompt_id=None, estimand="these prompts", scope="all responses")["n"]
        == 80
    )


def test_too_few_for_one_prompt_only():
    pair = prompts(2, targets=("a",))
    pair[0] = pair[0].select(np.arange(12))
    table = cv_table(pair, seed=0, permutations=16, rules=("grpo",))
    row = only(table, quantity="cv", prompt_id="p0")
    assert row["verdict"] == "unresolved"
    assert "fewer than 16" in row["method"]
    assert row["n_needed"] == 24


def test_truncated_and_many_reward_values():
    (g,) = prompts(1, n=64, targets=("a",))
    rewards = np.random.default_rng(0).normal(size=64)
    scopes = set(law_table([replace(g, rewards=rewards, truncated=g.lengths > 300)], seed=0)["scope"])
    middle = f"{np.median(rewards):g}"
    assert scopes == {"all responses", "not truncated", f"reward at most {middle}", f"reward above {middle}"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("table", [alpha_table, cv_table, form_table, identity_table, law_table, planning_table])
def test_a_gram_that_is_not_finite_is_refused(groups, table, bad):
    """Not taken for a target without gradient, whose trace is not above 0 either."""
    gram = groups[0].gram.copy()
    gram[3, 3] = bad
    with pytest.raises(GradvarError, match="holds NaN or infinity"):
        table([replace(groups[0], gram=gram)], seed=0)


def test_refuses(groups):
    with pytest.raises(GradvarError, match="no prompts"):
        law_table([], seed=0)
    with pytest.raises(GradvarError, match="given twice"):
        identity_table([groups[0], groups[0]], seed=0)
    with pytest.raises(GradvarError, match="other responses"):
        law_table([groups[0], replace(groups[1], lengths=groups[1].lengths + 1)], seed=0)
    with pytest.raises(GradvarError, match="unknown rule"):
        cv_table(groups, rules=("x",), seed=0)
    with pytest.raises(GradvarError, match="unknown advantage"):
        cv_table(groups, advantage="x", seed=0)
    with pytest.raises(GradvarError, match="unknown advantage"):
        law_table(groups, advantages_studied=("x",), seed=0)
    with pytest.raises(GradvarError, match="at least one alpha"):
        cv_table(groups, alphas=(), seed=0)
    with pytest.raises(GradvarError, match="alpha must be"):
        cv_table(groups, alphas=(math.inf,), seed=0)
    with pytest.raises(GradvarError, match="group size 32"):
        cv_table(groups, group_size=32, seed=0)


@pytest.mark.slow
def test_eight_prompts_of_128_within_twenty_seconds():
    many = prompts(8, n=128, targets=tuple("abcdef"))
    start = time.process_time()
    law_table(many, seed=0)
    cv_table(many, seed=0)
    identity_table(many, seed=0)
    assert time.process_time() - start < 40, "CPU seconds, for 20 s on two cores"


def test_responses_that_would_settle_a_ratio_move_the_end_that_has_to_leave_one():
    study = CvStudy(
        target="a", prompts={}, left_out={"p": 0}, nothing={}, moments={}, advantage="grpo", group_size=8,
        level=0.95, seed=0,
    )  # fmt: skip

    def needed(value, low, high):
        ratio = Estimate(value=value, low=low, high=high, level=0.95, method="m", n=64, clusters=1, seed=0)
        row = ratio_row(study, (find_rule("dapo"), None), (find_rule("grpo"), None), ratio, ["p"])
        return row.extra["n_needed"]

    assert needed(1.2, 0.9, 1.3) == math.ceil(64 * (math.log(1.2 / 0.9) / math.log(1.2)) ** 2)
    assert needed(0.8, 0.5, 1.1) == math.ceil(64 * (math.log(1.1 / 0.8) / math.log(0.8)) ** 2)


@pytest.mark.parametrize("unit", [1e101, 1e-101])
def test_a_gram_beyond_float64_is_refused(unit):
    with pytest.raises(GradvarError, match=r"entries up to .*, expected 1e-100 to 1e\+100.*rescale it"):
        cv_table([replace(prompts(1, 12, ("a",))[0], gram=np.eye(12) * unit)], seed=0)
