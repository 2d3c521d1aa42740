"""DAPO's extras: the table's numbers are those of the tables that know one extra each."""

import math
from dataclasses import replace

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from gradvar.errors import GradvarError
from gradvar.estimators import alpha_table, cv_table, extras_table, find_rule, soft_overlong
from gradvar.estimators.extras import FILTERING, PUNISHMENT, SAMPLING
from gradvar.estimators.groups import draw_groups, group_coefficients, group_moments, loud_groups, silent_share
from gradvar.estimators.inputs import generator
from gradvar.estimators.update_products import reward_direction
from tests.estimators import simulator
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
    return extras_table(groups, rules=("grpo", "vl_norm"), alphas=(0.5,), buffer=BUFFER, **OPTIONS)


def updates(g, extra, advantage="grpo"):
    """Groups, coefficients of vl_norm(0.5) with one extra, and the groups kept, as the definitions have them."""
    drawn = draw_groups(48, 8, OPTIONS["permutations"], rng=generator(OPTIONS["seed"], g.prompt_id, "groups"))
    rewards = soft_overlong(g, buffer=BUFFER).rewards if extra == PUNISHMENT else g.rewards
    masked = g.truncated if extra == FILTERING else None
    options = {"advantage": advantage, "alpha": 0.5, "max_length": float(g.max_length), "masked": masked}
    kept = loud_groups(drawn, g.rewards) if extra == SAMPLING else None
    return drawn, group_coefficients(drawn, rewards, g.lengths, find_rule("vl_norm"), **options), kept


@pytest.mark.parametrize("prompt", ["p1", None])
@pytest.mark.parametrize("extra", ["none", FILTERING, PUNISHMENT, SAMPLING])
def test_cvs_are_those_of_the_definitions(table, groups, prompt, extra):
    mine = only(table, quantity="cv", rule="vl_norm", extra=extra, prompt_id=prompt)
    used = [g for g in groups if prompt in (None, g.prompt_id)]
    moments = [group_moments(g.gram, *updates(g, extra)) for g in used]
    rho = sum(m.cross for m in moments) / sum(m.same for m in moments)
    assert mine["value"] == pytest.approx(math.sqrt(1 / rho - 1))
    assert (mine["alpha"], mine["low"] < mine["value"] < mine["high"]) == (0.5, True)
    plain = only(table, quantity="cv", rule="vl_norm", extra="none", prompt_id=prompt)
    if extra != "none":
        ratio = only(table, quantity="cv_ratio", rule="vl_norm", extra=extra, prompt_id=prompt)
        assert ratio["value"] == pytest.approx(mine["value"] / plain["value"])
        assert ratio["low"] < ratio["value"] < ratio["high"]
    if extra in ("none", PUNISHMENT):
        changed = [soft_overlong(g, buffer=BUFFER) if extra == PUNISHMENT else g for g in groups]
        other = cv_table(changed, rules=("vl_norm",), alphas=(0.5,), **OPTIONS)
        other = only(other, quantity="cv", rule="vl_norm", prompt_id=prompt, estimand="these prompts")
        assert (mine["low"], mine["high"]) == pytest.approx((other["low"], other["high"]))


@pytest.mark.parametrize("advantage", ["grpo", "raw"])
def test_direction_under_dynamic_sampling(advantage):
    """E[ghat | loud] over pairs of loud groups and of any for grad J; each prompt given that a group is loud."""
    law = {"signal": 2.0, "drift": 1.0, "reward_slope": 1.0}
    few = [
        simulator.prompt(f"p{k}", 48, rng=np.random.default_rng([8, k]), target="a", p=p, **law)
        for k, p in enumerate((0.1, 0.5, 0.85))
    ]
    table = extras_table(few, rules=("vl_norm",), alphas=(0.5,), advantage=advantage, **OPTIONS)
    sums = {}
    for g in few:
        drawn, c, kept = updates(g, SAMPLING, advantage)
        aim = reward_direction(g.rewards, drawn)
        loud = 1 - silent_share(g.rewards, 8)
        parts = np.zeros(3)
        for p in range(len(drawn)):
            dense = np.zeros((2, 6, 48))
            np.put_along_axis(dense[0], drawn[p], c[p] * kept[p][:, None] / loud, axis=1)
            np.put_along_axis(dense[1], drawn[p], aim[p], axis=1)
            off = ~np.eye(6, dtype=bool)
            for k, (a, b) in enumerate(((0, 0), (0, 1), (1, 1))):
                parts[k] += (dense[a] @ g.gram @ dense[b].T)[off].mean() / len(drawn)
        sums[g.prompt_id] = parts
    sums[None] = sum(sums.values())
    for name, (own, mixed, aim) in sums.items():
        row = only(table, quantity="cosine", extra=SAMPLING, prompt_id=name)
        change = only(table, quantity="cosine_difference", extra=SAMPLING, prompt_id=name)
        plain = only(table, quantity="cosine", extra="none", prompt_id=name)
        expected = mixed / math.sqrt(own * aim)
        if math.isnan(row["value"]):  # 5 of 48 correct: no direction is told apart from none
            assert name == "p0"
            assert "unresolved" in row["method"]
            continue
        assert row["value"] == pytest.approx(min(expected, 1.0))
        if max(expected, plain["value"]) < 1:
            assert change["value"] == pytest.approx(expected - plain["value"])
        if advantage == "grpo" and name is not None:
            assert abs(change["value"]) < 1e-9  # a silent group's update is 0: the direction stays
            assert change["verdict"] == "undetermined"
        elif name in (None, "p2"):  # where groups are silent at a reward of 1
            assert abs(change["value"]) > 1e-6


def test_punishment_wakes_a_silent_prompt_which_counts():
    made = prompts(3, n=48, targets=("a",), signal=3.0)
    made[0] = replace(made[0], rewards=np.ones(48))
    table = extras_table(made, rules=("dapo",), buffer=BUFFER, **OPTIONS)
    silent = pick(table, prompt_id="p0", quantity="cv")
    assert set(silent["extra"].dropna()) == {PUNISHMENT}
    pooled = pick(table, prompt_id=None, quantity="cv").set_index("extra")
    assert pooled["clusters"].to_dict() == {"none": 3, FILTERING: 3, PUNISHMENT: 3, SAMPLING: 2}
    expected = cv_table([soft_overlong(g, buffer=BUFFER) for g in made], rules=("dapo",), reference="dapo", **OPTIONS)
    expected = only(expected, quantity="cv", prompt_id=None, estimand="these prompts")
    got = pooled.loc[PUNISHMENT]
    assert (got["value"], got["low"], got["high"]) == pytest.approx(
        (expected["value"], expected["low"], expected["high"])
    )
    dead = [replace(made[1], gram=np.zeros((48, 48))), made[2]]
    table = extras_table(dead, rules=("dapo",), buffer=BUFFER, **OPTIONS)
    assert only(table, prompt_id="p1", quantity="cv")["verdict"] == "no gradient: all are 0"


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


def test_shares_affected_have_intervals(table, groups):
    for extra, changed in (
        (FILTERING, groups[0].truncated),
        (PUNISHMENT, soft_overlong(groups[0], buffer=BUFFER).rewards < groups[0].rewards),
    ):
        row = only(table, quantity="affected", extra=extra, prompt_id="p0")
        ends = proportion_confint(int(changed.sum()), 48, method="wilson")
        assert (row["value"], row["low"], row["high"]) == pytest.approx((changed.mean(), *ends))
    row, silent = only(table, quantity="affected", extra=SAMPLING, prompt_id="p0"), groups[0].rewards
    assert row["value"] == pytest.approx(silent_share(silent, 8))
    assert row["low"] < row["value"] < row["high"]


def test_what_is_affected_and_what_is_not(groups):
    quiet = [replace(g, truncated=np.zeros(48, dtype=bool)) for g in groups]
    table = extras_table(quiet, rules=("dapo",), buffer=1, **OPTIONS)
    for extra in ("overlong filtering", "soft overlong punishment"):
        assert (pick(table, quantity="affected", extra=extra)["value"] == 0).all()
        np.testing.assert_allclose(pick(table, quantity="cv_ratio", extra=extra)["value"], 1.0, rtol=1e-12)
        np.testing.assert_allclose(pick(table, quantity="cosine_difference", extra=extra)["value"], 0.0, atol=1e-12)


def test_small_and_refused(groups):
    mixed = [groups[1].select(np.arange(20)), groups[2]]
    table = extras_table(mixed, **OPTIONS)
    assert "fewer than 24" in only(table, prompt_id="p1")["method"]
    assert math.isfinite(only(table, prompt_id="p2", quantity="cv", rule="grpo", extra="none")["value"])
    assert pick(table, prompt_id=None).empty
    with pytest.raises(GradvarError, match="alpha"):
        extras_table(groups, rules=("vl_norm",), alphas=(), **OPTIONS)
    with pytest.raises(GradvarError, match="buffer"):
        extras_table(groups, buffer=10**6, **OPTIONS)
