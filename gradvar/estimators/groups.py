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

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.advantages import advantages
from gradvar.estimators.aggregation import Rule, scope_weights

Array = NDArray[np.float64]

PERMUTATIONS = 512
"""Default P."""


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


def group_coefficients(
    groups: NDArray[np.intp],
    rewards: Array,
    lengths: Array,
    rule: Rule,
    *,
    advantage: str,
    alpha: float | None = None,
    max_length: float | None = None,
) -> Array:
    """Coefficients c = x A (P, B, n) of the update of every group, weights and advantages computed inside it."""
    inside = lengths[groups]
    weights = scope_weights(rule, inside, lambda x: x.sum(axis=-1, keepdims=True), alpha=alpha, max_length=max_length)
    coefficients: Array = weights * advantages(rewards[groups], advantage, lengths=inside)
    return coefficients


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
    second_order: float
    """Variance of cross that comes from pairs of responses, 2/(N (N - 1)) mean <z_i, z_j>^2 over i != j, z_i = n
    (mean coefficient of i) s_i centred: a jackknife counts that part twice."""


def group_moments(gram: Array, groups: NDArray[np.intp], coefficients: Array) -> GroupMoments:
    """Compute both moments and all delete-one replicates from one Gram.

    Args:
        gram: (N, N) score Gram.
        groups: (P, B, n) disjoint groups from `draw_groups`.
        coefficients: (P, B, n) from `group_coefficients`.

    Returns:
        The moments. Cost: one (N, N) by (N, P) product and P N n look-ups.
    """
    permutations = groups.shape[0]
    n = gram.shape[0]
    rows = groups.reshape(permutations, -1)
    spread = np.zeros((permutations, n))
    np.put_along_axis(spread, rows, coefficients.reshape(permutations, -1), axis=1)
    reach = np.take_along_axis(spread @ gram, rows, axis=1).reshape(groups.shape)
    to_all = (coefficients * reach).sum(axis=-1)
    diagonal = group_self_products(gram, groups, coefficients)
    return moments_from_products(diagonal, to_all, groups, n, _second_order(gram, groups, coefficients))


def group_self_products(gram: Array, groups: NDArray[np.intp], coefficients: Array) -> Array:
    """K_bb (P, B) of every group."""
    blocks = gram[groups[..., :, None], groups[..., None, :]]
    reach = np.matmul(blocks, coefficients[..., None])[..., 0]
    products: Array = (coefficients * reach).sum(axis=-1)
    return products


def _second_order(gram: Array, groups: NDArray[np.intp], coefficients: Array) -> float:
    n = gram.shape[0]
    members = groups.reshape(-1)
    times = np.bincount(members, minlength=n)
    total = np.bincount(members, weights=coefficients.reshape(-1), minlength=n)
    factor = groups.shape[2] * total / np.maximum(times, 1)
    products = gram * np.outer(factor, factor)
    means = products.mean(axis=1)
    products = products - means[:, None] - means[None, :] + means.mean()
    np.fill_diagonal(products, 0.0)
    return float(2.0 * (products**2).sum() / (n * (n - 1.0)) ** 2)


def moments_from_products(
    diagonal: Array, to_all: Array, groups: NDArray[np.intp], n: int, second_order: float
) -> GroupMoments:
    """Turn self products K_bb (P, B) and products with all groups sum_a K_ab (P, B) into moments and replicates."""
    permutations, count, size = groups.shape
    to_others = to_all - diagonal
    same_total, cross_total = diagonal.sum(), to_others.sum()
    members = groups.reshape(-1)

    def per_response(values: Array) -> Array:
        sums = np.bincount(members, weights=np.repeat(values.reshape(-1), size), minlength=n)
        return np.asarray(sums, dtype=np.float64)

    times = np.bincount(members, minlength=n).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        same_without = (same_total - per_response(diagonal)) / (permutations * count - times)
        pairs = permutations * count * (count - 1) - 2.0 * times * (count - 1)
        cross_without = (cross_total - 2.0 * per_response(to_others)) / np.where(pairs > 0, pairs, np.nan)
    return GroupMoments(
        same=float(same_total / (permutations * count)),
        cross=float(cross_total / (permutations * count * (count - 1))),
        same_without=same_without,
        cross_without=cross_without,
        second_order=second_order,
    )


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
