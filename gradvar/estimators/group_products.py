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

CHUNK = 16
"""Permutations worked on together: few enough for a processor's cache."""


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


def sums_by_response(groups: NDArray[np.intp], n: int, values: Array) -> Array:
    """(N, V): for every response the sum of the values (P, B, V) of the groups that hold it."""
    size = groups.shape[2]
    members = groups.reshape(-1)
    ends = np.arange(0, members.size + 1, size)
    held = sparse.csc_array((np.ones(members.size), members, ends), shape=(n, members.size // size))
    return np.asarray(held @ values.reshape(-1, values.shape[-1]))
