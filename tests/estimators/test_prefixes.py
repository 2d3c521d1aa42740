import math

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.estimators import prefix_growth


def draw(t, n, gamma, beta, k=8):
    """s^(1..l) with log squared norm = c_i + gamma log l + noise that accumulates, c_i so that beta holds at l = L."""
    rng = np.random.default_rng([1, t])
    whole = np.exp(rng.normal(5.0, 0.5, n))
    lengths = np.ceil(whole[:, None] * np.arange(1, k + 1) / k)
    noise = np.cumsum(rng.normal(0, 0.2, (n, k)), axis=1) + rng.normal(0, 0.5, (n, 1))
    start = (beta - gamma) * np.log(lengths[:, -1:])
    return np.exp(start + gamma * np.log(lengths) + noise), lengths


def test_slopes_by_regression_and_replicates_by_leaving_out():
    squares, lengths = draw(0, 12, 1.3, 2.0, k=4)
    got = prefix_growth(squares, lengths)

    def slopes(q, ell):
        n, k = q.shape
        design = np.column_stack([np.log(ell).ravel(), np.repeat(np.eye(n), k, axis=0)])
        within = np.linalg.lstsq(design, np.log(q).ravel(), rcond=None)[0][0]
        return np.array([within, np.polyfit(np.log(ell[:, -1]), np.log(q[:, -1]), 1)[0]])

    expected = slopes(squares, lengths)
    assert [got.within.value, got.between.value] == pytest.approx(list(expected))
    assert got.difference.value == pytest.approx(expected[0] - expected[1])
    without = np.array([slopes(np.delete(squares, i, 0), np.delete(lengths, i, 0)) for i in range(12)])
    without = np.column_stack([without, without[:, 0] - without[:, 1]])
    error = np.sqrt(11 / 12 * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    halves = np.array([e.high - e.value for e in (got.within, got.between, got.difference)])
    ratio = halves / error
    assert ((ratio > 2.2) & (ratio < 4.5)).all(), "a t quantile of at most 11 degrees"


def test_coverage():
    trials, covered = 300, np.zeros(3)
    for t in range(trials):
        got = prefix_growth(*draw(t + 1, 64, 1.2, 1.8))
        # Lengths are rounded up, which moves the truth by far less than the error.
        truths = (1.2, 1.8, -0.6)
        covered += [
            e.low <= v <= e.high for e, v in zip((got.within, got.between, got.difference), truths, strict=True)
        ]
    assert (np.abs(covered / trials - 0.95) < 5 * math.sqrt(0.95 * 0.05 / trials)).all(), covered / trials


def test_degenerate():
    ones = np.ones((5, 3))
    flat = prefix_growth(ones, ones)
    assert math.isnan(flat.within.value)
    assert math.isnan(flat.between.value)
    rising = np.tile([2.0, 4.0, 8.0], (5, 1))
    got = prefix_growth(rising**2, rising)
    assert got.within.value == pytest.approx(2.0)
    assert math.isnan(got.between.value)
    assert math.isnan(got.difference.value)
    holes = rising**2
    holes[0, 0], holes[1] = 0.0, np.nan
    assert prefix_growth(holes, rising).within.value == pytest.approx(2.0)
    single = prefix_growth(rising[:1] ** 2, rising[:1])
    assert single.within.value == pytest.approx(2.0)
    assert math.isnan(single.within.low)


@pytest.mark.parametrize(
    ("squares", "lengths", "words"),
    [
        (np.ones((3, 2)), np.ones((3, 3)), "responses, prefixes"),
        (np.ones((3, 1)), np.ones((3, 1)), "two prefixes"),
        (np.ones((3, 2)), np.array([[2.0, 1.0]] * 3), "rising"),
        (-np.ones((3, 2)), np.ones((3, 2)), "negative"),
    ],
)
def test_refuses(squares, lengths, words):
    with pytest.raises(GradvarError, match=words):
        prefix_growth(squares, lengths)
