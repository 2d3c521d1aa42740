import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gradvar.errors import GradvarError
from gradvar.estimators import alpha_table, cv_table, planning_table
from gradvar.estimators.enough import responses_for_cv_1
from gradvar.estimators.planning import extrapolated_cv, parse_variant
from gradvar.estimators.silent_shares import share_interval
from gradvar.runs.records import Estimate
from tests.estimators import references
from tests.estimators.test_tables import only, pick, prompts


@pytest.fixture(scope="module")
def groups():
    return prompts(2, n=96, targets=("a",), signal=3.0)


def test_rows_agree_with_the_cv_table_and_extrapolate_by_the_square_root(groups):
    table = planning_table(groups, sizes=(8, 16, 32, 64), permutations=64, seed=4)
    row = only(table, quantity="cv", prompt_id="p0", group_size=8)
    other = only(cv_table(groups, rules=("grpo",), permutations=64, seed=4), quantity="cv", prompt_id="p0")
    assert (row["value"], row["low"], row["high"]) == pytest.approx((other["value"], other["low"], other["high"]))
    at32 = only(table, quantity="cv", prompt_id="p0", group_size=32)
    far = only(table, quantity="cv", prompt_id="p0", group_size=64)
    assert far["verdict"] == "extrapolated"
    assert far["method"].startswith("extrapolated from n = 32")
    assert far["value"] == pytest.approx(at32["value"] / math.sqrt(2))
    # A group of 8 is enough already: no smaller number is made up from larger groups.
    needed = only(table, quantity="responses_for_cv_1", prompt_id="p0")
    assert row["value"] < 1
    assert (needed["value"], needed["low"], needed["verdict"]) == (8, 2, "at most")
    assert needed["high"] == pytest.approx(max(8, 8 * row["high"] ** 2))
    assert not pick(table, quantity="cv", prompt_id=None, group_size=8).empty


def test_a_pool_goes_as_far_as_its_smallest_prompt_and_names_it(groups):
    small = replace(groups[1].select(np.arange(30)), prompt_id="small")
    table = planning_table([groups[0], small], sizes=(4, 8, 16, 64), permutations=32, seed=4)
    for quantity in ("cv", "eta"):
        rows = pick(table, quantity=quantity, prompt_id=None, estimand="these prompts").set_index("group_size")
        assert (rows["clusters"] == 2).all()
        far = rows.loc[[16, 64], "method"]
        assert far.str.startswith("extrapolated from n = 8").all()
        assert far.str.contains("as prompt small with 30 responses holds three groups of no larger one").all()
        assert not rows.loc[[4, 8], "method"].str.contains("extrapolated").any()
    own = pick(table, prompt_id="p0", quantity="cv").set_index("group_size")["method"]
    assert "extrapolated" not in own[16]
    assert own[64].startswith("extrapolated from n = 16, CV^2 as 1/n, ends as n CV^2 changed;")
    # Where every prompt ends there, no one ends it.
    both = planning_table(groups, sizes=(8, 64), permutations=32, seed=4)
    assert not both["method"].str.contains("no larger one").any()


def test_ends_of_an_extrapolated_cv_go_on_as_n_cv_square_changed():
    """n CV^2 = a + b/n through the two largest sizes."""

    def cv(size, a, b):
        value = math.sqrt((a + b / size) / size)
        return Estimate(
            value=value, low=0.9 * value, high=1.2 * value, level=0.95, method="m", n=96, clusters=1, seed=0
        )

    for b in (5.0, -5.0):
        measured = {4: cv(4, 50.0, 50.0), 8: cv(8, 2.0, b), 16: cv(16, 2.0, b)}
        for n in (32, 64):
            far = extrapolated_cv(measured, n)
            same, true = measured[16].value * math.sqrt(16 / n), cv(n, 2.0, b).value
            assert far.value == pytest.approx(same)
            assert (far.low, far.high) == pytest.approx((0.9 * min(same, true), 1.2 * max(same, true)))
    # A size nearer than half of the largest tells noise, not b.
    near = {8: cv(8, 2.0, 5.0), 15: cv(15, 9.0, 5.0), 16: cv(16, 2.0, 5.0)}
    assert extrapolated_cv(near, 64) == extrapolated_cv({8: near[8], 16: near[16]}, 64)
    assert extrapolated_cv({15: near[15], 16: near[16]}, 64) == extrapolated_cv({16: near[16]}, 64)
    alone = extrapolated_cv({16: cv(16, 2.0, 5.0)}, 64)
    assert (alone.low, alone.high) == pytest.approx((0.45 * cv(16, 2.0, 5.0).value, 0.6 * cv(16, 2.0, 5.0).value))
    # Beyond 0 nothing goes on.
    assert extrapolated_cv({8: cv(8, 0.1, 50.0), 16: cv(16, 0.1, 1.0)}, 64).low == 0.0
    unresolved = replace(cv(8, 2.0, 5.0), value=math.nan, high=math.inf)
    far = extrapolated_cv({8: unresolved, 16: cv(16, 2.0, 5.0)}, 64)
    assert far.low == pytest.approx(0.45 * cv(16, 2.0, 5.0).value)


def test_what_is_extrapolated_from_an_unresolved_cv_is_unresolved():
    noise = prompts(1, n=48, targets=("a",), signal=0.0)
    table = planning_table(noise, sizes=(8, 16, 32, 64), permutations=32, seed=4)
    far = pick(table, quantity="cv")
    far = far[far["group_size"] > 16]
    assert len(far) == 2
    assert far["value"].isna().all()
    assert set(far["verdict"]) == {"unresolved"}


def test_responses_for_cv_1_rest_on_the_size_that_is_just_enough():
    def cv(value, low, high):
        return Estimate(value=value, low=low, high=high, level=0.95, method="m", n=96, clusters=1, seed=0)

    measured = {4: cv(1.6, 1.4, 2.0), 8: cv(0.9, 0.7, 1.2), 16: cv(0.5, 0.4, 0.6)}
    size, needed, verdict = responses_for_cv_1(measured)
    assert (size, verdict) == (8, "resolved")
    assert (needed.value, needed.low, needed.high) == pytest.approx((8 * 0.81, 4, 8 * 1.44))  # 4 is surely too few
    # Where 8 would be enough by far, 4 is not: at least 4.
    size, needed, _ = responses_for_cv_1({4: cv(1.05, 0.9, 1.2), 8: cv(0.6, 0.5, 0.8)})
    assert (size, needed.value) == (8, 4)
    assert needed.low == pytest.approx(8 * 0.25)  # it may be enough
    # Nothing is known of the size below.
    size, needed, _ = responses_for_cv_1({4: cv(math.nan, 0.5, math.inf), 8: cv(0.6, 0.5, 0.8)})
    assert needed.value == pytest.approx(8 * 0.36)
    # None is enough: on from the largest.
    size, needed, _ = responses_for_cv_1({4: cv(5.0, 4.0, 7.0), 8: cv(3.0, 2.0, 5.0)})
    assert (size, needed.value, needed.high) == (8, 72, 200)
    size, needed, verdict = responses_for_cv_1({4: cv(0.8, 0.5, math.inf)})
    assert (needed.value, needed.low, needed.high, verdict) == (4, 2, math.inf, "at most")
    none = cv(math.nan, 0.5, math.inf)
    assert responses_for_cv_1({4: none, 8: none})[2] == "unresolved"


def test_eta_is_the_alpha_tables_and_goes_on_beyond(groups):
    table = planning_table(groups, sizes=(8, 16, 32, 64), permutations=64, seed=4)
    other = alpha_table(groups, rules=("grpo",), permutations=64, seed=4)
    table = table[table["estimand"] == "these prompts"]
    for prompt in ("p0", "p1", None):
        row = only(table, quantity="eta", prompt_id=prompt, group_size=8)
        same = only(other, quantity="eta", prompt_id=prompt, rule="grpo")
        assert (row["value"], row["low"], row["high"]) == pytest.approx((same["value"], same["low"], same["high"]))
        assert row["verdict"] == "resolved"
    far = only(table, quantity="eta", prompt_id=None, group_size=64)
    assert far["verdict"] == "extrapolated"
    assert far["method"].startswith("extrapolated from n = 32")
    assert far["value"] > only(table, quantity="eta", prompt_id=None, group_size=32)["value"]
    assert far["low"] < far["value"] < far["high"]


def test_extrapolated_eta_by_its_formula():
    """Estimated at n = 128 from 600 responses, extrapolated to it from 120 of them.

    One length, two rewards whose scores point apart: grad J is p (1 - p) (m1 - m0).
    """
    rng = np.random.default_rng(1)
    base = prompts(1, n=600, targets=("a",))[0]
    rewards = (rng.random(600) < 0.5).astype(float)
    scores = rng.normal(size=(600, 10)) * 0.5
    scores[:, 0] += np.where(rewards == 1, 1.0, -1.0)
    one = replace(
        base,
        gram=scores @ scores.T,
        rewards=rewards,
        lengths=np.full(600, 9.0),
        truncated=np.zeros(600, dtype=bool),
    )
    near = planning_table([one], sizes=(8, 128), advantage="mean", permutations=128, seed=0)
    far = planning_table([one.select(np.arange(120))], sizes=(8, 128), advantage="mean", permutations=128, seed=0)
    estimated, extrapolated = (only(t, quantity="eta", group_size=128) for t in (near, far))
    assert (estimated["verdict"], extrapolated["verdict"]) == ("resolved", "extrapolated")
    assert extrapolated["value"] == pytest.approx(estimated["value"], abs=0.02)
    assert only(near, quantity="eta", group_size=8)["value"] < estimated["value"]


def test_eta_without_a_direction_is_unresolved():
    table = planning_table(prompts(1, n=48, targets=("a",), signal=0.0), sizes=(8, 64), permutations=32, seed=0)
    eta = table[table["quantity"] == "eta"]
    assert set(eta["verdict"]) == {"unresolved"}
    assert eta["value"].isna().all()


def test_the_square_root_law_holds_where_nothing_else_changes(groups):
    """A = 1 after a raw reward of 1 and one length: ghat is a mean of n draws, so CV^2 n does not depend on n."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(240, 20)) + 0.5
    one = replace(
        groups[0],
        gram=scores @ scores.T,
        rewards=np.where(np.arange(240) == 0, 1.0 + 1e-9, 1.0),
        lengths=np.full(240, 9.0),
        truncated=np.zeros(240, dtype=bool),
    )
    table = planning_table([one], sizes=(4, 8, 16, 64), advantage="raw", permutations=128, seed=0)
    scale = [only(table, quantity="cv", group_size=n)["value"] ** 2 * n for n in (4, 8, 16, 64)]
    # tr Sigma / ||m||^2 = 20 / (20 * 0.25) = 4
    assert scale == pytest.approx([4.0] * 4, rel=0.25)
    assert scale[0] == pytest.approx(scale[2], rel=0.05)


def test_silent_share_and_silent_prompts(groups):
    small = groups[0].select(np.arange(30))
    table = planning_table([small, replace(groups[1], rewards=np.ones(96))], sizes=(2, 4), permutations=16, seed=0)
    share = only(table, quantity="silent_share", group_size=4, prompt_id="p0")
    assert share["value"] == pytest.approx(references.silent_share(list(small.rewards), 4))
    assert share["low"] < share["value"] < share["high"]
    assert only(table, prompt_id="p1")["verdict"] == "silent: all rewards equal"


def test_prompts_without_three_groups_of_any_size_are_unresolved(groups):
    table = planning_table(groups, sizes=(64,), seed=0)
    cv = table[table["quantity"] == "cv"]
    assert list(cv["prompt_id"]) == [group.prompt_id for group in groups]
    assert (cv["verdict"] == "unresolved").all()
    assert cv["method"].str.contains("fewer than 192 verified responses").all()
    assert set(table["quantity"]) <= {"cv", "silent_share"}


def test_refuses(groups):
    with pytest.raises(GradvarError, match="at least 2"):
        planning_table(groups, sizes=(1,), seed=0)
    with pytest.raises(GradvarError, match="alpha"):
        planning_table(groups, rule="vl_norm", seed=0)


def test_equal_rewards_are_silent_only_where_the_advantage_is_zero(groups):
    """Raw rewards of 1, and the score, leave an update where no group advantage does."""
    equal = replace(groups[0], rewards=np.ones(len(groups[0].rewards)))
    for advantage, silent in (("grpo", True), ("raw", False), ("score", False)):
        table = planning_table([equal], sizes=(4,), advantage=advantage, permutations=32, seed=0)
        assert (set(table["verdict"].dropna()) == {"silent: all rewards equal"}) == silent
        assert ("eta" in set(table["quantity"])) != silent
    unknown = replace(equal, rewards=np.full(len(equal.rewards), np.nan))
    table = planning_table([unknown], sizes=(4,), advantage="score", permutations=32, seed=0)
    assert only(table, quantity="cv")["verdict"] == "silent: all rewards equal"


def test_silent_share_over_prompts_counts_silent_ones(groups):
    several = [replace(g, prompt_id=f"q{k}") for k, g in enumerate([groups[0], groups[1], groups[0], groups[1]])]
    several[3] = replace(several[3], rewards=np.ones(len(several[3].rewards)))
    table = planning_table(several, sizes=(4,), permutations=16, seed=0)
    row = only(table, quantity="silent_share", group_size=4, prompt_id=None, estimand="prompts like these")
    shares = np.array([references.silent_share(list(s.rewards), 4) for s in several])
    assert row["value"] == pytest.approx(shares.mean())
    assert (row["low"], row["high"]) == pytest.approx(share_interval(shares, 0.95))
    assert 0.0 < row["low"] < row["value"] < row["high"] < 1.0


def test_prompts_like_these_by_leaving_out_prompts():
    """CV, noise scale and eta of four prompts: the jackknife over prompts, from the rows of prompts left out."""
    groups = prompts(4, n=48, targets=("a",), signal=3.0)
    table = planning_table(groups, sizes=(8, 16, 32), permutations=32, seed=1)
    fewer = [planning_table(groups[:k] + groups[k + 1 :], sizes=(8, 16), permutations=32, seed=1) for k in range(4)]
    assert (
        fewer[0][(fewer[0]["estimand"] == "prompts like these") & (fewer[0]["quantity"] != "silent_share")]["value"]
        .isna()
        .all()
    )

    def row(quantity, size, of=table, estimand="prompts like these"):
        return only(of, quantity=quantity, group_size=size, prompt_id=None, estimand=estimand)

    def half(values):
        return stats.t.ppf(0.975, 3) * math.sqrt(3 / 4 * sum((v - sum(values) / 4) ** 2 for v in values))

    at16 = row("cv", 16)
    here = row("cv", 16, estimand="these prompts")
    assert at16["value"] == pytest.approx(here["value"])
    rho = 1 / (1 + here["value"] ** 2)
    wide = half([1 / (1 + row("cv", 16, of, "these prompts")["value"] ** 2) for of in fewer])
    ends = [1 - (1 - rho) * math.exp(side * wide / (1 - rho)) for side in (-1, 1)]
    low, high = (math.sqrt(1 / end - 1) for end in ends)
    # Never narrower than for these prompts.
    assert (at16["low"], at16["high"]) == pytest.approx((min(low, here["low"]), max(high, here["high"])))
    at8, needed = row("cv", 8), row("responses_for_cv_1", 8)
    assert at8["value"] < 1
    assert (needed["value"], needed["verdict"]) == (8, "at most")
    assert needed["high"] == pytest.approx(max(8, 8 * at8["high"] ** 2))
    change = (8 * at8["value"] ** 2 / (16 * at16["value"] ** 2) - 1) / (1 / 8 - 1 / 16) * (1 / 32 - 1 / 16)
    assert row("cv", 32)["high"] == pytest.approx(at16["high"] * math.sqrt(max(1 + change, 1) / 2))
    assert row("cv", 32)["low"] == pytest.approx(at16["low"] * math.sqrt(min(1 + change, 1) / 2))
    assert row("cv", 32)["verdict"] == "extrapolated"

    eta = row("eta", 16)
    logs = [math.log(1 - row("eta", 16, of, "these prompts")["value"]) for of in fewer]
    whole = math.log(1 - row("eta", 16, estimand="these prompts")["value"])
    bias = 3 * (sum(logs) / 4 - whole)
    assert eta["value"] == pytest.approx(1 - math.exp(whole))
    own = row("eta", 16, estimand="these prompts")
    assert eta["low"] == pytest.approx(min(1 - math.exp(whole + half(logs) - min(bias, 0)), own["low"]))
    assert eta["high"] == pytest.approx(max(1 - math.exp(whole - half(logs) - max(bias, 0)), own["high"]))


def test_further_rules_have_the_rows_that_they_have_alone(groups):
    options = {"sizes": (8, 16, 64), "permutations": 32, "seed": 4}
    both = planning_table(groups, rule="grpo", further=[("vl_norm", 1.0)], **options)
    alone = planning_table(groups, rule="vl_norm", alpha=1.0, **options)
    mine = pick(both, rule="vl_norm").reset_index(drop=True)
    theirs = alone[alone["quantity"] != "silent_share"].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, theirs, rtol=1e-9)
    assert set(pick(both, quantity="silent_share")["rule"]) == {"grpo"}


def test_a_planned_rule_is_its_name_with_an_alpha_where_it_takes_one():
    assert parse_variant("grpo") == ("grpo", None)
    assert parse_variant("vl_norm:0.75") == ("vl_norm", 0.75)
    for text, words in (
        ("vl_norm", "vl_norm:1"),
        ("grpo:1", "takes no alpha"),
        ("vl_norm:x", "received"),
        ("gro", "grpo"),
    ):
        with pytest.raises(GradvarError, match=words):
            parse_variant(text)
