"""DAPO's extras: the table's numbers are those of the tables that know one extra each."""

import math
from dataclasses import replace

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.estimators import alpha_table, cv_table, extras_table, soft_overlong
from tests.estimators.test_tables import only, pick, prompts

OPTIONS = {"permutations": 48, "seed": 3}
BUFFER = 2800


@pytest.fixture(scope="module")
def groups():
    made = prompts(3, n=48, targets=("a",), signal=3.0)
    # The longest fifth is cut, so that filtering and punishment both act.
    return [replace(g, truncated=g.lengths >= np.quantile(g.lengths, 0.8)) for g in made]


@pytest.fixture(scope="module")
def table(groups):
    return extras_table(groups, rules=("grpo", "dr_grpo"), buffer=BUFFER, **OPTIONS)


@pytest.mark.parametrize("prompt", ["p1", None])
@pytest.mark.parametrize("extra", ["none", "overlong filtering", "soft overlong punishment", "dynamic sampling"])
def test_cvs_are_those_of_the_cv_table(table, groups, prompt, extra):
    if extra == "soft overlong punishment":
        expected = cv_table([soft_overlong(g, buffer=BUFFER) for g in groups], **OPTIONS)
    else:
        on = {"overlong filtering": "overlong_filtering", "dynamic sampling": "dynamic_sampling"}
        expected = cv_table(groups, **{on[extra]: True} if extra in on else {}, **OPTIONS)
    mine = only(table, quantity="cv", rule="dr_grpo", extra=extra, prompt_id=prompt)
    other = only(expected, quantity="cv", rule="dr_grpo", prompt_id=prompt, estimand="these prompts")
    for column in ("value", "low", "high"):
        assert mine[column] == pytest.approx(other[column], nan_ok=True), column
    plain = only(table, quantity="cv", rule="dr_grpo", extra="none", prompt_id=prompt)
    if extra != "none":
        ratio = only(table, quantity="cv_ratio", rule="dr_grpo", extra=extra, prompt_id=prompt)
        assert ratio["value"] == pytest.approx(mine["value"] / plain["value"])
        assert ratio["low"] < ratio["value"] < ratio["high"]


def test_direction_is_judged_by_the_plain_reward(table, groups):
    alpha = alpha_table(groups, rules=("grpo",), grid=(0.0, 1.0), **OPTIONS)
    expected = only(alpha, quantity="cosine", rule="grpo", prompt_id="p2")
    mine = pick(table, quantity="cosine", rule="grpo", prompt_id="p2").set_index("extra")
    assert mine.loc["none", "value"] == pytest.approx(expected["value"])
    # A cosine estimated above 1 is given as 1, the paired difference as it was estimated.
    checked = 0
    moving = {"signal": 1.5, "drift": 0.8, "reward_slope": 1.0, "beta": 2.0}
    weak = [replace(g, truncated=g.lengths >= 250) for g in prompts(3, n=48, targets=("a",), **moving)]
    other = extras_table(weak, rules=("grpo",), buffer=BUFFER, **OPTIONS)
    for prompt in ("p0", "p1", "p2", None):
        angles = pick(other, quantity="cosine", rule="grpo", prompt_id=prompt).set_index("extra")["value"]
        for extra in ("overlong filtering", "soft overlong punishment"):
            change = only(other, quantity="cosine_difference", rule="grpo", prompt_id=prompt, extra=extra)
            if max(angles[extra], angles["none"]) < 1:
                assert change["value"] == pytest.approx(angles[extra] - angles["none"])
                checked += 1
    assert checked
    assert pick(table, quantity="cosine", extra="dynamic sampling").empty


def test_what_is_affected_and_what_is_not(groups):
    quiet = [replace(g, truncated=np.zeros(48, dtype=bool)) for g in groups]
    table = extras_table(quiet, rules=("dapo",), buffer=1, **OPTIONS)
    for extra in ("overlong filtering", "soft overlong punishment"):
        assert (pick(table, quantity="affected", extra=extra)["value"] == 0).all()
        np.testing.assert_allclose(pick(table, quantity="cv_ratio", extra=extra)["value"], 1.0, rtol=1e-12)
        np.testing.assert_allclose(pick(table, quantity="cosine_difference", extra=extra)["value"], 0.0, atol=1e-12)


def test_silent_small_and_refused(groups):
    mixed = [replace(groups[0], rewards=np.ones(48)), groups[1].select(np.arange(20)), groups[2]]
    table = extras_table(mixed, **OPTIONS)
    assert only(table, prompt_id="p0")["verdict"] == "silent: all rewards equal"
    assert "fewer than 24" in only(table, prompt_id="p1")["method"]
    assert math.isfinite(only(table, prompt_id="p2", quantity="cv", rule="grpo", extra="none")["value"])
    assert pick(table, prompt_id=None).empty
    with pytest.raises(GradvarError, match="alpha"):
        extras_table(groups, rules=("vl_norm",), **OPTIONS)
    with pytest.raises(GradvarError, match="buffer"):
        extras_table(groups, buffer=10**6, **OPTIONS)
