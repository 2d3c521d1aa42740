"""What readers expect beside the law: the ordinary line, its R^2 and the rank correlation, inside prompts.

Observations share a mean gradient, neighbours and a baseline: `Owed` says what they owe to each other. Without it the
log-log slope and the rank correlation of within-length variances were covered 87 to 91% (N = 64). A line is that
through the means at the lengths given; without the law's own spread (`least_squares`) it was covered 62 to 93%.
Shape letters: n responses, N of one prompt, K prompts (clusters), each with a constant of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.additive import RARE, Sums, of_these_prompts
from gradvar.estimators.carrying import LEAST_UNDER_A_LINE
from gradvar.estimators.intervals import effective_degrees, reach_of_sum, symmetric, t_quantile, without_surplus
from gradvar.estimators.law_estimates import MINIMUM_RESPONSES
from gradvar.estimators.quasi import Dependence
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]
Owed = Sequence[Array]
"""One (N, N) a prompt: y_j - y_j without response i at [i, j], 0 where i = j."""
Spread = tuple[Array, float]
"""Standard deviations (n,) of the observations, and their ratio to the means."""
CLOSE = 1.0 - 1e-12
"""Beyond this a correlation is 1."""
MOST_MOVED = 3.0
"""By how much at most the log of an observation counts as moved by another response: near 0 it knows no bound."""
LEAST_LEFT = math.exp(-MOST_MOVED)
_TOO_FEW = "; no interval below {:g} responses"
"""As for the exponent; a straight line takes more: under a law of L^2 lines through 8 responses were covered 78%,
through 16 89%."""
SHARED = 36
"""Binary digits of the largest observation to which two that share a rank agree: squared distances of equal gradients
differ by rounding alone."""


def owed(codes: NDArray[np.intp], dependence: Dependence | None) -> Owed:
    """What every observation owes to every other of its cluster, from what weighted sums owe; nothing without that."""
    members = [np.flatnonzero(codes == k) for k in range(int(codes.max()) + 1)]
    if dependence is None:
        return [np.zeros((len(own), len(own))) for own in members]
    place = np.zeros((len(codes), max(len(own) for own in members)))
    for own in members:
        place[own, np.arange(len(own))] = 1.0
    found = dependence(place)
    return [found[own, : len(own)] for own in members]


def least_squares(
    x: Array,
    y: Array,
    codes: NDArray[np.intp],
    shared: Owed,
    level: float,
    *,
    spread: Spread | None = None,
    logs: bool = False,
) -> tuple[Estimate, Estimate, Estimate]:
    """Ordinary least squares with a constant per cluster: slope (HC3, t), R^2 inside clusters, mean intercept.

    Args:
        x: (n,) regressor, positive.
        y: (n,) observations.
        codes: (n,) cluster of each.
        shared: What observations owe to each other.
        level: Nominal coverage.
        spread: Of y by a fitted law, for the ends (`reach_of_sum`). A line rests on the longest responses, and where
            their y happen to be small both slope and residuals are.
        logs: Of the logs of both, where y is positive.
    """
    members = [np.flatnonzero(codes == k) for k in range(len(shared))]
    keep = y > 0 if logs else np.ones_like(y, dtype=bool)
    changes = [part[np.ix_(keep[own], keep[own])] for part, own in zip(shared, members, strict=True)]
    x, y, codes = x[keep], y[keep], codes[keep]
    if logs:
        # The difference itself: a neighbour with a large advantage multiplies what it is subtracted from.
        inside = [y[codes == k] for k in range(len(members))]
        changes = [
            np.clip(-np.log(np.maximum(1.0 - part / own, LEAST_LEFT)), -MOST_MOVED, MOST_MOVED)
            for part, own in zip(changes, inside, strict=True)
        ]
        x, y = np.log(x), np.log(y)
    changes = [part for part in changes if len(part)]
    present, codes = np.unique(codes, return_inverse=True)
    n, clusters = len(x), len(present)
    what = "log-log" if logs else "line"
    method = f"least squares ({what}), HC3, t"
    sizes = np.bincount(codes)
    x_mean, y_mean = np.bincount(codes, weights=x) / sizes, np.bincount(codes, weights=y) / sizes
    dx, dy = x - x_mean[codes], y - y_mean[codes]
    total = float(dx @ dx)
    degrees = n - clusters - 1
    if degrees < 1 or total <= 1e-24 * float(x @ x):
        none = symmetric(math.nan, math.nan, level, method + "; not determined", n, clusters)
        return none, none, none
    slope = float(dx @ dy) / total
    residual = dy - slope * dx
    freed = residual / np.maximum(1.0 - 1.0 / sizes[codes] - dx**2 / total, 1e-12)
    gains = np.stack([dx / total, 1.0 / sizes[codes] / clusters - float(x_mean.mean()) * dx / total])
    halves = [_reach(gain, freed, codes, changes, spread, degrees, level, once=not logs) for gain in gains]
    all_y = float(dy @ dy)
    r2 = 1.0 - float(residual @ residual) / all_y if all_y > 0 else math.nan
    intercept = float(y_mean.mean()) - slope * float(x_mean.mean())
    least = MINIMUM_RESPONSES if logs else LEAST_UNDER_A_LINE
    if n < least:
        halves, method = [(math.nan, math.nan)] * 2, method + _TOO_FEW.format(least)
    return (
        _reaching(slope, halves[0], level, method, n, clusters),
        symmetric(r2, math.nan, level, f"least squares ({what}), no interval", n, clusters),
        _reaching(intercept, halves[1], level, method, n, clusters),
    )


def _reaching(value: float, far: tuple[float, float], level: float, method: str, n: int, clusters: int) -> Estimate:
    return replace(symmetric(value, math.nan, level, method, n, clusters), low=value - far[0], high=value + far[1])


def _reach(
    gain: Array,
    freed: Array,
    codes: NDArray[np.intp],
    changes: Sequence[Array],
    spread: Spread | None,
    degrees: float,
    level: float,
    *,
    once: bool,
) -> tuple[float, float]:
    """How far (below, above) sum gain y its interval reaches.

    What the others owe may only widen it, as for the exponent (`quasi`); what pairs of responses add is in the
    jackknife twice and taken out `once` (`without_surplus`: 1.2 to 1.4 times too wide for within-length variances), but
    not of logs, which bend: their slopes were then covered 91 to 96% at N = 128. Where few responses carry it and no
    law tells their spread, rarer ones than any seen would move it (`additive.RARE`).
    """
    alone = gain * freed
    whole, pairs = alone.copy(), 0.0
    for k, change in enumerate(changes):
        own = codes == k
        whole[own] += change @ gain[own]
        pairs += _of_pairs(change * gain[own])
    jackknife = float(whole @ whole)
    if once and jackknife > 0.0:
        whole *= math.sqrt(float(without_surplus(jackknife, 0.0, pairs)) / jackknife)
    seen = float(np.linalg.norm(alone))
    if not once and seen > 0.0:
        # Residuals large by chance where the gain is small could be so where it is not (86% covered without, one in ten
        # right, N = 64); what they owe to each other grows with them.
        evenly = float(np.linalg.norm(gain) * np.linalg.norm(freed)) / math.sqrt(len(gain))
        alone, whole = (part * max(1.0, evenly / seen) for part in (alone, whole))
    influence = max(alone, whole, key=lambda x: float(x @ x))
    if spread is not None:
        sizes, relative = spread
        skewness = 2.0 * relative  # a Gamma's
        return reach_of_sum(influence, gain * sizes, skewness, most=degrees, level=level)
    few = effective_degrees(influence, degrees)
    rare: float = max(1.0, len(gain) / (RARE * few)) ** (1.0 / 3.0)
    half = t_quantile(level, few) * float(np.linalg.norm(influence)) * rare
    return half, half


def rank_correlation(x: Array, y: Array, codes: NDArray[np.intp], shared: Owed, level: float) -> Estimate:
    """Spearman's correlation inside clusters, ranks scaled to the cluster; delete-one jackknife of Fisher's z.

    One response left out moves the others' values across each other: which ranks that changes is chance, counts in the
    jackknife twice, and makes most of its bias (1 to 5 times the error). The first is taken out once, and of the second
    no more stays than what is left of what others' values move; with all of it 98 to 100% were covered, without any
    84% where rewards follow the length.
    """
    parts = [_rank_sums(x[codes == k], y[codes == k], own) for k, own in enumerate(shared)]
    n, clusters = len(x), len(parts)
    method = "Spearman inside prompts, delete-one jackknife of Fisher's z, t"
    total = np.sum([part.value for part in parts], axis=0)
    if min(total[1], total[2]) <= 0.0 or n - clusters < 3:
        return symmetric(math.nan, math.nan, level, method + "; not determined", n, clusters)
    value = float(np.clip(_correlation(total), -1.0, 1.0))
    if abs(value) > CLOSE:
        return symmetric(value, math.nan, level, method + "; no interval at 1", n, clusters)
    if n < MINIMUM_RESPONSES:
        return symmetric(value, math.nan, level, method + _TOO_FEW.format(MINIMUM_RESPONSES), n, clusters)
    slope = 1.0 / math.sqrt(total[1] * total[2]) / (1.0 - value**2)  # of Fisher's z in the sum of products
    return of_these_prompts(
        parts, lambda sums: np.arctanh(np.clip(_correlation(sums), -CLOSE, CLOSE)),
        level=level, method=method, back=math.tanh, curved=True,
        twice=slope**2 * sum(float(part.pairs[0, 0]) for part in parts if part.pairs is not None),
    )  # fmt: skip


def _correlation(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / np.sqrt(sums[..., 1] * sums[..., 2]))


def _rank_sums(x: Array, y: Array, changes: Array) -> Sums:
    """Centred sums of xy, xx, yy of the ranks over their number, whole and without each response."""
    n = len(x)
    y = _one_if_close(y, y.max(initial=0.0))
    whole = _centred_sums(*(ranks_of(values) / n for values in (x, y)))
    if n < 3:
        return Sums(value=whole, without=np.tile(whole, (n, 1)))
    others = ~np.eye(n, dtype=bool)

    def of_others(values: Array) -> Array:
        """(n, n - 1) of (n, n): every row without its own response."""
        return values[others].reshape(n, n - 1)

    fewer = of_others(_without_each(x)) / (n - 1)
    ranks = _ranks_of_rows(_one_if_close(of_others(y - changes), y.max())) / (n - 1)
    still = of_others(_without_each(y)) / (n - 1)
    moved = np.zeros((n, n))
    moved[others] = (ranks - still).ravel()
    # Responses that change places in y are neighbours there: what x holds beyond y says what it changes.
    centred = [(ranks_of(values) - 0.5 * (n + 1)) / n for values in (x, y)]
    beyond = centred[0] - whole[0] / max(float(whole[2]), 1e-300) * centred[1]
    pairs = np.zeros((3, 3))
    pairs[0, 0] = _of_pairs(moved * beyond)
    return Sums(value=whole, without=_centred_sums(fewer, ranks), held=_centred_sums(fewer, still), pairs=pairs)


def _without_each(values: Array) -> Array:
    """(n, n) ranks among the others without each response, a row each: a smaller one left out moves a rank by 1."""
    return np.asarray(ranks_of(values) - 0.5 * (np.sign(values - values[:, None]) + 1.0))


def _of_pairs(moved: Array) -> float:
    """Sampling variance that pairs of responses add, from what each (rows) moves the others' (columns) parts."""
    return 0.5 * float(((moved + moved.T) ** 2).sum())


def _one_if_close(values: Array, largest: float) -> Array:
    """Values that differ by what rounding leaves of the largest, made one."""
    step = math.ldexp(1.0, math.frexp(largest)[1] - SHARED)
    return np.asarray(np.round(values / step) * step) if step > 0.0 else values


def _ranks_of_rows(values: Array) -> Array:
    """Ranks from 1 in every row, ties sharing their mean, so that the responses' order says nothing."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    place = np.arange(values.shape[1])
    new = np.diff(ordered, axis=1, prepend=np.nan, append=np.nan) != 0.0
    first = np.maximum.accumulate(np.where(new[:, :-1], place, 0), axis=1)
    last = np.minimum.accumulate(np.where(new[:, 1:], place, place[-1])[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty_like(ordered)
    np.put_along_axis(ranks, order, (first + last) / 2.0 + 1.0, axis=1)
    return ranks


def _centred_sums(x: Array, y: Array) -> Array:
    dx, dy = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    return np.stack([(dx * dy).sum(axis=-1), (dx**2).sum(axis=-1), (dy**2).sum(axis=-1)], axis=-1)


def ranks_of(values: Array) -> Array:
    """Ranks from 1, ties sharing their mean: scipy's rankdata without its checks, which cost ten times as much."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2.0)[place])
