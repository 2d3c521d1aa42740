"""What pairs of responses add to the variance of inner products of updates.

<E ghat_k, E ghat_l> is estimated by a mean over pairs of different responses of z_ki . z_lj, where z_ki is n (mean
coefficient of i in kind k) s_i. Its error has a part linear in single responses and one of pairs, which a delete-one
jackknife counts twice: where updates are mostly noise that is half of its variance and more. Of two kernels h and h',
both centred and without i = j, the pairs' parts have the covariance

    2 / (N (N - 1))^2 sum_(i, j) h_ij h'_ij

Shape letters: N responses, n of a group, B groups, P permutations, K kinds of update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.bias import Products

Array = NDArray[np.float64]


def mean_coefficients(groups: NDArray[np.intp], updates: Array, n_responses: int) -> Array:
    """Mean coefficient, times n, (K, N) of every response over the groups (P, B, n) that hold it."""
    members = groups.reshape(-1)
    times = np.maximum(np.bincount(members, minlength=n_responses), 1)
    sums = [np.bincount(members, weights=c.reshape(-1), minlength=n_responses) for c in updates]
    return np.asarray(groups.shape[2] * np.stack(sums) / times)


def pair_covariance(gram: Array, updates: Array, direction: Array) -> Array:
    """Covariances (2 K, 2 K) of the pairs' parts of the K ||E ghat||^2, then of the K <E ghat, E h>.

    Args:
        gram: (N, N) score Gram.
        updates: (K, N) of `mean_coefficients`.
        direction: (N,) the same of the direction h.
    """
    n, count = gram.shape[0], len(updates)
    kernels = np.empty((2 * count, n, n))
    for k, z in enumerate(updates):
        kernels[k] = gram * np.outer(z, z)
        crossed = np.outer(z, direction)
        kernels[count + k] = gram * (0.5 * (crossed + crossed.T))
    return covariance_of_kernels(kernels)


def covariance_of_kernels(kernels: Array) -> Array:
    """Covariances (M, M) of the pairs' parts of the means over i != j of M symmetric kernels (M, N, N)."""
    n = kernels.shape[1]
    means = kernels.mean(axis=2)
    centred = kernels - (means[:, :, None] + means[:, None, :] - means.mean(axis=1)[:, None, None])
    centred[:, np.arange(n), np.arange(n)] = 0.0
    flat = centred.reshape(len(kernels), -1)
    return np.asarray(2.0 / (n * (n - 1.0)) ** 2 * (flat @ flat.T))


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
