"""How many responses carry the noise, and what has no interval where they are few."""

import math
from dataclasses import replace

import numpy as np
import pytest

from gradvar.estimators import form_table, law_table
from gradvar.estimators.advantages import advantages
from gradvar.estimators.carrying import effective_carrying, few_that_carry, least_under_a_line, together, unless_few
from gradvar.runs.records import Estimate
from tests.estimators import simulator
from tests.estimators.test_tables import only


def prompt(n, right, name="p", seed=2):
    one = simulator.prompt(name, n, rng=np.random.default_rng(seed), beta=1.0, signal=1.0)
    return replace(one, rewards=np.random.default_rng(seed).permutation(np.arange(n) < right).astype(float))


def test_effective_numbers_by_hand():
    """(sum A^2)^2 / sum A^4; with k of n right A^2 is (1 - k/n)^2 for them and (k/n)^2 for the others."""
    for n, k in ((10, 1), (64, 4), (64, 32), (16, 6)):
        p = k / n
        squares = [(1 - p) ** 2] * k + [p**2] * (n - k)
        expected = sum(squares) ** 2 / sum(s**2 for s in squares)
        rewards = (np.arange(n) < k).astype(float)
        for kind in ("grpo", "mean", "rloo"):
            assert effective_carrying(advantages(rewards, kind)) == pytest.approx(expected)
        assert effective_carrying(1e200 * advantages(rewards, "mean")) == pytest.approx(expected)
    assert effective_carrying(np.ones(7)) == pytest.approx(7.0)
    assert effective_carrying(np.zeros(7)) == 7.0
    assert effective_carrying(np.array([1.0] * 61 + [1.1] * 3)) > 63.0  # hardly different
    assert effective_carrying(np.array([10.0, *[np.sqrt(3.0)] * 3, *[0.1] * 60])) < 1.5  # one beside lesser ones
    assert together([4.0, 1.0, 2.5]) == 5.5  # each prompt spends one on its constant


@pytest.mark.parametrize(
    ("rewards", "few"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0]),
        ([0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [0]),
        ([1, 1, 0, 0, 0, 0, 0, 0, 0, 0], None),
        ([1, 0, 1, 0], None),
        ([1, 1, 1], None),
    ],
)
def test_who_carries_where_few_do(rewards, few):
    found = few_that_carry(advantages(rewards, "grpo"))
    assert (None if found is None else np.flatnonzero(found).tolist()) == few


def test_no_interval_says_why():
    given = {"level": 0.95, "method": "m", "n": 9, "clusters": 1, "seed": None}
    one = Estimate(value=1.0, low=0.5, high=1.5, **given)
    assert unless_few(one, 6.0) is one
    assert unless_few(one, None) is one
    found = unless_few(one, 5.94)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.value == 1.0
    assert found.method == "m; no interval, 5.9 responses carry the noise ((sum A^2)^2 / sum A^4), fewer than 6"
    assert "fewer than 15" in unless_few(one, 14.0, least_under_a_line(60)).method
    assert least_under_a_line(1000) == 20.0


QUANTITIES = ("exponent", "scale", "level", "curvature", "loglog_slope", "rank_correlation")


def test_a_law_with_few_right_responses():
    """Of 64 responses 5 right ones count as 5.9, 6 as 7.3, and only these give intervals; the score has its own."""
    told = {}
    for right in (5, 6):
        table = law_table([prompt(64, right)], advantages_studied=("score", "grpo"), subsets=False, seed=0)
        told |= {(right, row["advantage"], row["quantity"]): row for row in table.to_dict("records")}
    for what in ("deviation", "within"):
        for name in QUANTITIES:
            keys = ((5, "grpo"), (6, "grpo"), (5, "score"))
            few, enough, score = (told[*key, f"{what}_{name}"] for key in keys)
            assert math.isfinite(few["value"])
            assert math.isnan(few["low"])
            assert math.isnan(few["high"])
            assert math.isfinite(enough["low"])
            assert math.isfinite(score["low"])
        exponent = told[5, "grpo", f"{what}_exponent"]
        assert "5.9 responses carry the noise" in exponent["method"]
        assert exponent["verdict"] == "undetermined"
        assert exponent["n_needed"] == math.ceil(64 * 6 / effective_carrying(advantages(np.arange(64) < 5, "grpo")))
        assert exponent["n_needed_at_least"]
        assert not told[6, "grpo", f"{what}_exponent"]["n_needed_at_least"]
        # A line takes a quarter of all, or 20.
        assert math.isnan(told[6, "grpo", f"{what}_line_slope"]["low"])
        assert "fewer than 16" in told[6, "grpo", f"{what}_line_slope"]["method"]
        assert math.isfinite(told[5, "score", f"{what}_line_slope"]["low"])


def test_prompts_with_one_right_response_each_make_no_pooled_law():
    """Each spends one response on its own constant: 4 of 1 are none, and 2 of 6 are enough."""
    for count, right, bounded in ((4, 1, False), (2, 6, True)):
        groups = [prompt(64, right, f"p{k}", k) for k in range(count)]
        table = law_table(groups, advantages_studied=("grpo",), subsets=False, seed=0)
        for estimand in ("these prompts", "prompts like these"):
            row = only(table, quantity="within_exponent", prompt_id=None, estimand=estimand)
            assert math.isfinite(row["low"]) == (bounded and estimand == "these prompts"), (count, estimand)


def test_the_wrong_ones_alone_still_deviate_from_a_mean_that_few_right_ones_make():
    table = law_table([prompt(64, 2)], advantages_studied=("grpo",), seed=0)
    rows = {row["quantity"]: row for row in table[table["scope"] == "reward 0"].to_dict("records")}
    assert math.isnan(rows["deviation_exponent"]["low"])
    assert math.isfinite(rows["within_exponent"]["low"])


def test_form_2_with_few_right_responses():
    """A prompt's own rows, and pooled ratios, whose logs count alike; pooled CVs go by sums."""
    few, many = prompt(64, 3, "few"), prompt(64, 32, "many", 3)
    table = form_table([few, many], rules=("grpo", "dapo"), seed=0)
    rows = {}
    for name, bounded in (("few", False), ("many", True), (None, True)):
        rows[name] = row = only(
            table, quantity="cv_ratio_form_2", rule="dapo", prompt_id=name, estimand="these prompts"
        )
        assert math.isfinite(row["low"]) == math.isfinite(row["high"]) == bounded
        assert ("carry the noise" in row["method"]) != bounded
    # Pooled, the prompt without interval is left out.
    assert "without 1 of 2 prompts, which few responses carry" in rows[None]["method"]
    assert [rows[None][x] for x in ("value", "low", "high", "n")] == [
        rows["many"][x] for x in ("value", "low", "high", "n")
    ]
    none = form_table([few, replace(few, prompt_id="also")], rules=("grpo", "dapo", "vl_norm"), alphas=(0.0,), seed=0)
    assert math.isnan(
        only(none, quantity="cv_ratio_form_2", rule="dapo", prompt_id=None, estimand="these prompts")["low"]
    )
    # What equal weights make equal is so whoever carries.
    same = form_table([few], rules=("dr_grpo", "vl_norm"), alphas=(0.0,), reference="dr_grpo", seed=0)
    row = only(same, quantity="cv_ratio_form_2", rule="vl_norm", prompt_id="few")
    assert row["low"] == pytest.approx(1.0)
    assert row["high"] == pytest.approx(1.0)
    cv = {
        name: only(table, quantity="cv_form_2", rule="dapo", prompt_id=name, estimand="these prompts")
        for name in ("few", "many", None)
    }
    assert cv["few"]["verdict"] == "unresolved"
    assert (cv["few"]["low"], cv["few"]["high"]) == (0.0, math.inf)
    assert cv["few"]["n_needed"] == math.ceil(64 * 6 / effective_carrying(advantages(few.rewards, "grpo")))
    assert cv["few"]["n_needed_at_least"]
    for name in ("many", None):
        assert "carry the noise" not in cv[name]["method"]
    # Two prompts are too few for prompts like these, whoever carries.
    like = only(table, quantity="cv_form_2", rule="dapo", prompt_id=None, estimand="prompts like these")
    assert math.isnan(like["low"])
