"""An interval for prompts like these holds that for these prompts."""

import math

import numpy as np
import pytest
from scipy import stats

from gradvar.estimators.bias import (
    cosine,
    estimate_of,
    inner_product,
    jackknifed,
    log_noise,
    pressure,
    scale,
)
from gradvar.estimators.cosines import cosine_estimate
from gradvar.estimators.cv import _ends_across
from gradvar.estimators.groups import draw_groups
from gradvar.estimators.intervals import at_least_as_wide
from gradvar.runs.records import Estimate
from tests.estimators import simulator
from tests.estimators.test_bias import parts


def test_prompts_drawn_again_vary_at_least_as_much():
    def one(low, high, value=1.0):
        return Estimate(value=value, low=low, high=high, level=0.95, method="", n=9, clusters=4, seed=None)

    assert at_least_as_wide(one(0.5, 1.2), one(0.7, 1.4)).low == 0.5
    assert at_least_as_wide(one(0.5, 1.2), one(0.7, 1.4)).high == 1.4
    for unknown in (one(math.nan, math.nan), one(-math.inf, math.inf, value=math.nan)):
        assert at_least_as_wide(one(0.5, 1.2), unknown) == one(0.5, 1.2)
    assert math.isnan(at_least_as_wide(one(math.nan, math.nan), one(0.7, 1.4)).low)


def test_an_interval_for_prompts_like_these_holds_that_for_these():
    """Five prompts of one law, whose own jackknife is by chance narrower in places; the wider end holds."""
    made = []
    for seed in range(5):
        rng = np.random.default_rng([7, seed])
        scores, rewards, lengths = simulator.draw(40, rng=rng, signal=2.0)
        rules = [("grpo", None), ("dapo", None), ("vl_norm", 1.0)]
        made.append(parts(scores, rewards, lengths, draw_groups(40, 8, 64, rng=rng), rules))
    narrower = 0
    for statistic in (cosine, scale, log_noise, inner_product(1), pressure(1)):
        here, across = jackknifed(made, statistic), jackknifed(made, statistic, across=True)
        for k in range(3):
            one, two = (estimate_of(result, k, level=0.95, method="") for result in (here, across))
            values = across.replicates[0][:, k]
            half = stats.t.ppf(0.975, 4) * math.sqrt(4 / 5 * float(((values - values.mean()) ** 2).sum()))
            bias = 4 * (values.mean() - float(across.value[k]))
            low, high = one.value - half - max(bias, 0.0), one.value + half - min(bias, 0.0)
            assert (two.low, two.high) == pytest.approx((min(low, one.low), max(high, one.high)))
            narrower += one.low < low or one.high > high
    assert 0 < narrower < 15


def test_a_cosine_for_prompts_like_these_holds_that_for_these():
    """Each interval is brought into [-1, 1] before they are joined, by a map that is not monotone."""
    found = 0
    for seed in range(12):
        made = []
        for k in range(4):
            rng = np.random.default_rng([9, seed, k])
            scores, rewards, lengths = simulator.draw(32, rng=rng, signal=2.0, drift=0.3, reward_slope=-0.7)
            made.append(parts(scores, rewards, lengths, draw_groups(32, 8, 16, rng=rng), [("vl_norm", 3.0)]))
        here, across = (
            cosine_estimate(made, jackknifed(made, cosine, across=way), 0, level=0.95, method="", across=way)
            for way in (False, True)
        )
        if math.isfinite(here.value) and math.isfinite(across.value):
            found += 1
            assert across.low <= here.low <= here.high <= across.high
    assert found > 3


def test_rho_of_prompts_like_these_is_moved_by_skewness():
    """On log(1 - rho), Hall's correction: a prompt that carries the signal moves the end on its side."""
    without = 0.3 + 0.02 * np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -7.0])
    value, t = 0.3, stats.t.ppf(0.975, 7)
    error = math.sqrt(7 / 8 * float(((without - without.mean()) ** 2).sum())) / (1.0 - value)
    low, high = _ends_across(value, without, 0.95)
    plain = [1.0 - (1.0 - value) * math.exp(sign * t * error) for sign in (1.0, -1.0)]
    u = np.log(1.0 - without).mean() - np.log(1.0 - without)
    moved = float((u**3).sum()) / float((u**2).sum()) ** 1.5 * (2.0 * stats.norm.ppf(0.975) ** 2 + 1.0) / 6.0
    assert moved < 0.0  # without that prompt the noise is larger: the log lies low where it is in
    assert high == pytest.approx(1.0 - (1.0 - value) * math.exp(-(t - moved) * error))
    assert high > plain[1]
    assert plain[0] < low < value
    even = 0.3 + 0.02 * np.array([1.0, -1.0] * 4)
    wide = t * math.sqrt(7 / 8 * float(((even - even.mean()) ** 2).sum())) / 0.7
    assert _ends_across(0.3, even, 0.95) == pytest.approx(
        (1 - 0.7 * math.exp(wide), 1 - 0.7 * math.exp(-wide)), rel=0.02
    )
    assert all(math.isnan(end) for end in _ends_across(1.2, even, 0.95))
