"""Inner products of an aggregated update with itself and with directions, over disjoint groups.

Over pairs of disjoint groups of one permutation the mean of <ghat_a, h_b> estimates <E ghat, E h> without bias, for any
second kind of update h:

    h = grad J        (1/n) sum_i rloo(r)_i s_i
    h = grad E[L]     (1/n) sum_i rloo(L)_i s_i                          E[(L - Lbar) s]
    h = grad H        -(1/n) sum_i rloo(sum_t log pi)_i s_i              H = -E sum_t log pi

Shape letters: N responses, n of a group, B groups, P permutations, R kinds of update, H directions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.advantages import advantages
from gradvar.estimators.group_products import (
    Layout,
    Tally,
    dot,
    dots,
    half_differences,
    pair_covariances,
    reaches,
    reward_pairs,
    tallies,
    without_rounding,
)
from gradvar.estimators.groups import GroupMoments, pairs_of_kinds

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """Unbiased inner products of R kinds of update with themselves and with H directions.

    First axis: the estimate, then N delete-one replicates.
    """

    same: Array
    """(1 + N, R): E||ghat||^2."""
    cross: Array
    """(1 + N, R): ||E ghat||^2."""
    mixed: Array
    """(1 + N, R, H): <E ghat, E h>."""
    direction: Array
    """(1 + N, H): ||E h||^2."""
    noise: tuple[Array, Array, Array, Array]
    """What the choice of permutations adds to the replicates of each, (N, ...) (`half_differences`)."""
    pairs: Array
    """(R, 3 + H, 3 + H) sampling covariances of what pairs of responses add to same, cross, mixed with each of H
    directions and direction 0, in this order: a jackknife counts that part twice."""
    traces: Array
    """(R, 3 + H) by how much each of these would be too large if a response's product with itself counted too."""
    curved: Array
    """(R + 1,) standard deviations, with sign, of what pairs of rewards inside a group add to mixed with direction 0 of
    each update and to direction 0 itself (`reward_pairs`)."""
    deviations: Array
    """(N,) rewards less their mean, from the mean coefficients of direction 0."""

    @property
    def responses(self) -> int:
        """N."""
        return int(self.same.shape[0]) - 1

    def of_updates(self, columns: slice) -> Products:
        """Some of the updates."""
        same, cross, mixed, direction = self.noise
        return replace(
            self,
            same=self.same[:, columns],
            cross=self.cross[:, columns],
            mixed=self.mixed[:, columns],
            noise=(same[:, columns], cross[:, columns], mixed[:, columns], direction),
            pairs=self.pairs[columns],
            traces=self.traces[columns],
            curved=np.append(self.curved[:-1][columns], self.curved[-1]),
        )

    def of_directions(self, count: int) -> Products:
        """The first directions."""
        same, cross, mixed, direction = self.noise
        kept = [0, 1, *range(2, 2 + count), 2 + self.direction.shape[1]]
        return replace(
            self,
            mixed=self.mixed[..., :count],
            direction=self.direction[:, :count],
            noise=(same, cross, mixed[..., :count], direction[:, :count]),
            pairs=self.pairs[:, kept][:, :, kept],
            traces=self.traces[:, kept],
        )


def products(gram: Array, layout: Layout, directions: int) -> Products:
    """Compute all inner products at once.

    Args:
        gram: (N, N) score Gram.
        layout: Coefficients of the R kinds of update, then of the H directions.
        directions: H.

    Returns:
        The products with their delete-one replicates: the same permutations without the groups that hold a response.
    """
    groups = layout.groups
    n, count = gram.shape[0], groups.shape[1]
    r, h = len(layout.kinds) - directions, directions
    # Values of every group: <u, u> inside it; over pairs of groups <u, u>, <u, d> both ways round, and <d, d>; 1.
    values = np.empty((*groups.shape[:2], 2 * r + r * h + h + 1))
    values[..., -1] = 1.0
    aimed = np.zeros(h)
    for reach in reaches(gram, layout):
        c, beyond = reach.coefficients, reach.beyond
        inside, between = dot(c, reach.inside), 2.0 * dot(c, beyond)
        mixed = dots(c[..., :r], beyond[..., r:]) + dots(beyond[..., :r], c[..., r:])
        values[reach.where, :, :r] = inside[..., :r]
        values[reach.where, :, r : 2 * r] = between[..., :r]
        values[reach.where, :, 2 * r : 2 * r + r * h] = mixed.reshape(*mixed.shape[:2], r * h)
        values[reach.where, :, 2 * r + r * h : -1] = between[..., r:]
        aimed += inside[..., r:].sum(axis=(0, 1))
    own = slice(0, r)
    squares = np.concatenate([values[..., own].sum(axis=(0, 1)), aimed]) / values[..., 0].size
    between = np.sqrt(np.outer(squares[:r], squares[r:])).reshape(-1)
    sizes = np.concatenate([squares[:r], between, squares[r:]])

    def replicates(tally: Tally) -> tuple[Array, Array, Array, Array]:
        """All four means over the permutations, then without each response: its groups' terms go with it."""
        totals, gone = tally
        number = totals[-1] - np.append(0.0, gone[:, -1])
        sums = np.concatenate([totals[None, own], totals[own] - gone[:, own]])
        single = sums / np.where(number > 0, number, np.nan)[:, None]
        # Over a != b: a response takes its group's pairs with it, as first and as second.
        pairs = np.concatenate([totals[None, r:-1], totals[r:-1] - 2.0 * gone[:, r:-1]]) / 2.0
        number = (totals[-1] - 2.0 * np.append(0.0, gone[:, -1])) * (count - 1)
        pairs = without_rounding(pairs / np.where(number > 0, number, np.nan)[:, None], sizes)
        return single, pairs[:, :r], pairs[:, r : r + r * h].reshape(1 + n, r, h), pairs[:, r + r * h :]

    found = [replicates(tally) for tally in tallies(layout, values)]
    same, cross, mixed, direction = found[0]
    noise = half_differences(len(groups), found)
    aim = layout.means[r]
    pairs, traces = pair_covariances(gram, layout.means, h, groups.shape[2])
    return Products(
        same=same,
        cross=cross,
        mixed=mixed,
        direction=direction,
        noise=(noise[0], noise[1], noise[2], noise[3]),
        pairs=pairs,
        traces=traces,
        curved=reward_pairs(
            layout, r, values[..., [*range(2 * r, 2 * r + r * h, h), 2 * r + r * h]] / max(count - 1, 1)
        ),
        deviations=aim - aim.mean(),
    )


def moments_of_updates(gram: Array, layout: Layout, every: Products, count: int) -> list[GroupMoments]:
    """Moments of the first `count` kinds of update, from their `products` on the same layout."""
    own = slice(0, count)
    covariances, bends = pairs_of_kinds(gram, layout.means[own], every.same[1:, own], every.cross[1:, own])
    return [
        GroupMoments(
            same=float(every.same[0, k]),
            cross=float(every.cross[0, k]),
            same_without=every.same[1:, k],
            cross_without=every.cross[1:, k],
            same_noise=every.noise[0][:, k],
            cross_noise=every.noise[1][:, k],
            kind=k,
            pairs=covariances,
            bend=bends[k],
        )
        for k in range(count)
    ]


def reward_direction(rewards: Array, groups: NDArray[np.intp]) -> Array:
    """Coefficients (P, B, n) of grad J."""
    return np.asarray(advantages(rewards[groups], "rloo") / groups.shape[2])


def length_direction(lengths: Array, groups: NDArray[np.intp]) -> Array:
    """Coefficients (P, B, n) of grad E[L], in tokens."""
    return np.asarray(advantages(lengths[groups], "rloo") / groups.shape[2])


def entropy_direction(log_probs: Array, groups: NDArray[np.intp]) -> Array:
    """Coefficients (P, B, n) of grad H, H = -E sum_t log pi in nats."""
    return np.asarray(-advantages(log_probs[groups], "rloo") / groups.shape[2])
