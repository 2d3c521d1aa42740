"""Statistics of sums over prompts: a jackknife over responses, one over prompts, and a ratio whose divisor may be 0.

Every prompt contributes a vector of P sums or means with its delete-one replicates; a statistic is a function of the
vectors' total. Shape letters: N responses of one prompt, K prompts, P parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    at_least_as_wide,
    degrees_of_squares,
    effective_degrees,
    jackknife_variance,
    t_quantile,
    without_surplus,
)
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Parts (..., P) to statistic (...)."""
UNRESOLVED_NOTE = "; unresolved"
CURVED_DEGREES = 8.0
"""At most, of a curved statistic of which it is not known what responses owe to each other."""
OWED_DEGREES = 2.0
"""Of the part of a curved statistic's error that comes from what responses owe to each other, such as their baseline:
the slope there changes within its own error. Where rewards follow the length, rank correlations of deviations were
covered 91 and 93% with 2, 89 and 91% with 4 (N = 64 and 128)."""
RARE = 8.0
"""Responses to one effective degree of freedom above which a curved statistic's error grows, with their cube root:
found by calibration on R^2 under a law of L^2 and lognormal lengths."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """What one prompt contributes."""

    value: Array
    """(P,)."""
    without: Array
    """(N, P) delete-one replicates; NaN where they do not exist."""
    held: Array | None = None
    """(N, P) likewise, with what the others owe to the response, such as their baseline, as it is."""
    halves: tuple[Array, Array] | None = None
    """Replicates (N, P) from either half of the random permutations, whose own noise is then taken out of the error."""
    pairs: Array | None = None
    """Covariances (P, P) of the error's part from pairs of responses (`pairs`), which a jackknife counts twice."""


def of_these_prompts(
    prompts: Sequence[Sums],
    statistic: Statistic,
    *,
    level: float,
    method: str,
    back: Callable[[float], float] = lambda x: x,
    curved: bool = False,
    twice: float = 0.0,
) -> Estimate:
    """Statistic of the total, responses drawn again inside prompts; `back` takes value and ends to another scale.

    With `curved` the jackknife's estimate of the bias joins the error in squares, at most as large as it, and t has at
    most `CURVED_DEGREES`; or, where `Sums.held` tells what moves others' values, that part has `OWED_DEGREES`: right
    where a statistic bends within its own error. Where less than one response in RARE carries the error, rarer ones
    than any seen would move the statistic, and it is widened. `twice` is the sampling variance that pairs of responses
    add, which the jackknife counts twice (Efron and Stein 1981): the bias is then no more than what others' values
    move, and these may only widen.
    Without interval where a replicate is undefined; NaN where the statistic is.
    """
    n, clusters = sum(len(p.without) for p in prompts), len(prompts)
    total = np.sum([p.value for p in prompts], axis=0)
    method = f"{method}; {THESE_PROMPTS}"
    with np.errstate(all="ignore"):
        value = float(statistic(total))
        replicates = [np.asarray(statistic(total - p.value + p.without)) for p in prompts]
    if not math.isfinite(value):
        return _record(math.nan, math.nan, math.nan, level, method + UNRESOLVED_NOTE, n, clusters)
    half = math.nan
    if all(len(r) > 1 and np.isfinite(r).all() for r in replicates):
        influence = np.concatenate([r.mean() - r for r in replicates])
        error = math.sqrt(sum(float(jackknife_variance(r)) for r in replicates))
        degrees = effective_degrees(influence, n - clusters)
        if curved:
            error, degrees = _curved(prompts, total, statistic, value, replicates, degrees, twice)
        half = t_quantile(level, degrees) * error
        if any(p.halves is not None for p in prompts):
            variance, degrees = _without_permutations(prompts, total, statistic, replicates)
            # Both hold; few degrees of freedom are left where the permutations' noise is most of the error.
            half = min(half, t_quantile(level, min(degrees, float(n - clusters))) * math.sqrt(variance))
    else:
        method += "; no interval, one response carries a part"
    return _record(back(value), back(value - half), back(value + half), level, method, n, clusters)


def _curved(
    prompts: Sequence[Sums],
    total: Array,
    statistic: Statistic,
    value: float,
    replicates: Sequence[Array],
    degrees: float,
    twice: float,
) -> tuple[float, float]:
    """Error and degrees of freedom of a statistic that bends."""
    n = sum(len(r) for r in replicates)
    variance = sum(float(jackknife_variance(r)) for r in replicates)
    bias = sum((len(r) - 1) * (float(r.mean()) - value) for r in replicates)
    rare: float = max(1.0, n / (RARE * degrees)) ** (1 / 3)
    with np.errstate(all="ignore"):
        held = [np.asarray(statistic(total - p.value + p.held)) for p in prompts if p.held is not None]
    if len(held) < len(prompts):
        return rare * math.sqrt(variance + min(bias**2, variance)), min(degrees, CURVED_DEGREES)
    own = sum(float(jackknife_variance(h)) for h in held)
    owed = sum(float(jackknife_variance(r - h)) for r, h in zip(replicates, held, strict=True))
    most = variance
    if twice > 0.0:
        variance = max(float(without_surplus(variance, 0.0, twice)), own)
        most = owed = max(owed - twice, 0.0)
    square = min(bias**2, most)
    owed += square
    if owed > 0.0 and math.isfinite(own):
        # Satterthwaite's for a sum of two variances.
        degrees = min(degrees, (own + owed) ** 2 / (own**2 / degrees + owed**2 / OWED_DEGREES))
    return rare * math.sqrt(variance + square), degrees


def _without_permutations(
    prompts: Sequence[Sums], total: Array, statistic: Statistic, replicates: Sequence[Array]
) -> tuple[float, float]:
    """Jackknife variance without the permutations' own noise, and its degrees of freedom.

    A replicate leaves out the groups that hold a response, some of many, and which ones is chance: that part of its
    influence differs between the halves of the permutations, whose product is free of it.
    """
    variance, squares = 0.0, []
    for p, whole in zip(prompts, replicates, strict=True):
        own = [whole.mean() - whole] * 2
        if p.halves is not None:
            with np.errstate(all="ignore"):
                moved = [np.asarray(statistic(total - p.value + half)) for half in p.halves]
            if all(np.isfinite(m).all() for m in moved):
                own = [m.mean() - m for m in moved]
        n, least = len(whole), 0.25 * float(jackknife_variance(whole))
        variance += max((n - 1) / n * float(own[0] @ own[1]), least)
        squares.append(own[0] * own[1])
    return variance, degrees_of_squares(np.concatenate(squares), math.inf)


def of_prompts_like_these(
    prompts: Sequence[Sums],
    statistic: Statistic,
    *,
    level: float,
    method: str,
    back: Callable[[float], float] = lambda x: x,
) -> Estimate:
    """Statistic of the total, prompts drawn again: delete-one-prompt jackknife, t over K - 1, from 4 prompts on."""
    n, clusters = sum(len(p.without) for p in prompts), len(prompts)
    method = f"{method}, over prompts; {PROMPTS_LIKE_THESE}"
    if clusters < MINIMUM_PROMPTS:
        note = f"; not given below {MINIMUM_PROMPTS} prompts"
        return _record(math.nan, math.nan, math.nan, level, method + note, n, clusters)
    values = np.array([p.value for p in prompts])
    total = values.sum(axis=0)
    with np.errstate(all="ignore"):
        value = float(statistic(total))
        replicates = np.asarray(statistic(total - values))
    if not (math.isfinite(value) and np.isfinite(replicates).all()):
        return _record(math.nan, math.nan, math.nan, level, method + UNRESOLVED_NOTE, n, clusters)
    half = t_quantile(level, clusters - 1) * math.sqrt(float(jackknife_variance(replicates)))
    across = _record(back(value), back(value - half), back(value + half), level, method, n, clusters)
    return at_least_as_wide(across, of_these_prompts(prompts, statistic, level=level, method="", back=back))


def ratio_of_signals(
    prompts: Sequence[Sums], *, margin: float, level: float, method: str, across: bool = False
) -> tuple[Estimate, int, float]:
    """Ratio of two signals, both at least 0 in truth, by Fieller's set: part 0 over part 1 of the total.

    {theta : |a - theta b| <= t error(a - theta b)} stays valid where b is not told apart from 0. Then it is unbounded:
    value NaN, and only a lower end is left where a is above 0, none otherwise.

    Args:
        prompts: With two parts, unbiased estimates of the signals.
        margin: The ratio's margin from above.
        level: Nominal coverage.
        method: Of the record.
        across: For prompts like these (K >= 4) instead of these prompts.

    Returns:
        (ratio, 1 inside the margin, -1 outside, 0 undetermined, responses that would decide).
    """
    n, clusters = sum(len(p.without) for p in prompts), len(prompts)
    values = np.array([p.value for p in prompts])
    a, b = (float(v) for v in values.sum(axis=0))
    aim = np.array([1.0, -margin])
    if across:
        method = f"{method}, over prompts; {PROMPTS_LIKE_THESE}"
        if clusters < MINIMUM_PROMPTS:
            note = f"; not given below {MINIMUM_PROMPTS} prompts"
            return _record(math.nan, math.nan, math.nan, level, method + note, n, clusters), 0, math.nan
        centred = values - values.mean(axis=0)
        covariance = clusters / (clusters - 1) * centred.T @ centred
        quantile = t_quantile(level, clusters - 1)
    else:
        method = f"{method}; {THESE_PROMPTS}"
        if not all(len(p.without) > 1 and np.isfinite(p.without).all() for p in prompts):
            return _record(math.nan, math.nan, math.nan, level, method + "; no interval", n, clusters), 0, math.nan
        moved = [p.without.mean(axis=0) - p.without for p in prompts]
        covariance = np.sum(
            [_once((len(m) - 1) / len(m) * m.T @ m, p.pairs) for m, p in zip(moved, prompts, strict=True)], axis=0
        )
        quantile = t_quantile(level, effective_degrees(np.concatenate(moved) @ aim, n - clusters))
    low, high = _fieller(a, b, covariance, quantile)
    inside = 1 if high <= margin else -1 if low > margin else 0
    value = a / b if math.isfinite(low) and math.isfinite(high) else math.nan
    distance, half = abs(a - margin * b), quantile * math.sqrt(max(float(aim @ covariance @ aim), 0.0))
    needed = float(n) if inside else float(math.ceil(n * max(1.0, (half / distance) ** 2))) if distance else math.inf
    note = "" if math.isfinite(value) else UNRESOLVED_NOTE
    return _record(value, low, high, level, method + note, n, clusters), inside, needed


def _once(jackknife: Array, pairs: Array | None) -> Array:
    """The jackknife's covariance with the pairs' part in it once; the part of single responses is at least 0."""
    if pairs is None:
        return jackknife
    values, axes = np.linalg.eigh(jackknife - 2.0 * pairs)
    return np.asarray((axes * np.maximum(values, 0.0)) @ axes.T + pairs)


def _fieller(a: float, b: float, covariance: Array, quantile: float) -> tuple[float, float]:
    square = quantile**2
    first = b**2 - square * float(covariance[1, 1])
    middle = a * b - square * float(covariance[0, 1])
    last = a**2 - square * float(covariance[0, 0])
    inner = middle**2 - first * last
    if first > 0.0 and inner >= 0.0:
        if b < 0.0:
            # A negative square: neither signal is there, whatever the noise says.
            return -math.inf, math.inf
        root = math.sqrt(inner)
        return (middle - root) / first, (middle + root) / first
    if first < 0.0 < inner and last > 0.0 and a > 0.0:
        # Two rays, one on each side of 0: the ratio of two squares lies on the upper one.
        return (middle - math.sqrt(inner)) / first, math.inf
    return -math.inf, math.inf


def _record(value: float, low: float, high: float, level: float, method: str, n: int, clusters: int) -> Estimate:
    return Estimate(value=value, low=low, high=high, level=level, method=method, n=n, clusters=clusters, seed=None)
