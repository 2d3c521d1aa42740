"""Batches of several prompts formed of the measured responses, for rules that weight over the whole batch.

In every permutation of the responses the prompts are cut at random into floor(K / B) disjoint batches; batch b's m-th
update takes the m-th group of each of its prompts. Updates of one b and different m share prompts and no response
(given); those of different b share nothing (signal). The moments are those of `batches`.
Shape letters: K prompts, n responses of a group, M groups of a prompt, P permutations, C cuts, b batches of B prompts,
R repeats of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.aggregation import Rule, scope_weights
from gradvar.estimators.batches import BatchMoments
from gradvar.estimators.cross_products import CrossProducts
from gradvar.runs.records import PromptScores

Array = NDArray[np.float64]

CUTS = 4
"""Random cuts of the prompts into batches for each permutation of the responses."""


@dataclass(kw_only=True, eq=False)
class _Moment:
    """Totals of one moment over batches or pairs of batches, and what is lost without each prompt."""

    total: Array
    lost: Array
    count: float
    lost_count: Array

    @classmethod
    def empty(cls, repeats: int, prompts: int) -> _Moment:
        return cls(total=np.zeros(repeats), lost=np.zeros((repeats, prompts)), count=0.0, lost_count=np.zeros(prompts))

    def add(self, values: Array, held: Array, times: float = 1.0) -> None:
        """Add values (R, C, b), each standing for `times` terms; held (C, K, b) says which prompts it goes with."""
        self.total += values.sum(axis=(1, 2))
        self.count += times * values[0].size
        self.lost += np.einsum("rcb,ckb->rk", values, held)
        self.lost_count += times * held.sum(axis=(0, 2))

    def add_pairs(self, values: Array, held: Array) -> None:
        """Add values (R, C, b, b) of pairs of batches of one cut; the diagonal is left out."""
        batches = values.shape[-1]
        off = (values * (1.0 - np.eye(batches))).sum(axis=-1)
        self.add(off, held, batches - 1.0)
        # A prompt's batch stands in a pair's first or second place: both are lost with it.
        self.lost += np.einsum("rcb,ckb->rk", off, held)
        self.lost_count += (batches - 1.0) * held.sum(axis=(0, 2))

    def result(self) -> tuple[Array, Array]:
        left = self.count - self.lost_count
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.total / self.count, (self.total[:, None] - self.lost) / np.where(left > 0.5, left, np.nan)


def formed_moments(
    prompts: Sequence[PromptScores],
    products: CrossProducts,
    groups: Mapping[str, NDArray[np.intp]],
    coefficients: Mapping[str, Array],
    rule: Rule,
    sizes: Sequence[int],
    *,
    alpha: float | None,
    max_length: float,
    rng: np.random.Generator,
) -> dict[int, BatchMoments]:
    """Moments of a rule that weights over the whole batch, from disjoint batches of the measured responses.

    Args:
        prompts: K prompts of one target.
        products: Between their responses.
        groups: (P, M, n) disjoint groups of each prompt; P permutations, the same for all, are used up to the smallest.
        coefficients: (P, M, n) of the groups' updates, weights inside the group.
        rule: The rule, weighted over a batch here.
        sizes: B of each kind of batch, at most K / 2.
        alpha: Exponent of vl_norm.
        max_length: M in tokens.
        rng: Cuts the prompts.
    """
    names = [p.prompt_id for p in prompts]
    count = len(names)
    rounds = min(len(groups[name]) for name in names)
    updates = min(groups[name].shape[1] for name in names)
    each = np.arange(count)
    spread, own = {}, np.empty((count, rounds, updates, updates))
    for k, p in enumerate(prompts):
        dense = np.zeros((rounds, updates, len(p.lengths)))
        drawn = groups[p.prompt_id][:rounds, :updates]
        np.put_along_axis(dense, drawn, coefficients[p.prompt_id][:rounds, :updates], axis=2)
        spread[p.prompt_id], own[k] = dense, dense @ p.gram @ dense.swapaxes(1, 2)
    lengths = np.stack([p.lengths[groups[p.prompt_id][:rounds, :updates]] for p in prompts], axis=1)  # (P, K, M, n)
    inside = scope_weights(rule, lengths, lambda x: x.sum(axis=-1, keepdims=True), alpha=alpha, max_length=max_length)
    sums = {size: [_Moment.empty(products.repeats, count) for _ in range(3)] for size in sizes}
    for index in range(rounds):
        inner = products.of_updates({name: dense[index] for name, dense in spread.items()})
        inner = inner.reshape(-1, count, updates, count, updates)
        inner[:, each, :, each, :] = own[:, None, index]  # what is known exactly
        for size in sizes:
            used = count // size * size
            members = np.stack([rng.permutation(count)[:used].reshape(-1, size) for _ in range(CUTS)])  # (C, b, B)
            across = scope_weights(
                rule, lengths[index][members], lambda x: x.sum(axis=(2, 4), keepdims=True), alpha=alpha,
                max_length=max_length,
            )  # fmt: skip
            # The scope enters as one factor of each group: weight over the batch by weight inside the group.
            ratio = np.asarray(across[..., 0] / inside[index][members][..., 0])  # (C, b, B, M)
            _add(sums[size], inner, members, ratio)
    return {size: _moments(*parts) for size, parts in sums.items()}


def _add(sums: Sequence[_Moment], inner: Array, members: NDArray[np.intp], ratio: Array) -> None:
    """Add C cuts: inner (R, K, M, K, M) of groups, members (C, b, B), ratio (C, b, B, M)."""
    cuts, batches, _, updates = ratio.shape
    count = inner.shape[1]
    cut, batch = np.arange(cuts)[:, None, None], np.arange(batches)[None, :, None]
    held = np.zeros((cuts, count, batches))
    held[cut, members, batch] = 1.0
    factors = np.zeros((cuts, updates, count, batches))
    factors[cut[..., None], np.arange(updates), members[..., None], batch[..., None]] = ratio
    # (R, 1, M, M, K, K) between factors of the first and the second group's update: (R, C, M, M, b, b).
    pairs = inner.transpose(0, 2, 4, 1, 3)[:, None]
    made = factors[:, :, None].swapaxes(-1, -2) @ pairs @ factors[:, None]
    power, given, signal = sums
    own = np.einsum("rcmnbb->rcmnb", made)
    diagonal = np.einsum("rcmmb->rcb", own)
    power.add(diagonal / updates, held)
    if updates > 1:
        given.add((own.sum(axis=(2, 3)) - diagonal) / (updates * (updates - 1)), held)
    if batches > 1:
        signal.add_pairs(made.mean(axis=(2, 3)), held)


def _moments(power: _Moment, given: _Moment, signal: _Moment) -> BatchMoments:
    values = [part.result() for part in (power, given, signal)]
    return BatchMoments(
        power=values[0][0],
        given=values[1][0],
        signal=values[2][0],
        power_without=values[0][1],
        given_without=values[1][1],
        signal_without=values[2][1],
    )
