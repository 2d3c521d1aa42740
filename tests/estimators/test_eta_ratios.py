"""Efficiency over that of the best vl_norm, and the sentence made of it."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks import calibration_truths
from gradvar.estimators import alpha_table, find_rule, law_table, recommendation
from gradvar.estimators.best_alpha import fine_alphas, spline
from gradvar.estimators.eta_ratios import _pairs_of_ratios
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import draw_groups, group_coefficients
from gradvar.estimators.pairs import covariance_of_kernels, mean_coefficients, pair_covariance
from gradvar.estimators.surplus import of_log_efficiency
from gradvar.estimators.update_products import products, reward_direction
from tests.estimators import simulator
from tests.estimators.test_tables import only, pick, prompts

GRID = (0.0, 0.75, 1.0, 2.0, 3.0)


@pytest.fixture(scope="module")
def groups():
    return prompts(5, n=64, targets=("a",), signal=3.0)


@pytest.fixture(scope="module")
def table(groups):
    return alpha_table(groups, seed=1, grid=GRID, permutations=64)


def test_a_ratio_is_that_of_the_etas_on_the_same_groups(table):
    for where in ({"prompt_id": "p1"}, {"prompt_id": None, "estimand": "these prompts"}):
        eta, ratio = (pick(table, quantity=q, **where).reset_index() for q in ("eta", "eta_ratio"))
        pd.testing.assert_frame_equal(eta[["rule", "alpha"]], ratio[["rule", "alpha"]])
        both = eta["value"] / ratio["value"]
        np.testing.assert_allclose(both, both.iloc[0], rtol=1e-9)  # eta of the best alpha
        assert both.iloc[0] >= pick(eta, rule="vl_norm")["value"].max() * (1 - 1e-9)
        star = only(table, quantity="alpha_star_eta", **where)
        assert set(ratio["against_alpha"]) == {star["value"]}
        assert (ratio["low"] <= ratio["value"]).all()
        assert (ratio["value"] <= ratio["high"]).all()


def test_the_best_alpha_on_the_grid_is_exactly_1_and_dr_grpo_is_alpha_0(groups):
    table = alpha_table(groups, seed=1, grid=(0.0, 1.0), permutations=64)
    pooled = pick(table, quantity="eta_ratio", prompt_id=None, estimand="these prompts")
    best = pooled["against_alpha"].iloc[0]
    if best in (0.0, 1.0):
        own = only(pooled, rule="vl_norm", alpha=best)
        assert (own["value"], own["low"], own["high"], own["verdict"]) == (1.0, 1.0, 1.0, "equal")
    zero, plain = only(pooled, rule="vl_norm", alpha=0.0), only(pooled, rule="dr_grpo")
    for end in ("value", "low", "high"):
        assert zero[end] == pytest.approx(plain[end], rel=1e-9)


def test_pairs_by_their_definition():
    """What pairs add to a log ratio of efficiencies, pooled over two prompts, kind by kind."""
    grid, size = (0.0, 1.0, 2.0), 4
    pool, covariances, slopes = [], [], []
    for q in range(2):
        rng = np.random.default_rng([8, q])
        n = 24 + 8 * q
        scores, rewards, lengths = simulator.draw(n, rng=rng, signal=3.0)
        groups = draw_groups(n, size, 40, rng=rng)
        variants = [("grpo", None), *(("vl_norm", a) for a in grid)]
        c = [
            group_coefficients(groups, rewards, lengths, find_rule(r), advantage="grpo", alpha=a, max_length=500.0)
            for r, a in variants
        ]
        kinds = np.stack([*c, reward_direction(rewards, groups)])
        gram = scores @ scores.T
        pool.append(products(gram, Layout(groups=groups, kinds=kinds, n_responses=n), 1))
        z = mean_coefficients(groups, kinds, n)
        covariances.append(pair_covariance(gram, z[:-1], z[-1]))
        slopes.append((gram, z))
    same, mixed = sum(p.same[0] for p in pool), sum(p.mixed[0, :, 0] for p in pool)
    weights = np.array([0.2, 0.9, -0.1])
    pairs = _pairs_of_ratios(of_log_efficiency(pool, sum(covariances), size), weights)
    for k in range(4):
        by = {j: -float(weights[j - 1]) if j else 0.0 for j in range(4)}
        by[k] += 1.0
        twice = 0.0
        for gram, z in slopes:
            # The same holds the pairs inside a group: (n - 1) / n of the kernel.
            kernel = sum(
                by[j] * gram * ((np.outer(z[j], z[-1]) + np.outer(z[-1], z[j])) / mixed[j])
                - by[j] * gram * np.outer(z[j], z[j]) * (size - 1) / size / same[j]
                for j in range(4)
            )
            twice += covariance_of_kernels(kernel[None])[0, 0]
        assert pairs[k] == pytest.approx(twice, rel=1e-8)


def test_pairing_tells_apart_what_the_intervals_of_eta_do_not(table):
    eta, ratio = (pick(table, quantity=q, prompt_id=None, estimand="these prompts") for q in ("eta", "eta_ratio"))
    one, two = (only(t, rule="vl_norm", alpha=0.75) for t in (eta, ratio))
    assert (two["high"] - two["low"]) / two["value"] < (one["high"] - one["low"]) / one["value"]


def test_without_a_signal_there_is_no_ratio():
    lost = prompts(1, n=48, targets=("a",), signal=0.0)
    table = alpha_table(lost, seed=3, grid=GRID, permutations=32)
    if math.isnan(only(table, quantity="alpha_star_eta")["value"]):
        ratios = pick(table, quantity="eta_ratio")
        assert ratios["value"].isna().all()
        assert set(ratios["verdict"]) == {"unresolved"}


def test_ratios_are_covered():
    """Exact moments of the law give the truth at the alpha that was chosen: 100 prompts of 64, bound at 93%."""
    law = {"beta": 1.0, "signal": 1.5}
    moments = calibration_truths.group_moments_of(law)
    logs = 2.0 * np.log(moments.mean @ moments.gradient) - np.log(moments.same)
    grid = calibration_truths.GRID
    values, _ = spline(grid)
    hits = dict.fromkeys(calibration_truths.RULES, 0)
    for t in range(100):
        one = simulator.prompt("p", 64, rng=np.random.default_rng([11, t]), **law)
        table = alpha_table([one], grid=grid, permutations=128, seed=t)
        ratios = pick(table, quantity="eta_ratio")
        best = ratios["against_alpha"].iloc[0]
        reference = logs[3:] @ values[:, int(np.argmin(np.abs(fine_alphas(grid) - best)))]
        for k, (rule, alpha) in enumerate(calibration_truths.RULES):
            row = only(ratios, rule=rule, alpha=alpha)
            truth = math.exp(logs[k] - reference)
            hits[rule, alpha] += bool(row["low"] * (1 - 1e-9) <= truth <= row["high"] * (1 + 1e-9))
    assert min(hits.values()) >= stats.binom.ppf(1e-4, 100, 0.93), hits


def said(table, star, **rows):
    """The sentence where the best alpha and some ratios are other numbers."""
    table = table.copy()
    where = table["quantity"] == "alpha_star_eta"
    table.loc[where, ["value", "low", "high"]] = star
    for name, (numbers, verdict) in rows.items():
        rule, _, alpha = name.partition("_at_")
        mine = (table["quantity"] == "eta_ratio") & (table["rule"] == rule)
        mine &= table["alpha"].isna() if not alpha else table["alpha"] == float(alpha.replace("_", "."))
        table.loc[mine, ["value", "low", "high"]] = numbers
        table.loc[mine, "verdict"] = verdict
    return recommendation(table, target="a")


LOWER = dict.fromkeys(("grpo", "dapo", "dr_grpo"), ((0.7, 0.6, 0.8), "lower"))


def test_the_sentence_names_its_updates(table):
    assert "grpo advantages in groups of 8" in said(table, (1.5, 1.0, 2.0), **LOWER)


def test_the_sentence_says_by_how_much_the_papers_alphas_are_worse(table):
    words = said(
        table,
        (2.0, 1.8, 2.4),
        vl_norm_at_0_75=((0.9, 0.85, 0.96), "lower"),
        vl_norm_at_1=((0.995, 0.992, 0.998), "lower"),
        **LOWER,
    )
    assert "the paper's 0.75 is measurably worse, by 10% of efficiency [4%, 15%]" in words
    assert "the paper's 1 is measurably worse, but by less than 1% (0.5% of efficiency [0.2%, 0.8%])" in words
    half = said(table, (0.9, 0.8, 1.4), vl_norm_at_0_75=((0.99, 0.97, 1.0), "undetermined"), **LOWER)
    assert (
        "the paper's 1 cannot be told apart from it, the paper's 0.75 lies outside, without a measurable loss" in half
    )


def test_the_sentence_weighs_the_other_rules(table):
    near = said(table, (1.5, 1.0, 2.0), **{**LOWER, "grpo": ((0.98, 0.93, 1.02), "undetermined")})
    assert "not told apart from the best vl_norm, by efficiency over its: grpo (0.98 [0.93, 1.02])" in near
    assert "dapo" not in near
    better = said(table, (1.5, 1.0, 2.0), **{**LOWER, "dapo": ((1.2, 1.1, 1.3), "higher")})
    assert better.startswith("Use dapo for layer" if "layer" in better else "Use dapo for a")
    assert "1.2 [1.1, 1.3] times that of vl_norm at its best alpha = 1.5 (1 to 2 fit as well)" in better


def test_the_sentence_says_where_the_interval_is_open(table):
    assert "open at the end: alphas were tried to 3 only" in said(table, (2.0, 1.0, 3.0), **LOWER)
    assert "alphas were tried from 0 only" in said(table, (0.5, 0.0, 1.0), **LOWER)
    assert "open" not in said(table, (1.5, 1.0, 2.0), **LOWER)
    assert "(0 to 3 all fit)" in said(table, (1.5, 0.0, 3.0), **LOWER)


def test_the_sentence_holds_the_exponent_that_stands_in_its_own_table(groups, table):
    law = law_table(groups, advantages_studied=["grpo"], subsets=False, seed=1)
    assert "L^-" not in recommendation(table, target="a")
    both = pd.concat([table, law[law["quantity"] == "within_exponent"]], ignore_index=True)
    assert "L^-" in recommendation(both, target="a")


def test_shares_of_a_response_do_not_change_with_scale(groups, table):
    scaled = alpha_table([replace(g, gram=9.0 * g.gram) for g in groups], seed=1, grid=GRID, permutations=64)
    one, two = (pick(t, quantity="eta_ratio")["value"].to_numpy() for t in (table, scaled))
    np.testing.assert_allclose(one, two, rtol=1e-9)
