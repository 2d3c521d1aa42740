"""Random groups of responses from one prompt, and what their inner products say about an aggregated update.

A permutation of the N responses is cut into floor(N/n) disjoint groups. Group b has the update
ghat_b = sum_i c_i s_i with c_i = x_i A_i computed inside the group, and K_ab = <ghat_a, ghat_b> comes from the
score Gram. Groups of one permutation share no response, so over permutations

    mean K_bb            estimates E||ghat||^2     without bias ("same")
    mean K_ab, a != b    estimates ||E ghat||^2    without bias ("cross")

The delete-one replicate for response i leaves out, in the same permutations, every group (and every pair of groups)
that holds i: no second draw and no response beside its own copy. Shape letters: N responses, n of a group,
B = floor(N/n) groups, P permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import advantages
from gradvar.estimators.aggregation import Rule, scope_weights
from gradvar.estimators.group_products import (
    Layout,
    Tally,
    dot,
    half_differences,
    reaches,
    tallies,
    without_rounding,
)
from gradvar.estimators.pairs import WeightedKernels, mean_coefficients

Array = NDArray[np.float64]

PERMUTATIONS = 512
"""Default P."""
PAIRS_ROUNDING = 1e-9
"""A difference's pairs below this share of both parts' are rounding: the two updates are one."""


def draw_groups(n_responses: int, group_size: int, permutations: int, *, rng: np.random.Generator) -> NDArray[np.intp]:
    """Disjoint random groups (P, B, n): indices of responses.

    Raises:
        GradvarError: A group size below 1, or so large that no two disjoint groups exist.
    """
    if group_size < 1 or permutations < 1:
        raise GradvarError(f"group_size and permutations must be at least 1, got {group_size} and {permutations}")
    count = n_responses // group_size
    if count < 2:
        raise GradvarError(
            f"group size {group_size} needs at least {2 * group_size} responses (two disjoint groups), "
            f"received {n_responses}: sample more, or ask for a smaller group"
        )
    order = rng.permuted(np.broadcast_to(np.arange(n_responses), (permutations, n_responses)), axis=1)
    return order[:, : count * group_size].reshape(permutations, count, group_size)


def variant_coefficients(
    groups: NDArray[np.intp],
    rewards: Array,
    lengths: Array,
    variants: Sequence[tuple[Rule, float | None]],
    *,
    advantage: str,
    max_length: float | None = None,
) -> Array:
    """Coefficients c = x A (K, P, B, n) of the updates of K rules with their alphas, on the same groups."""
    inside = lengths[groups]
    factors = advantages(rewards[groups], advantage, lengths=inside)

    def total(values: Array) -> Array:
        return np.asarray(values.sum(axis=-1, keepdims=True))

    weights = [scope_weights(rule, inside, total, alpha=alpha, max_length=max_length) for rule, alpha in variants]
    return np.stack([one * factors for one in weights])


def group_coefficients(
    groups: NDArray[np.intp],
    rewards: Array,
    lengths: Array,
    rule: Rule,
    *,
    advantage: str,
    alpha: float | None = None,
    max_length: float | None = None,
    masked: NDArray[np.bool_] | None = None,
) -> Array:
    """Coefficients c = x A (P, B, n) of the update of every group, weights and advantages computed inside it.

    `masked` (N,) marks responses whose tokens carry no loss (DAPO's overlong filtering of truncated ones): their reward
    still enters the group's advantage, they neither add to the update nor count in the weights (verl's reading).
    """
    if masked is None:
        one = [(rule, alpha)]
        found = variant_coefficients(groups, rewards, lengths, one, advantage=advantage, max_length=max_length)
        return np.asarray(found[0])
    inside = lengths[groups]
    factors = advantages(rewards[groups], advantage, lengths=inside)
    kept = ~masked[groups]
    # A group without a response left has no update: its sums are kept from 0 and its weights are 0.
    some = kept | ~kept.any(axis=-1, keepdims=True)
    weights = scope_weights(
        rule, inside, lambda x: (x * some).sum(axis=-1, keepdims=True), alpha=alpha, max_length=max_length
    )
    return np.asarray(np.where(kept, weights * factors, 0.0))


def loud_groups(groups: NDArray[np.intp], rewards: Array) -> NDArray[np.bool_]:
    """Groups (P, B) that dynamic sampling keeps: those whose rewards are not all equal (DAPO)."""
    return np.asarray(np.ptp(rewards[groups], axis=-1) > 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupMoments:
    """The two inner products of one kind of update, with their delete-one replicates."""

    same: float
    """Mean K_bb: E||ghat||^2."""
    cross: float
    """Mean K_ab, a != b: ||E ghat||^2; may come out negative."""
    same_without: Array
    """(N,) delete-one replicates of same."""
    cross_without: Array
    """(N,) delete-one replicates of cross; NaN where fewer than two groups are left (B = 2)."""
    same_noise: Array
    """(N,) what the choice of permutations adds to the replicates of same (`half_differences`)."""
    cross_noise: Array
    """(N,) likewise of cross."""
    kind: int
    """Which of the kinds measured together this is."""
    pairs: Array
    """(K, K) covariances of what pairs of responses add to cross of the K kinds measured together (`pairs`)."""
    bend: Array
    """(2, 2) sum_ij u_i w_ij u_j over the influences u = (same, cross) and the second differences w of cross, which
    skew an estimate's error beside the influences' own skewness."""

    def combined(self, along_same: float, along_cross: float, group_size: int) -> tuple[float, float]:
        """Variance from pairs and bend of an estimate with these slopes; same holds (n - 1)/n of the pairs of cross."""
        slope = along_cross + along_same * (group_size - 1) / group_size
        way = np.array([along_same, along_cross])
        return slope**2 * float(self.pairs[self.kind, self.kind]), slope * float(way @ self.bend @ way)

    def pairs_of_difference(self, other: GroupMoments, slope: float, other_slope: float) -> float:
        """Variance that pairs add to slope cross - other_slope cross'; 0, not known, of kinds not measured together."""
        if self.pairs is not other.pairs:
            return 0.0
        own = slope**2 * self.pairs[self.kind, self.kind] + other_slope**2 * self.pairs[other.kind, other.kind]
        found = own - 2.0 * slope * other_slope * self.pairs[self.kind, other.kind]
        return float(found) if found > PAIRS_ROUNDING * own else 0.0


def group_moments(
    gram: Array, groups: NDArray[np.intp], coefficients: Array, kept: NDArray[np.bool_] | None = None
) -> GroupMoments:
    """Compute both moments and all delete-one replicates from one Gram.

    Args:
        gram: (N, N) score Gram.
        groups: (P, B, n) disjoint groups from `draw_groups`.
        coefficients: (P, B, n) from `group_coefficients`.
        kept: (P, B) groups that take part, given which everything is estimated (dynamic sampling); None: all.

    Returns:
        The moments, NaN where no two kept groups meet in a permutation. Cost: one (N, N) by (N, P) product and P N n
        look-ups.
    """
    kinds = coefficients if kept is None else coefficients * kept[..., None]
    return moments_of_kinds(gram, Layout(groups=groups, kinds=kinds[None], n_responses=len(gram)), kept)[0]


def moments_of_kinds(gram: Array, layout: Layout, kept: NDArray[np.bool_] | None = None) -> list[GroupMoments]:
    """Compute the moments of K kinds of update on the same groups; 0 in those not `kept`, else as `group_moments`."""
    n, groups = gram.shape[0], layout.groups
    held = np.ones(groups.shape[:2]) if kept is None else kept.astype(np.float64)
    count = len(layout.kinds)
    # Values of every group: K_bb, then sum over the others of K_ab, then what counts groups and pairs.
    values = np.empty((*groups.shape[:2], 2 * count + 2))
    for reach in reaches(gram, layout):
        values[reach.where, :, :count] = dot(reach.coefficients, reach.inside)
        values[reach.where, :, count : 2 * count] = dot(reach.coefficients, reach.beyond)
    values[..., -2], values[..., -1] = held, held * (held.sum(axis=1, keepdims=True) - 1.0)

    def replicates(tally: Tally) -> tuple[Array, Array]:
        """Both moments of the K kinds, (1 + N, K) each: over the permutations, then without each response."""
        totals, gone = tally
        means = []
        for own, counts, twice in ((slice(0, count), -2, 1.0), (slice(count, 2 * count), -1, 2.0)):
            left = np.append(totals[counts], totals[counts] - twice * gone[:, counts])
            kept_sums = np.concatenate([totals[None, own], totals[own] - twice * gone[:, own]])
            means.append(kept_sums / np.where(left > 0.5, left, np.nan)[:, None])
        return means[0], without_rounding(means[1], means[0][0])

    found = [replicates(tally) for tally in tallies(layout, values)]
    same, cross = found[0]
    means = layout.means if kept is None else mean_coefficients(groups, layout.kinds, n, held)
    covariances, bends = pairs_of_kinds(gram, means, same[1:], cross[1:])
    same_noise, cross_noise = half_differences(len(groups), found)
    return [
        GroupMoments(
            same=float(same[0, k]),
            cross=float(cross[0, k]),
            same_without=same[1:, k],
            cross_without=cross[1:, k],
            same_noise=same_noise[:, k],
            cross_noise=cross_noise[:, k],
            kind=k,
            pairs=covariances,
            bend=bends[k],
        )
        for k in range(count)
    ]


def pairs_of_kinds(gram: Array, means: Array, same: Array, cross: Array) -> tuple[Array, Array]:
    """`GroupMoments.pairs` (K, K) and `GroupMoments.bend` (K, 2, 2) of K kinds of update.

    Args:
        gram: (N, N) score Gram.
        means: (K, N) `mean_coefficients` over the groups that take part.
        same: (N, K) delete-one replicates of same.
        cross: (N, K) likewise.
    """
    n, each = gram.shape[0], np.arange(len(means))
    kernels = WeightedKernels(gram=gram, weights=means, first=each, second=each)
    replicates = np.stack([same, cross]).transpose(2, 0, 1)
    influences = replicates.mean(axis=-1, keepdims=True) - replicates
    return kernels.covariance(), 2.0 / (n * (n - 1.0)) * kernels.along(influences)


def silent_share(rewards: Array, group_size: int) -> float:
    """Probability that a group of n drawn without replacement from these responses has one reward throughout.

    An unbiased estimate of the share of silent groups: sum over reward values of C(count, n) / C(N, n).

    Raises:
        GradvarError: The group is larger than the responses.
    """
    n = len(rewards)
    if not 1 <= group_size <= n:
        raise GradvarError(f"group size {group_size} must lie between 1 and the {n} responses")
    _, counts = np.unique(rewards, return_counts=True)
    steps = np.arange(group_size)
    ratios = np.clip(counts[:, None] - steps, 0, None) / (n - steps)
    return float(ratios.prod(axis=1).sum())
