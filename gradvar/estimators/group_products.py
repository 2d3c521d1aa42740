"""Inner products of groups' updates, many kinds of update at once: what `groups` and `bias` average.

Shape letters: N responses, n of a group, B groups, P permutations, K kinds of update, V values of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from gradvar.estimators.pairs import covariance_of_kernels, kernel, mean_coefficients

Array = NDArray[np.float64]

CHUNK = 16
"""Permutations worked on together: few enough for a processor's cache."""
ROUNDING = 1e-12
"""A mean over pairs of groups below this share of the groups' own sizes is rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reach:
    """Some permutations' coefficients c, and what the Gram makes of them; kinds last, which is fastest."""

    where: slice
    """Which permutations."""
    coefficients: Array
    """(p, B, n, K) c."""
    inside: Array
    """(p, B, n, K) sum over the own group of S_ij c_j."""
    beyond: Array
    """(p, B, n, K) sum over the other groups of S_ij c_j."""


def reaches(gram: Array, groups: NDArray[np.intp], kinds: Array) -> Iterator[Reach]:
    """Yield the reach of all kinds (K, P, B, n), some permutations at a time."""
    n = gram.shape[0]
    for start in range(0, len(groups), CHUNK):
        where = slice(start, start + CHUNK)
        part, chosen = groups[where], np.ascontiguousarray(np.moveaxis(kinds[:, where], 0, -1))
        permutations, count = len(part), len(kinds)
        rows, each = part.reshape(permutations, -1), np.arange(permutations)[:, None]
        spread = np.zeros((n, permutations, count))
        spread[rows, each] = chosen.reshape(permutations, -1, count)
        reached = (gram @ spread.reshape(n, -1)).reshape(spread.shape)
        every = reached[rows, each].reshape(chosen.shape)
        blocks = gram[part[..., :, None], part[..., None, :]]
        inside = blocks @ chosen
        yield Reach(where=where, coefficients=chosen, inside=inside, beyond=every - inside)


def dot(one: Array, two: Array) -> Array:
    """(p, B, K): sum over a group's responses of the product, kind by kind."""
    return np.asarray(np.einsum("pbik,pbik->pbk", one, two))


def dots(one: Array, two: Array) -> Array:
    """(p, B, K, H): the same, every kind of the one with every kind of the other."""
    return np.asarray(np.swapaxes(one, -1, -2) @ two)


def without_rounding(means: Array, sizes: Array) -> Array:
    """Means over pairs of groups, 0 where only rounding is left of them.

    With one correct response no two disjoint groups of a permutation have an update, with two none is left when either
    goes: such a mean is 0, and a ratio to what rounding makes of it would be taken for a number.

    Args:
        means: (..., V) means of inner products of different groups.
        sizes: (V,) what they could be: products of the two updates' root mean squares.
    """
    return np.where(np.abs(means) <= ROUNDING * sizes, 0.0, means)


def sums_by_response(groups: NDArray[np.intp], n: int, values: Array) -> Array:
    """(N, V): for every response the sum of the values (P, B, V) of the groups that hold it."""
    size = groups.shape[2]
    members = groups.reshape(-1)
    ends = np.arange(0, members.size + 1, size)
    held = sparse.csc_array((np.ones(members.size), members, ends), shape=(n, members.size // size))
    return np.asarray(held @ values.reshape(-1, values.shape[-1]))


def half_differences(permutations: int, replicates: Callable[[slice], Sequence[Array]]) -> list[Array]:
    """How far the choice of permutations moves delete-one replicates: half the difference between two halves.

    A response's replicate rests on its own few groups. What they differ in from the other responses' by chance of
    the draw adds to a jackknife variance and not to the estimate's: 7% of it for a length pressure, half and more
    where two rules nearly agree (128 permutations; a quarter of that with 512). Both halves are independent given the
    responses, so the mean square of half their difference estimates that part without bias. An odd permutation is in
    neither, and counts in the factor.

    Args:
        permutations: P.
        replicates: Some permutations to arrays (1 + N, ...): estimates, then delete-one replicates.

    Returns:
        For every array (N, ...), centred; 0 where P < 2.
    """
    if permutations < 2:
        return [np.zeros_like(one[1:]) for one in replicates(slice(0, permutations))]
    middle = permutations // 2
    first, second = replicates(slice(0, middle)), replicates(slice(middle, 2 * middle))
    factor = 0.5 * math.sqrt(2.0 * middle / permutations)
    found = [factor * (a[1:] - b[1:]) for a, b in zip(first, second, strict=True)]
    return [one - one.mean(axis=0) for one in found]


def pair_covariances(gram: Array, groups: NDArray[np.intp], updates: Array, directions: Array) -> Array:
    """Covariances (R, 3 + H, 3 + H) of what pairs of responses add: `Products.pairs`.

    Of same, cross, mixed with each direction and direction 0 (`pairs`).
    """
    n, size = gram.shape[0], groups.shape[2]
    ways = mean_coefficients(groups, directions, n)
    first = kernel(gram, ways[0], ways[0])
    found = []
    for mine in mean_coefficients(groups, updates, n):
        rows = np.stack([kernel(gram, mine, mine), *(kernel(gram, mine, way) for way in ways), first])
        # same is (n - 1)/n of cross.
        spread = np.insert(np.eye(len(rows)), 0, 0.0, axis=0)
        spread[0, 0] = (size - 1) / size
        found.append(spread @ covariance_of_kernels(rows) @ spread.T)
    return np.stack(found)


def reward_pairs(groups: NDArray[np.intp], n: int, direction: Array, values: Array) -> Array:
    """Standard deviations (V,), with sign, of the part of means over groups that pairs of rewards explain.

    e_i = n (mean coefficient of i), for grad J the reward less its mean, and q_b = sum_(i<j) e_i e_j of a group, which
    nothing of first order explains. kappa = Cov(values, q) / Var(q) gives a mean over groups the part kappa C(n, 2)
    times the mean of e_i e_j over all pairs, whose variance is Var(e)^2 / C(N, 2).

    Args:
        groups: (P, B, n).
        n: N.
        direction: (P, B, n) coefficients of grad J.
        values: (P, B, V) of every group.
    """
    size, members = groups.shape[2], groups.reshape(-1)
    times = np.maximum(np.bincount(members, minlength=n), 1)
    e = size * np.bincount(members, weights=direction.reshape(-1), minlength=n) / times
    e = (e - e.mean())[groups]
    q = ((e.sum(axis=-1) ** 2 - (e**2).sum(axis=-1)) / 2.0).reshape(-1)
    q = q - q.mean()
    size_of_q = float(q @ q)
    if size_of_q == 0.0:
        return np.zeros(values.shape[-1])
    slopes = q @ values.reshape(-1, values.shape[-1]) / size_of_q
    pairs, all_pairs = size * (size - 1) / 2.0, n * (n - 1) / 2.0
    return np.asarray(slopes * pairs * float((e**2).mean()) / math.sqrt(all_pairs))
