"""Inner products of groups' updates, many kinds of update at once: what `groups` and `bias` average.

Shape letters: N responses, n of a group, B groups, P permutations, K kinds of update, V values of a group.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from gradvar.estimators.pairs import WeightedKernels, mean_coefficients

Array = NDArray[np.float64]

PLACES = 2**15
"""Places in a Gram looked up together, those of some permutations: few enough for a processor's cache."""
MOST_PLACES = 2**23
"""Places in a Gram kept between targets; more are found anew for each."""
ROUNDING = 1e-12
"""A mean over pairs of groups below this share of the groups' own sizes is rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Kinds of update on the groups of one prompt, laid out once for the Grams of all its targets."""

    groups: NDArray[np.intp]
    """(P, B, n) disjoint groups."""
    kinds: Array
    """(K, P, B, n) coefficients c."""
    n_responses: int
    """N."""

    @functools.cached_property
    def means(self) -> Array:
        """(K, N) `mean_coefficients`."""
        return mean_coefficients(self.groups, self.kinds, self.n_responses)

    @functools.cached_property
    def parts(self) -> list[tuple[slice, sparse.csc_array]]:
        """Either half of the permutations and an odd one: which they are, and whom their groups hold (N, p B)."""
        half = len(self.groups) // 2
        cuts = [slice(0, half), slice(half, 2 * half), slice(2 * half, len(self.groups))]
        cuts = [cut for cut in cuts if cut.stop > cut.start]
        return [(cut, _holders(self.groups[cut], self.n_responses)) for cut in cuts]

    @functools.cached_property
    def chunks(self) -> list[_Chunk]:
        """Some permutations at a time."""
        n, count = self.n_responses, len(self.kinds)
        keep = self.groups.size * self.groups.shape[2] <= MOST_PLACES
        together = max(1, PLACES // math.prod((*self.groups.shape[1:], self.groups.shape[2])))
        found = []
        for start in range(0, len(self.groups), together):
            where = slice(start, start + together)
            part, chosen = self.groups[where], np.ascontiguousarray(np.moveaxis(self.kinds[:, where], 0, -1))
            permutations = len(part)
            rows, each = part.reshape(permutations, -1), np.arange(permutations)[:, None]
            spread = np.zeros((n, permutations, count))
            spread[rows, each] = chosen.reshape(permutations, -1, count)
            found.append(
                _Chunk(
                    where=where,
                    coefficients=chosen,
                    spread=spread.reshape(n, -1),
                    back=rows * permutations + each,
                    places=_places(part, n) if keep else None,
                )
            )
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """Some permutations of a layout; kinds last, which is fastest."""

    where: slice
    coefficients: Array
    """(p, B, n, K) c."""
    spread: Array
    """(N, p K) c by response, 0 where it is in no group."""
    back: NDArray[np.intp]
    """(p, B n) rows of (N p, K) that are the groups' responses."""
    places: NDArray[np.intp] | None
    """(p, B, n, n) where in the flat Gram the inner products inside groups lie."""


def _places(groups: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    return np.asarray(groups[..., :, None] * n + groups[..., None, :])


@dataclass(frozen=True, kw_only=True, eq=False)
class Reach:
    """Some permutations' coefficients c, and what the Gram makes of them; kinds last."""

    where: slice
    """Which permutations."""
    coefficients: Array
    """(p, B, n, K) c."""
    inside: Array
    """(p, B, n, K) sum over the own group of S_ij c_j."""
    beyond: Array
    """(p, B, n, K) sum over the other groups of S_ij c_j."""


def reaches(gram: Array, layout: Layout) -> Iterator[Reach]:
    """Yield the reach of all kinds, some permutations at a time."""
    flat = np.ascontiguousarray(gram).reshape(-1)
    for chunk in layout.chunks:
        c = chunk.coefficients
        every = (gram @ chunk.spread).reshape(-1, c.shape[-1]).take(chunk.back, axis=0).reshape(c.shape)
        places = _places(layout.groups[chunk.where], gram.shape[0]) if chunk.places is None else chunk.places
        inside = flat.take(places) @ c
        every -= inside
        yield Reach(where=chunk.where, coefficients=c, inside=inside, beyond=every)


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


def _holders(groups: NDArray[np.intp], n: int) -> sparse.csc_array:
    """(N, P B) 1 where a group (P, B, n) holds a response."""
    size, members = groups.shape[2], groups.reshape(-1)
    ends = np.arange(0, members.size + 1, size)
    return sparse.csc_array((np.ones(members.size), members, ends), shape=(n, members.size // size))


def sums_by_response(groups: NDArray[np.intp], n: int, values: Array) -> Array:
    """(N, V): for every response the sum of the values (P, B, V) of the groups that hold it."""
    return np.asarray(_holders(groups, n) @ values.reshape(-1, values.shape[-1]))


class Tally(NamedTuple):
    """Sums of groups' values over some permutations."""

    totals: Array
    """(V,) over all groups."""
    gone: Array
    """(N, V) over the groups that hold a response (`sums_by_response`)."""

    def __add__(self, other: Tally) -> Tally:  # type: ignore[override]
        """Over both."""
        return Tally(self.totals + other.totals, self.gone + other.gone)


def tallies(layout: Layout, values: Array) -> list[Tally]:
    """Tally the values (P, B, V) of all permutations, then of either half (none where P < 2)."""
    found = [
        Tally(values[where].sum(axis=(0, 1)), holders @ values[where].reshape(-1, values.shape[-1]))
        for where, holders in layout.parts
    ]
    return [functools.reduce(operator.add, found), *(found[:2] if len(values) > 1 else ())]


def half_differences(permutations: int, replicates: Sequence[Sequence[Array]]) -> list[Array]:
    """How far the choice of permutations moves delete-one replicates: half the difference between two halves.

    A response's replicate rests on its own few groups. What they differ in from the other responses' by chance of
    the draw adds to a jackknife variance and not to the estimate's: 7% of it for a length pressure, half and more
    where two rules nearly agree (128 permutations; a quarter of that with 512). Both halves are independent given the
    responses, so the mean square of half their difference estimates that part without bias. An odd permutation is in
    neither, and counts in the factor.

    Args:
        permutations: P.
        replicates: Arrays (1 + N, ...), estimates, then delete-one replicates: of each of the `tallies`.

    Returns:
        For every array (N, ...), centred; 0 where P < 2.
    """
    if permutations < 2:
        return [np.zeros_like(one[1:]) for one in replicates[0]]
    _, first, second = replicates
    factor = 0.5 * math.sqrt(2.0 * (permutations // 2) / permutations)
    found = [factor * (a[1:] - b[1:]) for a, b in zip(first, second, strict=True)]
    return [one - one.mean(axis=0) for one in found]


def pair_covariances(gram: Array, means: Array, directions: int, group_size: int) -> tuple[Array, Array]:
    """Covariances (R, 3 + H, 3 + H) of what pairs of responses add, and traces (R, 3 + H): `Products.pairs`, `traces`.

    Of same, cross, mixed with each direction and direction 0 (`pairs`).

    Args:
        gram: (N, N) score Gram.
        means: (R + H, N) `mean_coefficients` of the updates, then of the directions.
        directions: H.
        group_size: n.
    """
    ways = len(means) - np.arange(directions, 0, -1)
    updates = np.arange(len(means) - directions)
    # Of each update: its square, its products with the directions; of all the square of direction 0.
    second = np.concatenate([updates[:, None], np.broadcast_to(ways, (len(updates), directions))], axis=1)
    first = np.broadcast_to(updates[:, None], second.shape)
    kernels = WeightedKernels(
        gram=gram,
        weights=means,
        first=np.append(first.reshape(-1), ways[0]),
        second=np.append(second.reshape(-1), ways[0]),
    )
    whole, own = kernels.covariance(), kernels.traces()
    size = 1 + directions
    # same is (n - 1)/n of cross.
    spread = np.insert(np.eye(size + 1), 0, 0.0, axis=0)
    spread[0, 0] = (group_size - 1) / group_size
    last = np.full((len(updates), 1), len(whole) - 1)
    mine = np.concatenate([size * updates[:, None] + np.arange(size), last], axis=1)
    return np.asarray(spread @ whole[mine[:, :, None], mine[:, None, :]] @ spread.T), own[mine] @ spread.T


def reward_pairs(layout: Layout, direction: int, values: Array) -> Array:
    """Standard deviations (V,), with sign, of the part of means over groups that pairs of rewards explain.

    e_i = n (mean coefficient of i), for grad J the reward less its mean, and q_b = sum_(i<j) e_i e_j of a group, which
    nothing of first order explains. kappa = Cov(values, q) / Var(q) gives a mean over groups the part kappa C(n, 2)
    times the mean of e_i e_j over all pairs, whose variance is Var(e)^2 / C(N, 2).

    Args:
        layout: Whose kinds hold grad J.
        direction: Which of them it is.
        values: (P, B, V) of every group.
    """
    n, size = layout.n_responses, layout.groups.shape[2]
    e = layout.means[direction]
    e = (e - e.mean())[layout.groups]
    q = ((e.sum(axis=-1) ** 2 - (e**2).sum(axis=-1)) / 2.0).reshape(-1)
    q = q - q.mean()
    size_of_q = float(q @ q)
    if size_of_q == 0.0:
        return np.zeros(values.shape[-1])
    slopes = q @ values.reshape(-1, values.shape[-1]) / size_of_q
    pairs, all_pairs = size * (size - 1) / 2.0, n * (n - 1) / 2.0
    return np.asarray(slopes * pairs * float((e**2).mean()) / math.sqrt(all_pairs))
