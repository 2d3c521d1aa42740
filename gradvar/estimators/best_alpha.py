"""Where a curve over alpha is highest, with the alphas that the data do not tell apart from there.

The curve f(alpha) (log eta, or log rho) is smooth, so between the grid's points it is the cubic spline through them,
which is linear in them: every delete-one replicate has its own spline. At the true best alpha inside the grid f' = 0,
so the interval holds the alphas around the argmax at which f' is within t standard errors of 0 (at the grid's first
alpha: not above, at its last: not below, since there the best may lie at the edge of a slope).

A paired difference to the argmax, f(best) - f(alpha), is no such test: near the top it is f''/2 (alpha - best)^2 with
error |alpha - best| error(f'), half of the t value of f', so with t standard errors allowed the interval is twice too
wide and covers always.

Shape letters: G alphas of the grid, F of the fine one, N responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.bias import Jackknifed
from gradvar.estimators.intervals import at_least_as_wide, jackknife_variance
from gradvar.estimators.tails import PromptTails
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

STEP = 0.01
"""Distance between fine alphas."""
FLAT = 1e-9
"""A curve that varies by less has no highest point but rounding's (all lengths equal)."""


def fine_alphas(grid: Sequence[float]) -> Array:
    """Alphas (F,) from the grid's first to its last, both among them, about `STEP` apart."""
    return np.linspace(grid[0], grid[-1], max(2, round((grid[-1] - grid[0]) / STEP) + 1))


def spline(grid: Sequence[float]) -> tuple[Array, Array]:
    """(values (G, F), slopes (G, F)): what a curve's values on the grid are multiplied with.

    The cubic spline without a knot at the second and the last but one point; a parabola through 3, a line through 2.
    """
    from scipy.interpolate import CubicSpline  # not needed by most commands

    through = CubicSpline(np.asarray(grid, dtype=np.float64), np.eye(len(grid)))
    fine = fine_alphas(grid)
    return through(fine).T, through(fine, 1).T


def best_of_curve(
    result: Jackknifed,
    grid: Sequence[float],
    *,
    level: float,
    method: str,
    pairs: Array | None = None,
    tails: Sequence[PromptTails] | None = None,
) -> Estimate:
    """Argmax over the grid's range of a curve known on the grid, with its interval.

    Args:
        result: The curve's values on the grid, with their replicates.
        grid: Ascending alphas (G,).
        level: Nominal coverage.
        method: Of the record; an end of the interval at the grid's first or last alpha is open, and said.
        pairs: Covariances (G, G) of the part of the curve's error that comes from pairs of responses (`pairs`), which
            the jackknife counts twice; taken out once. None: nothing is taken out.
        tails: One a prompt; lower the lower end for shorter responses than those seen.

    Returns:
        The alpha, NaN with "unresolved" where the curve is undefined somewhere on the grid. For prompts like these the
        interval holds that for these prompts, which alone `pairs` and `tails` are used for.
    """
    if result.here is None:
        star = _argmax(result, grid, level, method, pairs, tails)
    else:
        here = _argmax(result.here, grid, level, method, pairs, tails)
        star = at_least_as_wide(_argmax(result, grid, level, method, None, None), here)
    ends = zip((star.low, star.high), (grid[0], grid[-1]), strict=True)
    notes = [f"open at {edge:g}" for end, edge in ends if end == _rounded(edge)]
    return replace(star, method="; ".join([star.method, *notes]))


def _argmax(
    result: Jackknifed,
    grid: Sequence[float],
    level: float,
    method: str,
    pairs: Array | None,
    tails: Sequence[PromptTails] | None,
) -> Estimate:
    none = Estimate(
        value=math.nan,
        low=math.nan,
        high=math.nan,
        level=level,
        method=method,
        n=result.n,
        clusters=result.clusters,
        seed=None,
    )
    if not np.isfinite(result.value).all() or not all(np.isfinite(r).all() for r in result.replicates):
        return replace(none, method=f"{method}; unresolved")
    values, slopes = spline(grid)
    fine = fine_alphas(grid)
    if float(np.ptp(result.value)) <= FLAT:
        return replace(none, method=f"{method}; unresolved: no alpha changes it")
    best = int(np.argmax(result.value @ values))
    slope, moved = result.value @ slopes, [r @ slopes for r in result.replicates]
    variance = np.asarray(sum(jackknife_variance(r) for r in moved))
    if pairs is not None:
        twice = np.einsum("gf,gh,hf->f", slopes, pairs, slopes)
        variance = np.maximum(variance - twice, twice)
    influence = np.concatenate([r.mean(axis=0) - r for r in moved])
    quantiles = result.quantiles_of(influence, level)
    unseen = [one.lower_slopes(r.mean(axis=0) - r) for one, r in zip(tails or (), moved, strict=False)]
    falling = quantiles * np.sqrt(variance + sum(np.square(one) for one in unseen))
    fits = (slope >= -quantiles * np.sqrt(variance)) & (slope <= falling)
    fits[0] |= slope[0] <= 0.0
    fits[-1] |= slope[-1] >= 0.0
    fits[best] = True
    low, high = best, best
    while low > 0 and fits[low - 1]:
        low -= 1
    while high < len(fine) - 1 and fits[high + 1]:
        high += 1
    return replace(none, value=_rounded(fine[best]), low=_rounded(fine[low]), high=_rounded(fine[high]))


def _rounded(alpha: float) -> float:
    return round(float(alpha), 6)
