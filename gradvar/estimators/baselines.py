"""Assumption 3: responses are independent given the group's baseline.

A baseline taken inside the group ties its responses together. The update with the group's baseline is set beside the
update with the baseline of all N responses, on the same groups:

    variance ratio   tr Var(ghat, group) / tr Var(ghat, all)
    norm ratio       E sum_i ||c_i s_i||^2, group over all: the change of scale alone (a group's std, silent groups)
    ratio            variance ratio / norm ratio: what the ties add or take away; 1 where responses are independent

The variance ratio alone would condemn independent responses: with grpo at n = 8 it is 0.86 by scale (simulated, ratio
1.00). The ratio's interval covers 97 to 100% at N of 64 and 128 (the permutations' own noise is out of its error, the
few degrees of freedom that this leaves are not); with one reward in ten it is often not given at 32. The two factors
carry a bias of order 1/N, since the baseline of all holds the response itself, and cover less (54 to 97%); it cancels
in the ratio.
Every advantage is affine in the rewards, A = p r + q, and so is the replicate in which one response is left out of the
baseline too. Shape letters: N responses, n of a group, B groups, P permutations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.additive import Sums
from gradvar.estimators.advantages import advantages
from gradvar.estimators.aggregation import Rule
from gradvar.estimators.group_products import Layout, sums_by_response
from gradvar.estimators.groups import group_coefficients, moments_of_kinds
from gradvar.estimators.quasi import Dependence

Array = NDArray[np.float64]


def affine_advantage(rewards: Array, kind: str, lengths: Array) -> tuple[Array, Array]:
    """(p, q), each (1 + N,): A = p r + q over all responses, then over all but each.

    Both are 0 where the rewards in question are all equal and the kind has a baseline.
    """
    n = len(rewards)
    whole = _affine(rewards[None], kind, lengths[None])
    if n < 3:
        nothing = np.full(n, np.nan)
        return np.concatenate([whole[0], nothing]), np.concatenate([whole[1], nothing])
    others = np.nonzero(~np.eye(n, dtype=bool))[1].reshape(n, n - 1)
    without = _affine(rewards[others], kind, lengths[others])
    return np.concatenate([whole[0], without[0]]), np.concatenate([whole[1], without[1]])


def _affine(rewards: Array, kind: str, lengths: Array) -> tuple[Array, Array]:
    """(p, q) of every row."""
    factors = advantages(rewards, kind, lengths=lengths)

    def ends(values: Array, where: NDArray[np.intp]) -> Array:
        return np.take_along_axis(values, where[:, None], axis=1)[:, 0]

    lowest, highest = rewards.argmin(axis=1), rewards.argmax(axis=1)
    span = ends(rewards, highest) - ends(rewards, lowest)
    # A constant reward has one advantage, without a slope.
    slope = (ends(factors, highest) - ends(factors, lowest)) / np.where(span == 0.0, 1.0, span)
    return slope, ends(factors, lowest) - slope * ends(rewards, lowest)


def advantage_dependence(
    rewards: Array, kind: str, lengths: Array, *, subset: NDArray[np.bool_] | None = None
) -> Callable[[Callable[[Array], Array]], Dependence]:
    """How squared distances of g_i = A_i s_i share the baseline, for `fit_variance_law`.

    Without response i the advantages of all others are A = p r + q with another p and q, so their distances move,
    which the sandwich alone does not see: at N = 64 the within exponent's interval covered 86% where rewards follow
    the length. Distances are quadratic in A, so every replicate is a sum of the same three vectors.

    Args:
        rewards: (N,) verified rewards.
        kind: Of `advantages`.
        lengths: (N,) tokens.
        subset: (N,) True for the responses that are fitted.

    Returns:
        A kind of distance, factors (N,) to the distances (N,) or those of the subset, quadratic in the factors, to its
        dependence: q (n, m) to sum over j != i of q_j (D_j - D_j without i), (n, m).
    """
    centred = rewards - rewards.mean()
    ones = np.ones_like(centred)
    p, q = affine_advantage(rewards, kind, lengths)
    q = q + p * rewards.mean()
    change = np.stack([p[0] ** 2 - p[1:] ** 2, p[0] * q[0] - p[1:] * q[1:], q[0] ** 2 - q[1:] ** 2], axis=1)
    if subset is not None:
        change = change[subset]

    def of_distances(spread: Callable[[Array], Array]) -> Dependence:
        squares, flat, both = (spread(x) for x in (centred, ones, centred + ones))
        parts = np.stack([squares, both - squares - flat, flat], axis=1)
        own = (change * parts).sum(axis=1)
        return lambda pull: np.asarray(change @ (parts.T @ pull) - own[:, None] * pull)

    return of_distances


@dataclass(frozen=True, kw_only=True, eq=False)
class Baselines:
    """Groups of one prompt with both baselines, laid out once for the Grams of all its targets."""

    slope: Array
    """(1 + N,) p of everyone's baseline."""
    constant: Array
    """(1 + N,) q."""
    halves: list[Layout]
    """Either half of the permutations (the one where P = 1), with four kinds of update: the group's baseline, and the
    weights times the rewards, alone, and times both added."""

    @classmethod
    def of(
        cls,
        groups: NDArray[np.intp],
        rewards: Array,
        lengths: Array,
        rule: Rule,
        *,
        advantage: str,
        alpha: float | None = None,
        max_length: float | None = None,
    ) -> Baselines:
        """From the groups.

        Args:
            groups: (P, B, n) disjoint groups.
            rewards: (N,) verified rewards.
            lengths: (N,) tokens.
            rule: Aggregation.
            advantage: Kind of `advantages`.
            alpha: Exponent of vl_norm.
            max_length: M in tokens.
        """
        # Rewards around their mean keep p r + q free of cancellation.
        centred = rewards - rewards.mean()
        p, q = affine_advantage(rewards, advantage, lengths)
        options: dict[str, Any] = {"alpha": alpha, "max_length": max_length}
        own = group_coefficients(
            groups, centred if advantage != "raw" else rewards, lengths, rule, advantage=advantage, **options
        )
        weights = group_coefficients(groups, rewards, lengths, rule, advantage="score", **options)
        weighted = weights * centred[groups]
        kinds = np.stack([own, weighted, weights, weighted + weights])
        half = len(groups) // 2
        cuts = [slice(0, half), slice(half, None)] if half else [slice(0, None)]
        return cls(
            slope=p,
            constant=q + p * rewards.mean(),
            halves=[Layout(groups=groups[cut], kinds=kinds[:, cut], n_responses=len(rewards)) for cut in cuts],
        )

    def sums(self, gram: Array) -> Sums:
        """Four parts from one target's Gram (N, N): variance with the group's baseline, with everyone's, both norms."""
        tables = [self._table(gram, layout) for layout in self.halves]
        sizes = [len(layout.groups) for layout in self.halves]
        whole = np.average(tables, axis=0, weights=sizes)
        halves = (tables[0][1:], tables[1][1:]) if len(tables) > 1 else None
        return Sums(value=whole[0], without=whole[1:], halves=halves)

    def _table(self, gram: Array, layout: Layout) -> Array:
        """(1 + N, 4)."""
        p, q, parts = self.slope, self.constant, []
        for group, squares, ones, both in (_variances(gram, layout), _norms(np.diagonal(gram), layout)):
            mixed = (both - squares - ones) / 2.0
            parts += [group, p**2 * squares + 2.0 * p * q * mixed + q**2 * ones]
        return np.stack(parts, axis=1)


def _variances(gram: Array, layout: Layout) -> list[Array]:
    return [
        np.concatenate([[found.same - found.cross], found.same_without - found.cross_without])
        for found in moments_of_kinds(gram, layout)
    ]


def _norms(norms: Array, layout: Layout) -> list[Array]:
    groups = layout.groups
    values = np.einsum("kpbi,kpbi,pbi->pbk", layout.kinds, layout.kinds, norms[groups])
    gone = sums_by_response(groups, len(norms), values)
    left = groups.shape[0] * groups.shape[1] - np.bincount(groups.reshape(-1), minlength=len(norms))
    means, total = values.mean(axis=(0, 1)), values.sum(axis=(0, 1))
    return list(np.concatenate([means[None], (total - gone) / np.where(left > 0, left, np.nan)[:, None]]).T)


def log_variance_ratio(parts: Array) -> Array:
    """Log of the variance ratio."""
    return np.asarray(np.log(parts[..., 0]) - np.log(parts[..., 1]))


def log_norm_ratio(parts: Array) -> Array:
    """Log of the norm ratio."""
    return np.asarray(np.log(parts[..., 2]) - np.log(parts[..., 3]))


def log_independence_ratio(parts: Array) -> Array:
    """Log of variance ratio over norm ratio."""
    return log_variance_ratio(parts) - log_norm_ratio(parts)
