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
are formed (`formed_batches`). Beyond K / 3 prompts, too few batches could be
formed; there ghat = N / S, divided by a sum S over the batch, is linearised around the mean of S (delta method):
    ghat  =  N / E S  -  E ghat (S / E S - 1)  +  O(1 / (B n)).
With u a group's update under weights whose sum is at its mean (`mean_weights`), and v its own sum over that mean, ghat
is the mean over prompts of u - E ghat (v - 1), and the formulas above hold with (u', v' of another group of the prompt)
    power_1 = E||u||^2 - 2 E<v u, E u> / E v + signal (1 + E v^2 / (E v)^2),
    given_1 = E<u, u'> - 2 E<v' u, E u> / E v + signal (1 + E v v' / (E v)^2)
(`ScopedParts`). The second term is not small: where S follows ghat it is of the variance's own order for every B.
What is left out is of the relative order (E v^2 / (E v)^2 - 1) / B (`BatchMoments.remainder`) and widens the intervals.
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
    remainder: float = 0.0
    """Relative size of what a linearisation leaves out of the variance."""


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
        signal, signal_without = mean_of_pairs(self.pairs)
        (power, power_without), (given, given_without) = mean_of_each(self.power), mean_of_each(self.given)
        return BatchMoments(
            power=power / prompts + (1.0 - 1.0 / prompts) * signal,
            given=given / prompts + (1.0 - 1.0 / prompts) * signal,
            signal=signal,
            power_without=power_without / prompts + (1.0 - 1.0 / prompts) * signal_without,
            given_without=given_without / prompts + (1.0 - 1.0 / prompts) * signal_without,
            signal_without=signal_without,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ScopedParts:
    """Of a rule that weights over a whole batch, for batches too large to form; v is a group's sum over its mean."""

    groups: PromptParts
    """Of updates whose sums are at their mean."""
    same: Array
    """(R, K, K) <E[v u]_q, E u_q'> of different prompts."""
    apart: Array
    """(R, K, K) <E[v' u]_q, E u_q'>, v' of another group of q."""
    sums: Array
    """(K,) E v."""
    squares: Array
    """(K,) E v^2."""
    products: Array
    """(K,) E v v'."""

    def batch(self, prompts: int) -> BatchMoments:
        """Return the moments of a batch of B = `prompts`."""
        plain = self.groups.batch(prompts)
        mean, mean_without = mean_of_each(self.sums)

        def added(pairs: Array, squares: Array) -> tuple[Array, Array]:
            (along, along_without), (square, square_without) = mean_of_pairs(pairs), mean_of_each(squares)
            return (
                -2.0 * along / mean + plain.signal * (1.0 + square / mean**2),
                -2.0 * along_without / mean_without + plain.signal_without * (1.0 + square_without / mean_without**2),
            )

        power, power_without = added(self.same, self.squares)
        given, given_without = added(self.apart, self.products)
        return BatchMoments(
            power=plain.power + power / prompts,
            given=plain.given + given / prompts,
            signal=plain.signal,
            power_without=plain.power_without + power_without / prompts,
            given_without=plain.given_without + given_without / prompts,
            signal_without=plain.signal_without,
            remainder=float(self.squares.mean() / mean**2 - 1.0) / prompts,
        )


def mean_of_each(values: Array) -> tuple[Array, Array]:
    """Mean of (K,) values, and (K,) means without each."""
    return values.mean(), (values.sum() - values) / (len(values) - 1)


def mean_of_pairs(values: Array) -> tuple[Array, Array]:
    """Mean (R,) of (R, K, K) values over pairs of different prompts, and (R, K) means without each prompt."""
    count = values.shape[-1]
    off = values * (1.0 - np.eye(count))
    total = off.sum(axis=(1, 2))
    left = (count - 1) * (count - 2)
    without = (total[:, None] - off.sum(axis=1) - off.sum(axis=2)) / (left if left else math.nan)
    return total / (count * (count - 1)), without


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


def scoped_parts(
    prompts: Sequence[PromptScores],
    products: CrossProducts,
    groups: Mapping[str, NDArray[np.intp]],
    coefficients: Mapping[str, Array],
    scales: Mapping[str, Array],
) -> ScopedParts:
    """Compute what large batches of a rule that weights over the whole batch need.

    Args:
        prompts: K prompts of one target.
        products: Between their responses.
        groups: (P, M, n) disjoint groups of each prompt, M at least 2.
        coefficients: (P, M, n) of the groups' updates, weights by `mean_weights`.
        scales: (P, M) v by `group_scales`.
    """
    updates: dict[str, Array] = {}
    sums, squares, others = [], [], []
    for p in prompts:
        drawn, c = groups[p.prompt_id], coefficients[p.prompt_id]
        rounds, count, _ = drawn.shape
        v = scales[p.prompt_id]
        moved = v[..., None] * c
        apart = (v.sum(axis=1, keepdims=True)[..., None] * c - moved) / (count - 1)
        weights = [np.bincount(drawn.reshape(-1), x.reshape(-1), len(p.lengths)) for x in (c, moved, apart)]
        updates[p.prompt_id] = np.stack(weights) / (rounds * count)
        sums.append(v.mean())
        squares.append((v**2).mean())
        others.append((v.sum(axis=1) ** 2 - (v**2).sum(axis=1)).mean() / (count * (count - 1)))
    inner = products.of_updates(updates)
    return ScopedParts(
        groups=prompt_parts(prompts, products, groups, coefficients),
        same=inner[:, 1::3, ::3],
        apart=inner[:, 2::3, ::3],
        sums=np.array(sums),
        squares=np.array(squares),
        products=np.array(others),
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


def group_scales(
    prompts: Sequence[PromptScores],
    groups: Mapping[str, NDArray[np.intp]],
    weights: Mapping[str, Array],
    rule: Rule,
    *,
    alpha: float | None,
    max_length: float,
) -> dict[str, Array]:
    """Return v (P, M) by prompt: the sum in a group's own weights over its mean, up to one constant.

    Args:
        prompts: K prompts of one target.
        groups: (P, M, n) disjoint groups of each prompt.
        weights: (N,) by prompt, of `mean_weights`.
        rule: The rule; the scope enters its weights as one factor.
        alpha: Exponent of vl_norm.
        max_length: M in tokens.
    """
    found = {}
    for p in prompts:
        rows = groups[p.prompt_id]
        inside = scope_weights(
            rule, p.lengths[rows], lambda x: x.sum(axis=-1, keepdims=True), alpha=alpha, max_length=max_length
        )
        found[p.prompt_id] = np.asarray((weights[p.prompt_id][rows] / inside)[..., 0])
    return found
