"""Cosines near 1, where the estimate's own error vanishes with the angle."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks.calibration import law_of, truths_of
from benchmarks.calibration_draws import every_interval
from gradvar.estimators.aggregation import find_rule
from gradvar.estimators.bias import Jackknifed, cosine, estimate_of, jackknifed
from gradvar.estimators.cosines import cosine_estimate, error_further_away, within_one
from gradvar.estimators.few_affected import FewAffected, turn_of_further
from gradvar.estimators.group_products import Layout
from gradvar.estimators.groups import draw_groups, group_coefficients
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

    # Told apart from parallel: Fisher's lower end, further away, and the upper one no nearer than it was.
    inside = cosine_of(0.9, 0.85, 0.95)
    assert 0.8 < inside.low < 0.85
    assert inside.high == 0.95
    turned = cosine_of(-0.9, -0.95, -0.85)
    assert (turned.low, turned.high) == pytest.approx((-inside.high, -inside.low))
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


def test_error_further_away_is_that_of_a_square_of_gaussians():
    """A true distance d = delta^2/2, estimated by (||delta + x||^2 - E||x||^2)/2 with x of 3 equal variances.

    The reach is where the estimate, `reach` nearer to 1, lies q standard deviations of a cosine that far away.
    """
    sigma, dimensions, seen = 0.05, 3, 0.004
    pairs = dimensions * sigma**4 / 2.0
    plain = seen + dimensions * sigma**2 / 2.0
    # What a jackknife has: (delta + x)' Sigma (delta + x).
    variance = 2.0 * plain * sigma**2
    u = np.resize([1.0, -1.0], 500)
    replicates = 1.0 - seen + math.sqrt(variance / (499 / 500 * 500)) * u
    result = Jackknifed(
        value=np.array([1.0 - seen]),
        replicates=[replicates[:, None]],
        n=500,
        clusters=1,
        surplus=(np.zeros(1), np.array([pairs])),
        own=np.array([dimensions * sigma**2 / 2.0]),
    )
    reach = error_further_away(result, 0, 0.95)
    delta = math.sqrt(2.0 * (seen + reach))
    x = np.random.default_rng(3).normal(0.0, sigma, size=(400_000, dimensions))
    x[:, 0] += delta
    estimates = 0.5 * ((x**2).sum(axis=1) - dimensions * sigma**2)
    assert estimates.mean() == pytest.approx(seen + reach, rel=0.01)
    assert reach == pytest.approx(result.quantiles(0.95)[0] * estimates.std(), rel=0.02)


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
    """Two more of ten, all one way: (2 u)^2 with u^2 a tenth of what all ten add beyond the plain update's."""
    result = jackknifed([made(64, 3, beta=1.0, signal=2.0)], cosine)
    rows = np.arange(64) < 10
    more, less = (0, 1) if result.own[0] > result.own[1] else (1, 0)
    got = turn_of_further([FewAffected(rows=rows)], result, more, less)
    assert got == pytest.approx(4.0 * abs(result.own[0] - result.own[1]) / 10)
    assert turn_of_further([FewAffected(rows=rows)], result, less, more) == 0.0
    assert turn_of_further([FewAffected(rows=np.zeros(64, dtype=bool))], result, more, less) == 0.0


@pytest.mark.slow
def test_cosines_near_one_are_covered():
    """Where E[g | L] moves, 512 responses: 87 and 90% without the error further away."""
    truths, draws = truths_of((MOVING,), 512), 200
    above, below = ({"cosine grpo": 0, "cosine vl_norm 2": 0} for _ in range(2))
    for t in range(draws):
        for found in every_interval([law_of(MOVING)], 512, [1, t], truths, None, {"groups"}):
            if found.quantity in above:
                above[found.quantity] += found.low > found.truth
                below[found.quantity] += found.high < found.truth
    # Nearly all intervals end at 1, so what is left to miss is on one side.
    assert max(above.values()) <= stats.binom.ppf(0.999, draws, 0.05), above
    assert max(below.values()) <= stats.binom.ppf(0.999, draws, 0.025), below
