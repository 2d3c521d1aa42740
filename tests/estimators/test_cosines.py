"""Cosines near 1, where the estimate's own error vanishes with the angle."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from benchmarks.calibration import law_of, truths_of
from benchmarks.calibration_draws import every_interval
from gradvar.estimators.aggregation import find_rule
from gradvar.estimators.bias import cosine, estimate_of, jackknifed
from gradvar.estimators.cosines import cosine_estimate, error_further_away, within_one
from gradvar.estimators.few_affected import FewAffected, turn_of_further
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import draw_groups, group_coefficients
from gradvar.estimators.intervals import jackknife_variance
from gradvar.estimators.pairs import WeightedKernels
from gradvar.estimators.update_products import products, reward_direction
from gradvar.runs.records import Estimate
from tests.estimators import simulator

MOVING = "beta 1, mean moves with L"


def made(n, seed, rules=("grpo", "dapo"), **law):
    rng = np.random.default_rng(seed)
    scores, rewards, lengths = simulator.draw(n, rng=rng, **law)
    groups = draw_groups(n, 8, 64, rng=rng)
    kinds = [
        group_coefficients(groups, rewards, lengths, find_rule(r), advantage="grpo", alpha=None, max_length=None)
        for r in rules
    ]
    layout = Layout(groups=groups, kinds=np.stack([*kinds, reward_direction(rewards, groups)]), n_responses=n)
    return products(scores @ scores.T, layout, 1)


def test_a_cosine_stays_within_one():
    def cosine_of(value, low, high):
        found = Estimate(value=value, low=low, high=high, level=0.95, method="m", n=64, clusters=1, seed=None)
        return within_one(found)

    # Told apart from parallel: Fisher's scale, ends inside (-1, 1), nearly the same interval where it is narrow.
    inside = cosine_of(0.9, 0.85, 0.95)
    assert 0.8 < inside.low < 0.85
    assert 0.9 < inside.high < 0.95
    narrow = cosine_of(0.5, 0.499, 0.501)
    assert (narrow.low, narrow.high) == pytest.approx((0.499, 0.501), abs=1e-5)
    # Not told apart from it: a lower bound.
    apart = cosine_of(1.02, 0.97, 1.07)
    assert (apart.value, apart.low, apart.high) == (1.0, 0.97, 1.0)
    assert math.isnan(cosine_of(math.nan, -math.inf, math.inf).value)
    # Wholly beyond: no interval of width 0.
    beyond = cosine_of(1.1, 1.05, 1.2)
    assert (beyond.value, beyond.low, beyond.high) == pytest.approx((1.0, 0.95, 1.0))
    below = cosine_of(-1.1, -1.2, -1.05)
    assert (below.value, below.low, below.high) == pytest.approx((-1.0, -1.0, -0.95))
    # Without an interval nothing is known of a value beyond.
    assert math.isnan(cosine_of(2.7, math.nan, math.nan).value)
    assert cosine_of(0.7, math.nan, math.nan).value == 0.7


def test_traces_are_what_products_with_oneself_add():
    rng = np.random.default_rng(0)
    scores, weights = rng.normal(size=(7, 3)), rng.normal(size=(2, 7))
    kernels = WeightedKernels(gram=scores @ scores.T, weights=weights, first=np.array([0, 0]), second=np.array([0, 1]))
    expected = []
    for z, w in ((weights[0], weights[0]), (weights[0], weights[1])):
        h = (z[:, None] * scores) @ (w[:, None] * scores).T
        others = [h[i, j] for i in range(7) for j in range(7) if i != j]
        expected.append(h.mean() - np.mean(others))
    assert kernels.traces() == pytest.approx(np.array(expected))


def test_own_is_by_how_much_a_plug_in_cosine_is_lower():
    """A plug-in estimate takes the same means with each response's product with itself in them."""
    one = made(400, 1, beta=1.0, signal=3.0, drift=0.3, reward_slope=-0.7)
    result = jackknifed([one], cosine)
    more = one.traces
    plug_in = cosine(one.same[0], one.cross[0] + more[:, 1], one.mixed[0] + more[:, 2:3], one.direction[0] + more[0, 3])
    lower = (result.value - plug_in) / result.own
    assert lower == pytest.approx(np.ones(2), abs=0.15)
    assert (result.own > 0.0).all()


def test_error_further_away_by_its_definition():
    one = made(64, 2, beta=1.0, signal=2.0, drift=0.3, reward_slope=-0.7)
    result = jackknifed([one], cosine)
    noise, pairs = (part[0] for part in result.surplus)
    distance = 1.0 - result.value[0]
    own = max(result.own[0], math.sqrt(pairs / 2.0))
    slope = (jackknife_variance(result.replicates[0])[0] - noise) / (max(distance, 0.0) + own)
    slope = min(slope, 4.0 * math.sqrt(pairs / 2.0))
    q = result.quantiles(0.95)[0]
    reach = optimize.brentq(lambda x: x - q * math.sqrt(max(pairs + slope * (distance + x), 0.0)), 1e-6, 1e3)
    assert error_further_away(result, 0, 0.95) == pytest.approx(reach, rel=1e-6)


def test_an_interval_that_reaches_one_reaches_further_down():
    one = made(64, 2, beta=1.0, signal=2.0, drift=0.3, reward_slope=-0.7)
    result = jackknifed([one], cosine)
    plain = within_one(estimate_of(result, 0, level=0.95, method=""))
    found = cosine_estimate([one], result, 0, level=0.95, method="")
    assert plain.high == found.high == 1.0
    assert found.low < plain.low
    # Against grad J the same, turned round.
    back = replace(one, mixed=-one.mixed, noise=(one.noise[0], one.noise[1], -one.noise[2], one.noise[3]))
    signs = np.array([1.0, 1.0, -1.0, 1.0])
    back = replace(back, pairs=one.pairs * np.outer(signs, signs), traces=one.traces * signs)
    turned = cosine_estimate([back], jackknifed([back], cosine), 0, level=0.95, method="")
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), rel=1e-6)


def test_further_punished_responses_turn_a_cosine_by_the_square_of_their_number():
    """Two more of ten, all one way: (2 u)^2 with u^2 a tenth of what all ten add."""
    result = jackknifed([made(64, 3, beta=1.0, signal=2.0)], cosine)
    rows = np.arange(64) < 10
    got = turn_of_further([FewAffected(rows=rows)], result, 0)
    assert got == pytest.approx(4.0 * result.own[0] / 10)
    assert turn_of_further([FewAffected(rows=np.zeros(64, dtype=bool))], result, 0) == 0.0


@pytest.mark.slow
def test_cosines_near_one_are_covered():
    """Where E[g | L] moves, 512 responses: 87 and 90% without the error further away."""
    truths, draws = truths_of((MOVING,), 512), 200
    covered = {"cosine grpo": 0, "cosine vl_norm 2": 0}
    for t in range(draws):
        for found in every_interval([law_of(MOVING)], 512, [1, t], truths, None, {"groups"}):
            if found.quantity in covered:
                covered[found.quantity] += found.low <= found.truth <= found.high
    assert min(covered.values()) >= stats.binom.ppf(0.001, draws, 0.95)
