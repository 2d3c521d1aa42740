import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from gradvar.estimators.intervals import (
    bent_quantiles,
    decide_from_margin,
    degrees_of_squares,
    effective_degrees,
    jackknife_variance,
    n_to_decide,
    quantiles_of_columns,
    reach_of_skewed,
    reach_of_sum,
    t_quantile,
    wilson,
    without_surplus,
)
from gradvar.estimators.pairs import centred


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


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_quantiles_of_columns_are_those_of_each(n):
    rng = np.random.default_rng(n)
    u = rng.normal(size=(n, 7))
    u[:, 1], u[1:, 2], u[:, 3], u[0, 4], u[0, 5], u[0, 6] = 0.0, 0.0, 3.0, np.nan, np.inf, 1e6
    for most in (0.0, 0.5, 5.0, 200.0):
        got = quantiles_of_columns(u, 0.95, most)
        with np.errstate(invalid="ignore"):
            expected = [t_quantile(0.95, effective_degrees(column, most)) for column in u.T]
        np.testing.assert_allclose(got, expected)


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


def test_bent_quantiles():
    assert bent_quantiles(0.0, 1.96) == (-1.96, 1.96)
    # Below what else skews nothing is corrected, and no further than a first-order expansion holds.
    assert bent_quantiles(-0.05, 1.96) == (-1.96, 1.96)
    near, far = 0.1 * (1.96**2 + 1) / 2, 0.15 * (1.96**2 + 1) / 2
    assert bent_quantiles(0.2, 1.96) == pytest.approx((-1.96 - far, 1.96 - near))
    assert bent_quantiles(-0.2, 1.96) == pytest.approx((-1.96 + near, 1.96 + far))
    assert bent_quantiles(5.0, 1.96) == bent_quantiles(0.85, 1.96)
    assert bent_quantiles(0.6, 1.96)[1] == bent_quantiles(0.4, 1.96)[1]
    assert bent_quantiles(math.nan, 1.96) == (-1.96, 1.96)
    # Few degrees of freedom at a high level: the nearer end does not pass the estimate.
    assert bent_quantiles(5.0, 9.9)[1] == 0.0


@pytest.mark.parametrize(("n", "least"), [(16, 0.91), (64, 0.925), (128, 0.925)])
def test_exact_coverage_of_a_share(n, least):
    """Wilson's own end misses one share in six near 1/(6 n)."""
    ends = np.array([wilson(count, n, 0.95) for count in range(n + 1)])
    theirs = np.array([proportion_confint(count, n, method="wilson") for count in range(n + 1)])
    assert ends[4:-4] == pytest.approx(theirs[4:-4])
    assert ends[::-1] == pytest.approx(1.0 - ends[:, ::-1])
    assert ((ends >= 0.0) & (ends <= 1.0)).all()
    shares = np.geomspace(0.1 / n, 0.5, 300)
    held = (ends[:, :1] <= shares) & (shares <= ends[:, 1:])
    assert (stats.binom.pmf(np.arange(n + 1)[:, None], n, shares) * held).sum(axis=0).min() > least


def test_reach_of_a_sum():
    u, spread = np.array([1.0, -2.0, 0.5, 0.1]), np.array([0.2, 0.1, 3.0, 2.0])

    def degrees(part):
        squares = part**2
        return 2 * squares.sum() ** 2 / ((squares**2).sum() - squares.sum() ** 2 / 4)

    def half(part, most=3):
        return stats.t.ppf(0.975, min(most, degrees(part))) * np.linalg.norm(part)

    def by_law(part, most=3):
        return stats.t.ppf(0.975, most) * np.linalg.norm(part)

    assert reach_of_sum(u, 0.0 * u, 0.0, most=3, level=0.95) == pytest.approx([half(u)] * 2)
    assert by_law(spread) > half(u)
    assert reach_of_sum(u, spread, 0.0, most=3, level=0.95) == pytest.approx([by_law(spread)] * 2)
    # The law has all degrees, however few carry the sum; the residuals have their own.
    assert np.linalg.norm(u) < np.linalg.norm(0.7 * spread)
    assert half(u, 30) > by_law(0.7 * spread, 30)
    assert reach_of_sum(u, 0.7 * spread, 0.0, most=30, level=0.95) == pytest.approx([half(u, 30)] * 2)
    assert reach_of_sum(u, spread, 0.0, most=30, level=0.95) == pytest.approx([by_law(spread, 30)] * 2)
    z, error = stats.norm.ppf(0.975), np.linalg.norm(spread)
    far = by_law(spread) + 20.0 / error**2 * (2 * z**2 + 1) / 6
    cubes = (spread**3).sum()  # so that third central moments sum to 20
    got = reach_of_sum(u, spread, 20.0 / cubes, most=3, level=0.95)
    skewness = np.array([1.0, 0.0, 0.0, (20.0 - spread[0] ** 3) / spread[3] ** 3])
    assert reach_of_sum(u, spread, skewness, most=3, level=0.95) == pytest.approx(got)
    assert reach_of_sum(1e-150 * u, 1e-150 * spread, skewness, most=3, level=0.95) == pytest.approx(
        [1e-150 * end for end in got]
    )
    assert got[1] == pytest.approx(far)
    assert got[1] - by_law(spread) > by_law(spread) - got[0] > 0.0
    assert reach_of_sum(u, spread, -20.0 / cubes, most=3, level=0.95) == pytest.approx(got[::-1])
    # However skewed, the nearer end moves no further than a first-order expansion holds.
    assert reach_of_sum(u, spread, 1e6 / cubes, most=3, level=0.95)[0] == pytest.approx(
        by_law(spread) - 0.3 * (z**2 + 1) / 2 * error
    )


def test_reach_where_influences_are_skewed():
    """-+q - skewness (2 z^2 + 1)/6 standard errors, the nearer end within its limits; mirrored with the influences."""
    u = np.array([1.0, -2.0, 5.0, -1.5, 0.5])
    q, error, z = 2.4, 3.0, stats.norm.ppf(0.975)
    skewness = sum(x**3 for x in u) / sum(x**2 for x in u) ** 1.5
    moved = skewness * (2 * z**2 + 1) / 6
    below, above = reach_of_skewed(u, error, q, 0.95)
    assert above == pytest.approx(error * (q + moved))
    curve = (z**2 + 1) / 2
    assert below == pytest.approx(error * (q - curve * min(max(moved / curve - 0.1, 0.0), 0.3)))
    assert reach_of_skewed(-7.0 * u, error, q, 0.95) == pytest.approx((above, below))
    assert reach_of_skewed(np.array([1.0, -1.0]), error, q, 0.95) == pytest.approx((q * error, q * error))
    for none in (np.zeros(3), np.array([np.inf, 1.0])):
        assert reach_of_skewed(none, error, q, 0.95) == (q * error, q * error)
    assert reach_of_skewed(u, 0.0, q, 0.95) == (0.0, 0.0)


@pytest.mark.parametrize("outlier", [1.0, 5.0, 1000.0])
def test_a_higher_level_reaches_further_on_both_sides(outlier):
    u = np.random.default_rng(1).normal(size=64) ** 3
    u[0] = outlier * np.abs(u).max()
    u -= u.mean()
    degrees = effective_degrees(u, 63)
    reaches = [
        reach_of_skewed(u, 1.0, t_quantile(level, degrees), level) for level in (0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
    ]
    for one, two in itertools.pairwise(reaches):
        assert 0.0 < one[0] < two[0]
        assert 0.0 < one[1] < two[1]


def test_means_of_skewed_observations_are_covered_from_both_sides():
    """95% within 3 binomial standard errors; without the correction nearly all misses lie on one side."""
    rng, n, q = np.random.default_rng(3), 40, stats.t.ppf(0.975, 39)
    below, above, plain = 0, 0, 0
    for _ in range(2000):
        x = rng.gamma(1.0, 1.0, n)
        u = (x - x.mean()) / (n - 1)
        error = float(np.linalg.norm(u)) * math.sqrt((n - 1) / n)
        down, up = reach_of_skewed(u, error, q, 0.95)
        below, above = below + (x.mean() + up < 1.0), above + (x.mean() - down > 1.0)
        plain += x.mean() + q * error < 1.0
    assert below + above < 2000 * 0.05 + 3 * math.sqrt(2000 * 0.05 * 0.95)
    assert below < 0.75 * plain


def test_a_sum_of_skewed_observations_is_covered():
    """Mean of 6 exponentials with a known law, 2000 times: both ends together 95%, by t alone 10% above are missed."""
    rng = np.random.default_rng(5)
    missed, plain = [0, 0], [0, 0]
    for _ in range(2000):
        y = rng.exponential(size=6)
        u = (y - y.mean()) * 6 / 5 / 6
        below, above = reach_of_sum(u, np.full(6, 1 / 6), 2.0, most=5, level=0.95)
        half = stats.t.ppf(0.975, 5) * np.linalg.norm(u)
        missed = [missed[0] + (y.mean() - below > 1), missed[1] + (y.mean() + above < 1)]
        plain = [plain[0] + (y.mean() - half > 1), plain[1] + (y.mean() + half < 1)]
    assert plain[1] > 0.07 * 2000
    assert max(missed) < 0.03 * 2000, missed
    assert sum(missed) < 0.05 * 2000, missed


def test_quantiles_of_a_studentised_mean_over_pairs():
    """Squared norm of a weak mean by x_i . x_j, N = 60, 3 dimensions: bent quantiles are nearer to the true ones."""
    n, truth, found = 60, 3 * 0.15**2, []
    rng = np.random.default_rng(3)
    bends = []
    for _ in range(3000):
        x = rng.normal(size=(n, 3)) + 0.15
        total, own = x.sum(axis=0), (x**2).sum(axis=1)
        value = (total @ total - own.sum()) / (n * (n - 1))
        without = ((total - x) ** 2).sum(axis=1) - (own.sum() - own)
        replicates = without / ((n - 1) * (n - 2))
        u = replicates.mean() - replicates
        kernels = centred((x @ x.T)[None])[0]
        pairs = 2.0 * (kernels**2).sum() / (n * (n - 1)) ** 2
        error = math.sqrt(float(without_surplus((n - 1) / n * float(u @ u) * n / (n - 1), 0.0, pairs)))
        bends.append(2.0 / (n * (n - 1)) * (u @ kernels @ u) / np.linalg.norm(u) ** 3)
        found.append((value - truth) / error)
    low, high = np.quantile(found, [0.025, 0.975])
    bent = bent_quantiles(float(np.median(bends)), 1.96)
    assert np.median(bends) > 0.1
    # The mean lies along the noise: the error grows with the estimate, which so lies far below and never far above.
    assert low < -1.96
    assert high < 1.96
    assert abs(bent[0] - low) < abs(-1.96 - low)
    assert abs(bent[1] - high) < abs(1.96 - high)


def test_surplus():
    assert without_surplus(1.0, 0.1, 0.3) == pytest.approx(0.6)
    assert without_surplus(1.0, 0.0, 0.6) == pytest.approx(0.6)
    assert without_surplus(1.0, 0.9, 0.0) == pytest.approx(0.25)
    assert without_surplus(1.0, math.nan, math.nan) == 1.0


def test_degrees_of_freedom_do_not_hang_on_the_scale():
    influence = np.random.default_rng(3).normal(size=20)
    for scale in (1e-160, 1.0, 1e160):
        assert effective_degrees(scale * influence, 99.0) == pytest.approx(effective_degrees(influence, 99.0))
