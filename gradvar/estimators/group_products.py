"""Inner products of groups' updates, many kinds of update at once: what `groups` and `bias` average.

Shape letters: N responses, n of a group, B groups, P permutations, K kinds of update, V values of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[np.float64]

CHUNK = 32
"""Permutations worked on together: few enough for a processor's cache."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reach:
    """Some permutations' coefficients c, and what the Gram makes of them."""

    where: slice
    """Which permutations."""
    coefficients: Array
    """(K, p, B, n) c."""
    inside: Array
    """(K, p, B, n) sum over the own group of S_ij c_j."""
    beyond: Array
    """(K, p, B, n) sum over the other groups of S_ij c_j."""


def reaches(gram: Array, groups: NDArray[np.intp], kinds: Array) -> Iterator[Reach]:
    """Yield the reach of all kinds (K, P, B, n), some permutations at a time."""
    n = gram.shape[0]
    for start in range(0, len(groups), CHUNK):
        where = slice(start, start + CHUNK)
        part, chosen = groups[where], kinds[:, where]
        count, permutations = chosen.shape[:2]
        rows, each = part.reshape(permutations, -1), np.arange(permutations)[:, None]
        spread = np.zeros((count, permutations, n))
        spread[:, each, rows] = chosen.reshape(count, permutations, -1)
        reached = (spread.reshape(-1, n) @ gram).reshape(spread.shape)
        every = reached[:, each, rows].reshape(chosen.shape)
        blocks = gram[part[..., :, None], part[..., None, :]]
        inside = np.moveaxis(np.moveaxis(chosen, 0, 2) @ blocks, 2, 0)
        yield Reach(where=where, coefficients=chosen, inside=inside, beyond=every - inside)


def dot(one: Array, two: Array) -> Array:
    """Sum over the last axis of the product."""
    return np.asarray(np.einsum("...i,...i->...", one, two))


def sums_by_response(groups: NDArray[np.intp], n: int, values: Array) -> Array:
    """(N, V): for every response the sum of the values (V, P, B) of the groups that hold it."""
    size = groups.shape[2]
    members = groups.reshape(-1)
    ends = np.arange(0, members.size + 1, size)
    held = sparse.csc_array((np.ones(members.size), members, ends), shape=(n, members.size // size))
    return np.asarray(held @ values.reshape(len(values), -1).T)
