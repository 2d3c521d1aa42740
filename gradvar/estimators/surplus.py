"""What a jackknife of inner products of groups has too much in it.

A delete-one jackknife is 1.1 to 2 times too wide for rho, eta, cosines and ratios, for two reasons that together
explain it: without them the estimated errors are the sampling errors to within some percent.

    noise   A response's replicate rests on the P groups that hold it. That these are few adds n sigma^2 / (B P) to the
            variance, sigma^2 that of a group's own value: 7% for a length pressure, 80% for a cosine near 1 (P = 128).
    pairs   What pairs of responses add to a mean over pairs is counted twice.

Shape letters: N responses, R kinds of update, H directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.intervals import jackknife_variance

if TYPE_CHECKING:
    from gradvar.estimators.bias import Statistic
    from gradvar.estimators.update_products import Products

Array = NDArray[np.float64]

STEP = 1e-5
"""Of the numerical derivatives, relative."""


def jackknife_surplus(
    prompts: Sequence[Products], totals: Sequence[Array], statistic: Statistic
) -> tuple[Array, Array]:
    """Noise and pairs, (R,) each, of a statistic of summed products, to first order: for `without_surplus`."""
    directions = len(totals[3])
    with np.errstate(all="ignore"):
        slopes = _slopes(totals, statistic)
        count = slopes.shape[1]
        noise, pairs = np.zeros(count), np.zeros(count)
        for p in prompts:
            same, cross, mixed, direction = p.noise
            moved = slopes[0] * same[:, :count] + slopes[1] * cross[:, :count]
            moved += np.einsum("hr,nrh->nr", slopes[2 : 2 + directions], mixed[:, :count])
            moved += direction @ slopes[2 + directions :]
            noise += jackknife_variance(moved)
            g = slopes[: 3 + directions].T
            pairs += np.einsum("ri,rij,rj->r", g, p.pairs[:count], g)
    return noise, pairs


def own_products(prompts: Sequence[Products], totals: Sequence[Array], statistic: Statistic) -> Array:
    """(R,) by how much a statistic would be larger if a response's product with itself counted, to first order."""
    directions = len(totals[3])
    with np.errstate(all="ignore"):
        slopes = _slopes(totals, statistic)[: 3 + directions]
        return np.asarray(np.einsum("ir,ri->r", slopes, np.sum([p.traces[: slopes.shape[1]] for p in prompts], axis=0)))


def _slopes(totals: Sequence[Array], statistic: Statistic) -> Array:
    """Derivatives (2 + 2 H, R) by same, cross, each column of mixed and each direction.

    Of all updates at once: each statistic uses its own update's moments. Both ends of all derivatives are evaluated
    together, along a first axis.
    """
    each = np.arange(len(totals[3]))
    rows = len(each)
    widths = [STEP * np.where(total == 0.0, 1.0, np.abs(total)) for total in totals]
    moved = [np.broadcast_to(total, (2, 2 + 2 * rows, *total.shape)).copy() for total in totals]
    for end, sign in enumerate((1.0, -1.0)):
        moved[0][end, 0] += sign * widths[0]
        moved[1][end, 1] += sign * widths[1]
        moved[2][end, 2 + each, :, each] += sign * widths[2].T
        moved[3][end, 2 + rows + each, each] += sign * widths[3]
    high, low = statistic(*moved)
    count = high.shape[-1]
    by = [widths[0][None, :count], widths[1][None, :count], widths[2].T[:, :count]]
    by.append(np.broadcast_to(widths[3][:, None], (rows, count)))
    return np.asarray((high - low) / (2.0 * np.concatenate(by)))


def of_log_efficiency(prompts: Sequence[Products], covariances: Array, group_size: int) -> Array:
    """Covariances (K, K) of the pairs' part of log eta of K updates, from the sum over prompts of `pair_covariance`."""
    same, _, mixed = _totals(prompts)
    return _of_parts(covariances, -_share(group_size) / same, 2.0 / mixed)


def of_log_rho(prompts: Sequence[Products], covariances: Array, group_size: int) -> Array:
    """The same of log rho."""
    same, cross, mixed = _totals(prompts)
    return _of_parts(covariances, 1.0 / cross - _share(group_size) / same, 0.0 * mixed)


def _share(group_size: int) -> float:
    """E||ghat||^2 holds the pairs inside a group: n (n - 1) of them, where ||E ghat||^2 has n^2."""
    return (group_size - 1) / group_size


def _totals(prompts: Sequence[Products]) -> tuple[Array, Array, Array]:
    return (
        np.sum([p.same[0] for p in prompts], axis=0),
        np.sum([p.cross[0] for p in prompts], axis=0),
        np.sum([p.mixed[0, :, 0] for p in prompts], axis=0),
    )


def _of_parts(covariances: Array, squares: Array, mixed: Array) -> Array:
    """By the derivatives to ||E ghat||^2 and to <E ghat, grad J>."""
    k = len(squares)
    slopes = np.concatenate([squares, mixed])
    whole = covariances * np.outer(slopes, slopes)
    return np.asarray(whole[:k, :k] + whole[:k, k:] + whole[k:, :k] + whole[k:, k:])
