import math

import numpy as np
import pytest
from scipy import stats

from gradvar.estimators.intervals import (
    decide_from_margin,
    degrees_of_squares,
    effective_degrees,
    jackknife_variance,
    n_to_decide,
    skew_corrected,
    t_quantile,
)


def test_jackknife_of_a_mean_is_its_squared_standard_error():
    x = np.random.default_rng(0).normal(size=20)
    replicates = np.array([np.delete(x, i).mean() for i in range(20)])
    assert jackknife_variance(replicates) == pytest.approx(x.var(ddof=1) / 20, rel=1e-12)


def test_t_quantile():
    assert t_quantile(0.95, 10) == pytest.approx(stats.t.ppf(0.975, 10))
    assert math.isnan(t_quantile(0.95, 0))


def test_effective_degrees():
    normal = np.random.default_rng(0).normal(size=200_000)
    assert effective_degrees(normal, 1e9) == pytest.approx(200_000, rel=0.02)
    assert effective_degrees(normal, 50) == 50
    # One response carries everything: 2 t^2 / (t^2 (1 - 1/n)) is a little over 2.
    assert effective_degrees(np.array([9.0, *np.zeros(99)]), 98) == pytest.approx(2 / 0.99)
    assert effective_degrees(np.ones(10), 9) == 9
    assert effective_degrees(np.zeros(10), 9) == 9
    # Estimates of squares that are nothing but noise tell of no variance.
    assert degrees_of_squares(np.array([1.0, -2.0, 0.5]), 9) == 1


@pytest.mark.parametrize(
    ("value", "low", "high", "side"),
    [
        (1.0, 0.8, 1.2, 1),
        (1.0, 0.75, 1.25, 1),
        (2.0, 1.3, 2.7, -1),
        (0.2, 0.0, 0.7, -1),
        (1.0, 0.5, 1.5, 0),
        (1.3, 1.2, 1.4, 0),
        (1.0, math.nan, math.nan, 0),
    ],
)
def test_decide_from_margin(value, low, high, side):
    assert decide_from_margin(value, low, high, 0.75, 1.25) == side


def test_n_to_decide():
    """N (half-width / distance to the nearer margin)^2."""
    assert n_to_decide(100, 1.05, 0.65, 1.45, 0.75, 1.25) == math.ceil(100 * (0.4 / 0.2) ** 2)
    assert n_to_decide(100, 1.5, 1.0, 2.0, 0.75, 1.25) == 400
    assert n_to_decide(100, 0.5, 0.0, 1.0, 0.75, 1.25) == 400
    assert n_to_decide(100, 1.0, 0.9, 1.1, 0.75, 1.25) == 100
    assert n_to_decide(100, 0.05, 0.0, 0.2, -math.inf, 0.1) == math.ceil(100 * (0.15 / 0.05) ** 2)
    assert n_to_decide(100, 1.25, 1.0, 1.5, 0.75, 1.25) == math.inf
    assert math.isnan(n_to_decide(100, 1.0, math.nan, math.nan, 0.75, 1.25))


def test_skew_correction():
    even = np.array([-1.0, 1.0] * 10)
    assert skew_corrected(2.0, even, 0.5, 1.96) == pytest.approx((2 - 0.98, 2 + 0.98))
    influence = np.array([-5.0, *np.ones(5)])
    low, high = skew_corrected(2.0, influence, 0.5, 1.96)
    # A tail below that this sample holds: truth is more likely further below.
    g = (influence**3).sum() / (influence**2).sum() ** 1.5
    assert g < 0
    t = (2.0 - high) / 0.5
    assert t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6 == pytest.approx(-1.96)
    # On that side the transformation's inverse leaps: its expansion to first order.
    assert (2.0 - low) / 0.5 == pytest.approx(1.96 - g * (2 * 1.96**2 + 1) / 6)
    assert 2.0 - low > high - 2.0
    assert skew_corrected(0.0, np.zeros(3), 0.0, 1.96) == (0.0, 0.0)
    # An error from elsewhere than the responses has no skewness that they know of.
    assert skew_corrected(0.0, np.zeros(3), 0.5, 2.0) == (-1.0, 1.0)


def test_skew_correction_covers_a_lognormal_mean_better():
    """Mean of 30 lognormals, 2000 draws: t misses the nominal 95% by more."""
    rng = np.random.default_rng(0)
    truth, plain, corrected = math.exp(0.5), 0, 0
    for _ in range(2000):
        x = rng.lognormal(size=30)
        influence, error = (x - x.mean()) / 30, x.std(ddof=1) / math.sqrt(30)
        quantile = t_quantile(0.95, 29)
        plain += abs(x.mean() - truth) <= quantile * error
        low, high = skew_corrected(x.mean(), influence, error, quantile)
        corrected += low <= truth <= high
    assert plain / 2000 < 0.91
    assert corrected > plain + 20
