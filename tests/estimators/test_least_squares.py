"""Lines and rank correlations where observations owe something to each other, by leaving responses out one by one."""

import math

import numpy as np
import pytest
from scipy import stats

from gradvar.estimators.least_squares import least_squares, owed, rank_correlation
from gradvar.estimators.spread import within_dependence, within_length_variance
from tests.estimators import simulator


def data(sizes, seed=3):
    """Within-length variances of prompts, their codes and what they owe to each other."""
    made = [simulator.prompt("p", n, rng=np.random.default_rng([seed, n]), beta=1.0, signal=1.0) for n in sizes]
    rngs = [np.random.default_rng([seed, n, 1]) for n in sizes]
    y = [within_length_variance(p.gram, p.lengths, rng=rng) for p, rng in zip(made, rngs, strict=True)]
    rngs = [np.random.default_rng([seed, n, 1]) for n in sizes]
    parts = [within_dependence(p.gram, p.lengths, rng=rng) for p, rng in zip(made, rngs, strict=True)]
    cuts = np.cumsum(sizes)[:-1]

    def dependence(q):
        return np.concatenate([part(piece) for part, piece in zip(parts, np.split(q, cuts), strict=True)])

    lengths = np.concatenate([p.lengths for p in made]).astype(float)
    return lengths, np.concatenate(y), np.repeat(np.arange(len(sizes)), sizes), dependence


def test_what_is_owed_is_what_each_sum_owes():
    _, _, codes, dependence = data((12, 9))
    found = owed(codes, dependence)
    assert [part.shape for part in found] == [(12, 12), (9, 9)]
    for j in range(21):
        only = np.zeros((21, 1))
        only[j] = 1.0
        expected = dependence(only)[:, 0]
        k, place = codes[j], j - 12 * codes[j]
        assert found[k][:, place] == pytest.approx(expected[codes == k])
        assert np.diagonal(found[k]) == pytest.approx(np.zeros(len(found[k])))
        assert not expected[codes != k].any()
    assert [part.any() for part in owed(codes, None)] == [False, False]


def test_rank_correlation_by_leaving_out_one_by_one():
    x, y, codes, dependence = data((40,))
    shared = owed(codes, dependence)
    found = rank_correlation(x, y, codes, shared, 0.95)
    value = stats.spearmanr(x, y).statistic
    sizes = [np.sum((stats.rankdata(values) / 40 - 20.5 / 40) ** 2) for values in (x, y)]
    beyond = stats.rankdata(x) - 20.5 - value * math.sqrt(sizes[0] / sizes[1]) * (stats.rankdata(y) - 20.5)
    z, still, pulls = [], [], np.zeros((40, 40))
    for i in range(40):
        others = np.arange(40) != i
        moved = (y - dependence(np.eye(40))[i])[others]
        z.append(math.atanh(stats.spearmanr(x[others], moved).statistic))
        still.append(math.atanh(stats.spearmanr(x[others], y[others]).statistic))
        pulls[i, others] = beyond[others] / 40 * (stats.rankdata(moved) - stats.rankdata(y[others])) / 39
    # What pairs add is in the jackknife twice.
    slope = 1 / (math.sqrt(math.prod(sizes)) * (1 - value**2))
    pairs = slope**2 * np.sum(np.triu(pulls + pulls.T) ** 2)
    variance, own, owes = (39 / 40 * np.sum((q - np.mean(q)) ** 2) for q in (z, still, np.subtract(z, still)))
    owes = max(owes - pairs, 0)
    square = min((39 * (np.mean(z) - math.atanh(value))) ** 2, owes)
    influence = np.square(np.mean(z) - np.array(z))
    degrees = min(2 * influence.sum() ** 2 / (np.sum(influence**2) - influence.sum() ** 2 / 40), 39)
    rare = max(1, 40 / (8 * degrees)) ** (1 / 3)
    degrees = min(degrees, (own + owes + square) ** 2 / (own**2 / degrees + (owes + square) ** 2 / 3))
    once = max(variance - pairs, 0.25 * variance, pairs, own)
    half = stats.t.ppf(0.975, degrees) * rare * math.sqrt(once + square)
    ends = np.tanh(math.atanh(value) + half * np.array([0, -1, 1]))
    assert (found.value, found.low, found.high) == pytest.approx(tuple(ends))


@pytest.mark.parametrize("digits", [0, 1])
def test_rank_correlation_knows_no_order_among_ties(digits):
    """Zeros and equal values, up to rounding: whichever response comes first, the interval is the same."""
    rng = np.random.default_rng(4)
    x, y = rng.integers(50, 90, 30).astype(float), np.round(rng.exponential(size=30), digits)
    nothing = owed(np.zeros(30, dtype=int), None)
    first = rank_correlation(x, y, np.zeros(30, dtype=int), nothing, 0.95)
    assert first.value == pytest.approx(stats.spearmanr(x, y).statistic)
    for k in range(3):
        order = np.random.default_rng(k).permutation(30)
        noise = 1.0 + 1e-14 * rng.normal(size=30)
        other = rank_correlation(x[order], y[order] * noise, np.zeros(30, dtype=int), nothing, 0.95)
        assert (other.value, other.low, other.high) == pytest.approx((first.value, first.low, first.high))
    z = [math.atanh(stats.spearmanr(np.delete(x, i), np.delete(y, i)).statistic) for i in range(30)]
    error = math.sqrt(29 / 30 * np.sum((z - np.mean(z)) ** 2))
    assert math.atanh(first.high) - math.atanh(first.value) >= stats.norm.ppf(0.975) * error


@pytest.mark.parametrize("n", [8, 15, 16, 19, 20])
def test_slopes_of_logs_and_ranks_have_no_interval_below_sixteen_nor_lines_below_twenty(n):
    """As the exponent has none: under a law of L^2 lines through 8 responses were covered 78%, through 16 89%."""
    x, y, codes, dependence = data((n,))
    shared = owed(codes, dependence)
    for logs, least in ((False, 20), (True, 16)):
        slope, _, intercept = least_squares(x, y, codes, shared, 0.95, logs=logs)
        assert np.isfinite([slope.value, intercept.value]).all()
        assert np.isfinite([slope.low, intercept.high]).tolist() == [n >= least] * 2
        assert slope.method.endswith(f"below {least} responses") == (n < least)
    rank = rank_correlation(x, y, codes, shared, 0.95)
    assert rank.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isfinite(rank.low) == math.isfinite(rank.high) == (n >= 16)


def test_a_slope_of_logs_by_leaving_out_one_by_one():
    """What a response's own value and the others' logs without it, themselves taken anew, make of the slope."""
    x, y, codes, dependence = data((40,), seed=7)
    slope, _, _ = least_squares(x, y, codes, owed(codes, dependence), 0.95, logs=True)
    logs = np.log(x) - np.log(x).mean()
    gain = logs / (logs @ logs)
    assert slope.value == pytest.approx(gain @ np.log(y))
    freed = (np.log(y) - np.log(y).mean() - slope.value * logs) / (1 - 1 / 40 - logs**2 / (logs @ logs))
    change = dependence(np.eye(40))  # y_j - y_j without i at [i, j]
    alone, whole = [], []
    for i in range(40):
        moved = [min(max(math.log(y[j] / max(y[j] - change[i, j], 1e-9)), -3.0), 3.0) for j in range(40) if j != i]
        alone.append(gain[i] * freed[i])
        whole.append(alone[i] + np.delete(gain, i) @ moved)
    factor = max(1.0, np.linalg.norm(gain) * np.sqrt(np.mean(freed**2)) / np.linalg.norm(alone))
    influence = factor * np.array(whole)
    assert np.linalg.norm(whole) > np.linalg.norm(alone)
    squares = influence**2
    degrees = min(2 * squares.sum() ** 2 / (np.sum(squares**2) - squares.sum() ** 2 / 40), 38)
    half = stats.t.ppf(0.975, degrees) * np.linalg.norm(influence) * max(1, 40 / (8 * degrees)) ** (1 / 3)
    assert slope.high - slope.value == pytest.approx(half)


def test_lines_of_two_prompts_by_their_influences():
    """A line's slope is sum gain y: what leaving a response out does to it, by hand."""
    x, y, codes, dependence = data((30, 24), seed=5)
    slope, _, _ = least_squares(x, y, codes, owed(codes, dependence), 0.95)
    inside = x - np.array([x[codes == k].mean() for k in (0, 1)])[codes]
    gain = inside / (inside @ inside)
    assert slope.value == pytest.approx(gain @ y)
    residual = y - np.array([y[codes == k].mean() for k in (0, 1)])[codes] - slope.value * inside
    leverage = 1 / np.bincount(codes)[codes] + inside**2 / (inside @ inside)
    influence = gain * residual / (1 - leverage) + dependence(gain[:, None])[:, 0]
    # What pairs add is in the jackknife twice.
    pulls = dependence(np.eye(54)) * gain
    pairs = np.sum(np.triu(pulls + pulls.T) ** 2)
    influence *= math.sqrt(max(1 - pairs / (influence @ influence), 0.25, pairs / (influence @ influence)))
    alone = least_squares(x, y, codes, owed(codes, None), 0.95)[0]
    squares = influence**2
    degrees = min(2 * squares.sum() ** 2 / (np.sum(squares**2) - squares.sum() ** 2 / 54), 51)
    half = stats.t.ppf(0.975, degrees) * np.linalg.norm(influence) * max(1, 54 / (8 * degrees)) ** (1 / 3)
    assert slope.high - slope.value == pytest.approx(half)
    assert slope.high > alone.high
