"""The update of a batch of B prompts with n responses each: its variance within and between prompts.

Prompts are independent draws from a population, responses independent draws given their prompt. For the update ghat
of such a batch

    E||ghat - E ghat||^2  =  E tr Var(ghat | prompts)  +  tr Var E[ghat | prompts]        (total variance)
                          =  (power - given)           +  (given - signal)
    power  = E||ghat||^2
    given  = E||E[ghat | prompts]||^2     same prompts, responses without overlap
    signal = ||E ghat||^2                 no prompt in common
the first part between responses within prompts, the second between prompts. Each of the three is a mean of inner
products of updates that share what the expectation holds fixed and nothing else, so each is unbiased; never ||mean||^2.

Where a rule weights inside prompt groups, ghat is the mean of B independent group updates u, and from a single group's
    power_B = power_1 / B + (1 - 1/B) signal,   given_B = given_1 / B + (1 - 1/B) signal,   signal_B = signal
hold for every B. Where a rule weights over the whole batch (dapo and vl_norm there depend on all its lengths), batches
are formed: `formed_moments` cuts the prompts into disjoint batches. Beyond K / 3 prompts, too few batches could be
formed, and the sums in the weights are put at their mean over all measured responses (`mean_weights`): what is left out
is their own fluctuation, of relative order 1 / (B n).
Shape letters: K prompts, N responses, n of a group, B prompts of a batch, M groups of a prompt, R repeats of a sketch
(1 for exact products), P permutations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.aggregation import Rule, scope_weights
from gradvar.estimators.cross_products import CrossProducts
from gradvar.estimators.groups import group_moments
from gradvar.runs.records import PromptScores

Array = NDArray[np.float64]

CUTS = 4
"""Random cuts of the prompts into batches for each permutation of the responses."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchMoments:
    """The three moments of one kind of batch update: from all prompts, and from all but each."""

    power: Array
    """(R,) E||ghat||^2."""
    given: Array
    """(R,) E||E[ghat | prompts]||^2; may come out negative."""
    signal: Array
    """(R,) ||E ghat||^2; may come out negative."""
    power_without: Array
    """(R, K) delete-one-prompt replicates; NaN where too few prompts are left."""
    given_without: Array
    signal_without: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptParts:
    """Inner products of single groups' updates, from which batches of any size follow (rules that weight by group)."""

    power: Array
    """(K,) E||u||^2 of each prompt."""
    given: Array
    """(K,) ||E u||^2 of each prompt."""
    pairs: Array
    """(R, K, K) <E u_q, E u_q'> of different prompts; the diagonal is not used."""

    def batch(self, prompts: int) -> BatchMoments:
        """Return the moments of the mean of B = `prompts` independent groups' updates."""
        off = self.pairs * (1.0 - np.eye(len(self.power)))
        count = len(self.power)
        total, rows = off.sum(axis=(1, 2)), off.sum(axis=2)
        signal = total / (count * (count - 1))
        left = (count - 1) * (count - 2)
        signal_without = (total[:, None] - 2.0 * rows) / (left if left else math.nan)

        def mixed(single: Array) -> tuple[Array, Array]:
            without = (single.sum() - single) / (count - 1)
            return (
                single.mean() / prompts + (1.0 - 1.0 / prompts) * signal,
                without / prompts + (1.0 - 1.0 / prompts) * signal_without,
            )

        power, power_without = mixed(self.power)
        given, given_without = mixed(self.given)
        return BatchMoments(
            power=power,
            given=given,
            signal=signal,
            power_without=power_without,
            given_without=given_without,
            signal_without=signal_without,
        )


def depends_on_scope(rule: Rule, alpha: float | None) -> bool:
    """Whether weighting over a whole batch differs, by more than a constant, from weighting in each group of n."""
    lengths = np.array([[1.0, 2.0], [3.0, 7.0]])
    options: dict[str, Any] = {"alpha": alpha, "max_length": 8.0}
    inside = scope_weights(rule, lengths, lambda x: x.sum(axis=-1, keepdims=True), **options)
    across = scope_weights(rule, lengths, lambda x: x.sum(), **options)
    return float(np.ptp(across / inside)) > 1e-9


def prompt_parts(
    prompts: Sequence[PromptScores],
    products: CrossProducts,
    groups: Mapping[str, NDArray[np.intp]],
    coefficients: Mapping[str, Array],
) -> PromptParts:
    """Compute a group update's inner products, within prompts from their Grams and between them from `products`.

    Args:
        prompts: K prompts of one target.
        products: Between their responses.
        groups: (P, M, n) disjoint groups of each prompt.
        coefficients: (P, M, n) of the groups' updates.
    """
    moments = [group_moments(p.gram, groups[p.prompt_id], coefficients[p.prompt_id]) for p in prompts]
    mean_update = {}
    for p in prompts:
        drawn = groups[p.prompt_id]
        sums = np.bincount(drawn.reshape(-1), weights=coefficients[p.prompt_id].reshape(-1), minlength=len(p.lengths))
        mean_update[p.prompt_id] = sums[None] / (drawn.shape[0] * drawn.shape[1])
    return PromptParts(
        power=np.array([m.same for m in moments]),
        given=np.array([m.cross for m in moments]),
        pairs=products.of_updates(mean_update),
    )


def mean_weights(
    prompts: Sequence[PromptScores],
    rule: Rule,
    group_size: int,
    *,
    alpha: float | None,
    max_length: float,
) -> dict[str, Array]:
    """Weights (N,) by prompt over one scope of all measured responses, times their number over n.

    So the mean of B groups' updates has the weights of a batch scope whose sums are at their mean.
    """
    lengths = np.concatenate([p.lengths for p in prompts])
    weights = scope_weights(rule, lengths, lambda x: x.sum(), alpha=alpha, max_length=max_length)
    weights = np.asarray(weights * (len(lengths) / group_size))
    ends = np.cumsum([len(p.lengths) for p in prompts])[:-1]
    return {p.prompt_id: part for p, part in zip(prompts, np.split(weights, ends), strict=True)}


@dataclass(kw_only=True, eq=False)
class _Sums:
    """Totals of one moment over batches or pairs of batches, and what is lost without each prompt."""

    total: Array
    lost: Array
    count: float
    lost_count: Array

    @classmethod
    def empty(cls, repeats: int, prompts: int) -> _Sums:
        return cls(total=np.zeros(repeats), lost=np.zeros((repeats, prompts)), count=0.0, lost_count=np.zeros(prompts))

    def add(self, values: Array, members: NDArray[np.intp]) -> None:
        """Add one value (R, b) for each batch b, whose prompts are members (b, B)."""
        self.total += values.sum(axis=1)
        self.count += values.shape[1]
        self.lost[:, members] += values[:, :, None]
        self.lost_count[members] += 1.0

    def add_pairs(self, values: Array, members: NDArray[np.intp]) -> None:
        """Add one value (R, b, b) for each pair of batches; the diagonal is left out."""
        batches = values.shape[1]
        off = values * (1.0 - np.eye(batches))
        self.total += off.sum(axis=(1, 2))
        self.count += batches * (batches - 1)
        self.lost[:, members] += 2.0 * off.sum(axis=2)[:, :, None]
        self.lost_count[members] += 2.0 * (batches - 1)

    def result(self) -> tuple[Array, Array]:
        left = self.count - self.lost_count
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
    """Moments of a rule that weights over the whole batch, from disjoint batches formed of the measured responses.

    In every permutation the prompts are cut at random into floor(K / B) disjoint batches; batch b's m-th update takes
    the m-th group of each of its prompts. Updates of one b and different m share prompts and no response (given);
    those of different b share nothing (signal).

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
    sums = {size: [_Sums.empty(products.repeats, count) for _ in range(3)] for size in sizes}
    for index in range(rounds):
        drawn = [groups[name][index, :updates] for name in names]
        spread = {}
        for p, rows in zip(prompts, drawn, strict=True):
            dense = np.zeros((updates, len(p.lengths)))
            np.put_along_axis(dense, rows, coefficients[p.prompt_id][index, :updates], axis=1)
            spread[p.prompt_id] = dense
        inner = products.of_updates(spread)
        for k, p in enumerate(prompts):  # what is known exactly
            block = slice(k * updates, (k + 1) * updates)
            inner[:, block, block] = spread[p.prompt_id] @ p.gram @ spread[p.prompt_id].T
        lengths = np.stack([p.lengths[rows] for p, rows in zip(prompts, drawn, strict=True)])  # (K, M, n)
        inside = scope_weights(
            rule, lengths, lambda x: x.sum(axis=-1, keepdims=True), alpha=alpha, max_length=max_length
        )
        for size in sizes:
            for _ in range(CUTS):
                members = rng.permutation(count)[: count // size * size].reshape(-1, size)
                ratio = _ratios(rule, lengths[members], inside[members], alpha=alpha, max_length=max_length)
                _add(sums[size], inner, members, ratio)
    return {size: _moments(*parts) for size, parts in sums.items()}


def _ratios(rule: Rule, lengths: Array, inside: Array, *, alpha: float | None, max_length: float) -> Array:
    """Weight over the batch by weight inside the group, (b, B, M): the scope enters as one factor of each group."""
    across = scope_weights(
        rule, lengths, lambda x: x.sum(axis=(1, 3), keepdims=True), alpha=alpha, max_length=max_length
    )
    return np.asarray(across[..., 0] / inside[..., 0])


def _add(sums: Sequence[_Sums], inner: Array, members: NDArray[np.intp], ratio: Array) -> None:
    """Add one cut: inner (R, K M, K M) of groups, members (b, B), ratio (b, B, M)."""
    batches, _, updates = ratio.shape
    count = inner.shape[1] // updates
    factors = np.zeros((batches, updates, count, updates))
    each = np.arange(updates)
    for b in range(batches):
        for prompt, part in zip(members[b], ratio[b], strict=True):
            factors[b, each, prompt, each] = part
    flat = factors.reshape(batches * updates, count * updates)
    products = (flat @ inner @ flat.T).reshape(-1, batches, updates, batches, updates)
    power, given, signal = sums
    own = np.einsum("rbmbn->rbmn", products)
    diagonal = np.einsum("rbmm->rb", own)
    power.add(diagonal / updates, members)
    if updates > 1:
        given.add((own.sum(axis=(2, 3)) - diagonal) / (updates * (updates - 1)), members)
    if batches > 1:
        signal.add_pairs(products.mean(axis=(2, 4)), members)


def _moments(power: _Sums, given: _Sums, signal: _Sums) -> BatchMoments:
    with np.errstate(divide="ignore", invalid="ignore"):
        values = [part.result() for part in (power, given, signal)]
    return BatchMoments(
        power=values[0][0],
        given=values[1][0],
        signal=values[2][0],
        power_without=values[0][1],
        given_without=values[1][1],
        signal_without=values[2][1],
    )
