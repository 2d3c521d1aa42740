"""Efficiency of every update over that of VL Norm at its best alpha, paired: the same groups, the same replicates.

    log eta(a) - log eta(best),   log eta(best) = sum_g w_g log eta(grid_g)

w are the spline's weights at the argmax (`best_alpha`), so the reference may lie between the grid's alphas. ||grad J||
cancels in a ratio. The best alpha is held fixed in the replicates: it was chosen on the same data, which flatters it by
about its own slope's error squared over twice the curvature, and nothing else.

The interval is the delete-one jackknife of the log, t, less what pairs of responses count twice in it, and allowing for
unseen lengths (`tails`). What the choice of permutations adds stays: where two rules nearly agree the estimate has as
much of it (dapo's ratio under a flat law was covered 86% without).
Shape letters: N responses, R kinds of update, of which the last G are VL Norm on the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradvar.estimators.best_alpha import fine_alphas, spline
from gradvar.estimators.bias import Jackknifed, estimate_of, jackknifed, log_efficiency
from gradvar.estimators.paper_order import ROUNDING
from gradvar.estimators.tails import LengthTails
from gradvar.estimators.update_products import Array, Products
from gradvar.runs.records import Estimate


def eta_ratios(
    pool: Sequence[Products],
    grid: Sequence[float],
    best: float,
    *,
    level: float,
    method: str,
    across: bool,
    pairs: Array | None = None,
    tails: Sequence[Sequence[LengthTails]] | None = None,
) -> list[Estimate]:
    """Return eta over VL Norm's at `best` for every kind of update.

    Args:
        pool: Prompts' products; the last G kinds of update are VL Norm on the grid.
        grid: Ascending alphas (G,).
        best: Alpha of the reference, inside the grid's range.
        level: Nominal coverage.
        method: Of the records.
        across: For prompts like these, else for these prompts, which alone `pairs` and `tails` are used for.
        pairs: (R, R) covariances of what pairs of responses add to log eta (`surplus.of_log_efficiency`), which the
            jackknife counts twice; None: nothing is taken out.
        tails: Of every kind of update, one a prompt: beside VL Norm at `best`, of CVs (`tails`).

    Returns:
        R estimates, NaN with "unresolved" where an update is not known to go along grad J. Exactly 1 has [1, 1].
    """
    values, _ = spline(grid)
    weights = values[:, int(np.argmin(np.abs(fine_alphas(grid) - best)))]
    size = len(grid)

    def over_best(same: Array, cross: Array, mixed: Array, direction: Array) -> Array:
        logs = log_efficiency(same, cross, mixed, direction)
        return np.asarray(logs - (logs[..., -size:] @ weights)[..., None])

    twice = None if pairs is None else _pairs_of_ratios(pairs, weights)
    surplus = None if twice is None else (np.zeros_like(twice), twice)
    result = jackknifed(pool, over_best, across=across)
    if result.here is None:
        result = replace(result, surplus=surplus)
    else:
        result = replace(result, here=replace(result.here, surplus=surplus))
    return [
        _ratio(result, k, None if tails is None else tails[k], level=level, method=method)
        for k in range(len(result.value))
    ]


def _pairs_of_ratios(pairs: Array, weights: Array) -> Array:
    """(R,) variances that pairs of responses add to the log ratios, from their covariances in log eta."""
    size = len(weights)
    reference = weights @ pairs[-size:, -size:] @ weights
    return np.asarray(np.diagonal(pairs) - 2.0 * pairs[:, -size:] @ weights + reference)


def _ratio(result: Jackknifed, k: int, tails: Sequence[LengthTails] | None, *, level: float, method: str) -> Estimate:
    apart = max(float(np.abs(r[:, k]).max()) for r in result.replicates)
    if apart <= ROUNDING and abs(float(result.value[k])) <= ROUNDING:
        one = estimate_of(result, k, level=level, method=method)
        return replace(one, value=1.0, low=1.0, high=1.0)
    turned = None if tails is None else [one.turned() for one in tails]
    found = estimate_of(result, k, level=level, method=method, tails=turned)
    if math.isnan(found.value):
        return replace(found, low=math.nan, high=math.nan)
    ends = math.exp(max(found.low, -700.0)), math.exp(min(found.high, 700.0))
    return replace(found, value=math.exp(found.value), low=ends[0], high=ends[1])
