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
from typing import TYPE_CHECKING, Any

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
        noise, pairs = np.zeros(len(slopes[0])), np.zeros(len(slopes[0]))
        for p in prompts:
            same, cross, mixed, direction = p.noise
            parts = [same, cross, *np.moveaxis(mixed, 2, 0), *direction.T[:, :, None]]
            moved = sum(g * part[:, : len(g)] for g, part in zip(slopes, parts, strict=True))
            g = np.stack(slopes[: 3 + directions], axis=1)
            noise += jackknife_variance(np.asarray(moved))
            pairs += np.einsum("ri,rij,rj->r", g, p.pairs[: len(g)], g)
    return noise, pairs


def _slopes(totals: Sequence[Array], statistic: Statistic) -> list[Array]:
    """Derivatives (R,) by same, cross, each column of mixed and each direction.

    Of all updates at once: each statistic uses its own update's moments. Both ends of all derivatives are evaluated
    together, along a first axis.
    """
    directions = len(totals[3])
    which = [(0, None), (1, None), *((2, j) for j in range(directions)), *((3, j) for j in range(directions))]
    moved = [np.broadcast_to(total, (2 * len(which), *total.shape)).copy() for total in totals]
    widths = []
    for k, (m, j) in enumerate(which):
        column: Any = ... if j is None else (..., j)
        width = STEP * np.where(totals[m][column] == 0.0, 1.0, np.abs(totals[m][column]))
        moved[m][2 * k][column] += width
        moved[m][2 * k + 1][column] -= width
        widths.append(width)
    ends = statistic(*moved)
    return [
        (ends[2 * k] - ends[2 * k + 1]) / (2.0 * width.reshape(-1)[: ends.shape[-1]]) for k, width in enumerate(widths)
    ]


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
