"""The table of efficiency, bias and pressure over alpha, and the sentence that recommends."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gradvar.errors import GradvarError
from gradvar.estimators import aggregator_rho, alpha_table, law_table, recommendation
from gradvar.estimators.inputs import generator
from tests.estimators.test_tables import only, pick, prompts, same


@pytest.fixture(scope="module")
def groups():
    return prompts(3, n=48, targets=("a",), signal=3.0)


@pytest.fixture(scope="module")
def table(groups):
    return alpha_table(groups, seed=1, grid=(0.0, 0.75, 1.0, 2.0), permutations=64)


def test_table_rows(table, groups):
    assert set(table["quantity"]) == {
        "eta",
        "cosine",
        "scale",
        "length_product",
        "length_pressure",
        "alpha_star_eta",
        "alpha_star_cv",
        "eta_ratio",
    }
    eta = pick(table, quantity="eta", prompt_id="p1")
    assert list(eta["rule"]) == ["grpo", "dapo", "dr_grpo"] + ["vl_norm"] * 4
    zero, plain = only(eta, rule="vl_norm", alpha=0.0), only(eta, rule="dr_grpo")
    assert zero["value"] == pytest.approx(plain["value"])
    star = only(table, quantity="alpha_star_eta", prompt_id=None)
    assert star["low"] <= star["value"] <= star["high"]
    assert star["clusters"] == 3
    # The same permutations as the CV table's: cos^2 rho.
    g = groups[1]
    below = 0
    for rule in ("grpo", "dapo", "dr_grpo"):
        rho, _ = aggregator_rho(g.gram, g.rewards, g.lengths, rule, permutations=64, rng=generator(1, "p1", "groups"))
        row = only(eta, rule=rule)
        angle = only(table, quantity="cosine", prompt_id="p1", rule=rule)
        assert -1 <= angle["low"] <= angle["value"] <= angle["high"] <= 1
        if angle["value"] < 1:
            assert row["value"] == pytest.approx(angle["value"] ** 2 * rho.value)
            below += 1
        else:
            assert row["value"] >= rho.value
    assert below


def test_a_further_alpha_has_rows_and_no_part_in_the_argmax(table, groups):
    more = alpha_table(groups, seed=1, grid=(0.0, 0.75, 1.0, 2.0), further=(0.3, 0.75), permutations=64)
    mine = more[~((more["rule"] == "vl_norm") & (more["alpha"] == 0.3))]
    assert len(mine) < len(more)
    same(mine, table)


def test_log_probs_give_entropy_pressure(groups):
    with_probs = [replace(g, log_probs=-g.lengths * 0.5) for g in groups]
    table = alpha_table(with_probs, seed=1, grid=(0.0, 1.0), permutations=32)
    both = [only(table, quantity=f"{q}_pressure", prompt_id="p0", rule="grpo")["value"] for q in ("length", "entropy")]
    # H's score is 0.5 L: half the length pressure.
    assert both[1] == pytest.approx(both[0] / 2)


def test_nothing_is_said_relative_to_a_gradient_that_is_not_told_from_zero():
    """grad J = 0: eta, cosine, scale and pressures are unresolved; the raw product keeps its interval."""
    group = prompts(count=1, n=48, signal=0.0)[0]
    table = alpha_table([group], seed=1, grid=(0.0, 1.0), permutations=64)
    rows = table[table["rule"] == "grpo"].set_index("quantity")
    for quantity in ("eta", "cosine", "scale", "length_pressure"):
        assert math.isnan(rows.loc[quantity, "value"]), quantity
        assert "unresolved" in rows.loc[quantity, "method"]
    assert rows.loc["length_product", "low"] < rows.loc["length_product", "value"] < rows.loc["length_product", "high"]
    assert rows.loc["length_product", "verdict"] == rows.loc["length_pressure", "verdict"]


def test_pressure_is_the_product_over_the_gain(table):
    raw = only(table, quantity="length_product", prompt_id="p1", rule="dapo")
    ratio = only(table, quantity="length_pressure", prompt_id="p1", rule="dapo")
    assert ratio["verdict"] == raw["verdict"]
    assert math.copysign(1.0, ratio["value"]) == math.copysign(1.0, raw["value"])


def test_silent_and_small_prompts_say_why(groups):
    silent = replace(groups[0], rewards=np.ones(48))
    small = groups[1].select(np.arange(20))
    table = alpha_table([silent, small, groups[2]], seed=1, grid=(0.0, 1.0), permutations=32)
    assert only(table, prompt_id="p0")["verdict"] == "silent: all rewards equal"
    assert "fewer than 24" in only(table, prompt_id="p1")["method"]
    # One prompt is left of three: the pooled rows are about it.
    pooled = only(table, quantity="alpha_star_eta", prompt_id=None)
    assert pooled["clusters"] == 1
    assert pooled["value"] == only(table, quantity="alpha_star_eta", prompt_id=groups[2].prompt_id)["value"]
    assert len(alpha_table([silent], seed=1)) == 1
    alone = alpha_table([small], seed=1)
    assert (list(alone["prompt_id"]), list(alone["verdict"])) == (["p1"], ["unresolved"])
    with pytest.raises(GradvarError, match="at least 16 verified"):
        alpha_table([groups[1].select(np.arange(15))], seed=1)
    with pytest.raises(GradvarError, match="ascending"):
        alpha_table(groups, grid=(1.0, 0.5), seed=1)


def test_recommendation_says_what_it_rests_on(table, groups):
    law = law_table(groups, seed=1, subsets=False, advantages_studied=["grpo"])
    table = pd.concat([table, law[law["quantity"] == "within_exponent"]], ignore_index=True)
    words = recommendation(table, target="a")
    assert words.startswith(("Use ", "The data cannot tell"))
    assert "L^-" in words
    star = table["quantity"] == "alpha_star_eta"
    lost = table.copy()
    lost.loc[star, ["value", "low", "high"]] = math.nan
    assert "cannot tell which alpha" in recommendation(lost, target="a")
    wide = table.copy()
    wide.loc[star, ["value", "low", "high"]] = [1.0, 0.0, 2.0]
    assert "cannot tell one alpha from another" in recommendation(wide, target="a")


def test_recommendation_says_that_all_prompts_are_silent(groups):
    silent = [replace(one, rewards=np.ones(48)) for one in groups]
    for several, said in ((silent, "each of the 3 prompts"), (silent[:1], "the one prompt")):
        words = recommendation(alpha_table(several, seed=1), target="a")
        assert words == (
            "No alpha can be recommended for a, grpo advantages in groups of 8: "
            f"in {said} all verified rewards are equal, so no response is better than another."
        )
    mixed = alpha_table([*silent[:2], groups[2].select(np.arange(20))], seed=1)
    words = recommendation(mixed, target="a")
    assert "2 prompts silent: all rewards equal; 1 prompt unresolved: fewer than 24 verified responses." in words


def test_prompts_like_these_leave_out_one_prompt_at_a_time():
    groups = prompts(5, n=32, targets=("a",), signal=3.0)
    options = {"rules": ("grpo",), "grid": (0.0, 1.0), "group_size": 4, "permutations": 32, "seed": 1}
    table = alpha_table(groups, **options)
    where = {"quantity": "cosine", "rule": "grpo", "prompt_id": None}
    row = only(table, **where, estimand="prompts like these")
    here = only(table, **where, estimand="these prompts")
    assert row["value"] == here["value"]
    # Delete-one-prompt jackknife by hand: the table of the other four, pooled.
    left = np.array(
        [
            only(alpha_table(groups[:q] + groups[q + 1 :], **options), **where, estimand="these prompts")["value"]
            for q in range(5)
        ]
    )
    error = math.sqrt(4 / 5 * ((left - left.mean()) ** 2).sum())
    assert row["high"] - row["value"] == pytest.approx(stats.t.ppf(0.975, 4) * error)
    assert row["n"] == 160
    eta = only(table, quantity="eta", rule="grpo", prompt_id=None, estimand="prompts like these")
    assert eta["low"] < eta["value"] < eta["high"] < 1
    star = only(table, quantity="alpha_star_eta", prompt_id=None, estimand="prompts like these")
    assert star["low"] <= star["value"] <= star["high"]
    few = alpha_table(groups[:3], **options)
    assert set(few["estimand"]) == {"these prompts"}
