"""What pairs of responses add to the variance of inner products of updates.

<E ghat_k, E ghat_l> is estimated by a mean over pairs of different responses of z_ki . z_lj, where z_ki is n (mean
coefficient of i in kind k) s_i. Its error has a part linear in single responses and one of pairs, which a delete-one
jackknife counts twice (Efron and Stein 1981): where updates are mostly noise that is half of its variance. Of two
kernels h and h', both centred and without i = j, the pairs' parts have the covariance

    2 / (N (N - 1))^2 sum_(i, j) h_ij h'_ij

Inside a group, for E||ghat||^2, n (n - 1) of the n^2 products are of different responses: (n - 1)/n of the kernel.
Shape letters: N responses, n of a group, B groups, P permutations, K kinds of update, M kernels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_coefficients(groups: NDArray[np.intp], updates: Array, n_responses: int) -> Array:
    """Mean coefficient, times n, (K, N) of every response over the groups (P, B, n) that hold it."""
    members = groups.reshape(-1)
    times = np.maximum(np.bincount(members, minlength=n_responses), 1)
    sums = [np.bincount(members, weights=c.reshape(-1), minlength=n_responses) for c in updates]
    return np.asarray(groups.shape[2] * np.stack(sums) / times)


def kernel(gram: Array, one: Array, two: Array) -> Array:
    """Kernel (N, N) of the mean of z_i . w_j over i != j, made symmetric.

    Args:
        gram: (N, N) score Gram.
        one: (N,) of `mean_coefficients`.
        two: (N,) of another kind, or the same.
    """
    outer = np.outer(one, two)
    return np.asarray(gram * (0.5 * (outer + outer.T)))


def centred(kernels: Array) -> Array:
    """(M, N, N) without the parts that single responses explain, 0 for i = j."""
    means = kernels.mean(axis=-1)
    whole = means.mean(axis=-1)[..., None, None]
    made = kernels - (means[..., :, None] + means[..., None, :] - whole)
    diagonal = np.arange(kernels.shape[-1])
    made[..., diagonal, diagonal] = 0.0
    return np.asarray(made)


def covariance_of_kernels(kernels: Array) -> Array:
    """Covariances (M, M) of the pairs' parts of the means over i != j of M symmetric kernels (M, N, N)."""
    return covariance_of_centred(centred(kernels))


def covariance_of_centred(kernels: Array) -> Array:
    """The same of kernels that are `centred` already."""
    n = kernels.shape[-1]
    flat = kernels.reshape(len(kernels), -1)
    return np.asarray(2.0 / (n * (n - 1.0)) ** 2 * (flat @ flat.T))


def pair_covariance(gram: Array, updates: Array, direction: Array) -> Array:
    """Covariances (2 K, 2 K) of the pairs' parts of the K ||E ghat||^2, then of the K <E ghat, E h>.

    Args:
        gram: (N, N) score Gram.
        updates: (K, N) of `mean_coefficients`.
        direction: (N,) the same of the direction h.
    """
    squares = [kernel(gram, z, z) for z in updates]
    return covariance_of_kernels(np.stack([*squares, *(kernel(gram, z, direction) for z in updates)]))
