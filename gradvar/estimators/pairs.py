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

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ROUNDING = 1e-12
"""Pairs below this share of their kernel's squares are what rounding leaves of none, as of identical responses."""


def mean_coefficients(groups: NDArray[np.intp], updates: Array, n_responses: int, held: Array | None = None) -> Array:
    """Mean coefficient, times n, (K, N) of every response over the groups (P, B, n) that hold it.

    `held` (P, B) is 1 for groups that take part, else 0, as the coefficients in them.
    """
    members = groups.reshape(-1)
    counted = None if held is None else np.repeat(held.reshape(-1), groups.shape[2])
    times = np.maximum(np.bincount(members, weights=counted, minlength=n_responses), 1)
    sums = [np.bincount(members, weights=c.reshape(-1), minlength=n_responses) for c in updates]
    return np.asarray(groups.shape[2] * np.stack(sums) / times)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedKernels:
    """M kernels h_ij = S_ij (z_i w_j + w_i z_j) / 2 of one Gram S, never formed.

    What the module's sum needs of them are forms in the weights: sum_ij h_ij h'_ij = (a' Q b + c' Q d) / 2 with Q the
    elementwise square of S and a = z z', b = w w', c = z w', d = w z' response by response; less rows and diagonal.
    """

    gram: Array
    """(N, N) S."""
    weights: Array
    """(V, N), rows of `mean_coefficients`."""
    first: NDArray[np.intp]
    """(M,) which of the weights is z."""
    second: NDArray[np.intp]
    """(M,) which is w."""

    def covariance(self) -> Array:
        """Covariances (M, M) of the pairs' parts."""
        n, count = self.gram.shape[0], len(self.weights)
        one, two = np.triu_indices(count)
        place = np.empty((count, count), dtype=np.intp)
        place[one, two] = place[two, one] = np.arange(len(one))
        products = self.weights[one] * self.weights[two]
        forms = products @ (self.gram**2) @ products.T
        z, w = self.first[:, None], self.second[:, None]
        sums = 0.5 * (forms[place[z, z.T], place[w, w.T]] + forms[place[z, w.T], place[w, z.T]])
        rows, own = self._rows, self._own
        whole = rows.mean(axis=1)
        left = sums - 2.0 * n * (rows @ rows.T) + n**2 * np.outer(whole, whole) - own @ own.T
        none = np.diagonal(left) <= ROUNDING * np.diagonal(sums)
        left[none], left[:, none] = 0.0, 0.0
        return np.asarray(2.0 / (n * (n - 1.0)) ** 2 * left)

    def traces(self) -> Array:
        """(M,) by how much the squares of the means themselves are larger than the means over pairs."""
        n = self.gram.shape[0]
        return np.asarray(self._own.sum(axis=1) / (n * (n - 1.0)))

    def along(self, influences: Array) -> Array:
        """Forms u h u' (M, U, U) of the centred kernels along influences (M, U, N), each of which sums to 0."""
        weighted = influences * self.weights[self.first][:, None], influences * self.weights[self.second][:, None]
        made = weighted[0] @ self.gram @ np.swapaxes(weighted[1], -1, -2)
        made = 0.5 * (made + np.swapaxes(made, -1, -2))
        return np.asarray(made - (influences * self._own[:, None]) @ np.swapaxes(influences, -1, -2))

    @functools.cached_property
    def _rows(self) -> Array:
        """(M, N) means of the kernels' rows."""
        z, w = self.weights[self.first], self.weights[self.second]
        reached = self.weights @ self.gram
        return np.asarray(0.5 * (z * reached[self.second] + w * reached[self.first]) / self.gram.shape[0])

    @functools.cached_property
    def _own(self) -> Array:
        """(M, N) what centring leaves on the diagonal, which is not of two responses."""
        products = self.weights[self.first] * self.weights[self.second]
        return np.asarray(np.diagonal(self.gram) * products - 2.0 * self._rows + self._rows.mean(axis=1)[:, None])


def pair_covariance(gram: Array, updates: Array, direction: Array) -> Array:
    """Covariances (2 K, 2 K) of the pairs' parts of the K ||E ghat||^2, then of the K <E ghat, E h>.

    Args:
        gram: (N, N) score Gram.
        updates: (K, N) of `mean_coefficients`.
        direction: (N,) the same of the direction h.
    """
    count = len(updates)
    each = np.arange(count)
    return WeightedKernels(
        gram=gram,
        weights=np.concatenate([updates, direction[None]]),
        first=np.append(each, each),
        second=np.append(each, np.full(count, count)),
    ).covariance()
