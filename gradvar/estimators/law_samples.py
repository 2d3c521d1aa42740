"""What a variance law is fitted to: one prompt's deviations and within-length variances, or those of a subset.

Shape letters: N responses of one prompt, n of them fitted.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.advantages import advantages
from gradvar.estimators.baselines import advantage_dependence
from gradvar.estimators.carrying import effective_carrying
from gradvar.estimators.inputs import generator
from gradvar.estimators.quasi import Dependence
from gradvar.estimators.spread import (
    dependence_among,
    deviation_dependence,
    deviations,
    nearest_in_length,
    variance_among,
    weighted_gram,
)
from gradvar.estimators.spread_pairs import (
    MOST_NEIGHBOURS,
    PAIRS_FROM,
    Form,
    NeighbourKernels,
    PairPart,
    Weights,
    deviation_form,
    deviation_kernels,
    jackknifed_pairs,
    noise_squares,
    pair_variance,
    within_form,
)
from gradvar.runs.records import PromptScores

Array = NDArray[np.float64]

ALL_RESPONSES = "all responses"
NOT_TRUNCATED = "not truncated"
MOST_CLASSES = 4
"""With more different rewards than this, the classes are the halves below and above the median."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Deviations of one prompt's responses, or of a subset."""

    lengths: Array
    deviations: Array
    within: Array
    n_centred: Array
    """(n,) N of the set that the mean gradient was taken over."""
    mean_deviation: Array
    """(n,) its mean deviation."""
    deviation_dependence: Dependence
    within_dependence: Dependence
    near: NDArray[np.intp]
    """(n, k) neighbours in length, rows among the n."""
    forms: dict[str, Form]
    """Quadratic forms of sums of "deviation" and "within"."""
    noise: Array | None
    """(n, n) `noise_squares`; None where fewer than `PAIRS_FROM` are fitted, or with more than `MOST_NEIGHBOURS`."""
    left_out: int
    carrying: dict[str, float]
    """Effective number of the responses that carry "deviation" and "within" (`carrying.effective_carrying`): the mean
    that deviations are taken from is that of all responses, also where a subset is fitted."""
    names: tuple[int, ...]
    """Of the responses: their ids where known, else their places among the responses studied."""

    @functools.cached_property
    def kernels(self) -> NeighbourKernels:
        """What a jackknife of within-length variances has of pairs."""
        return NeighbourKernels.of(self.near)


def subsets_of(
    prompts: dict[str, PromptScores], studied: dict[str, PromptScores], subsets: bool
) -> dict[str, Callable[[PromptScores], NDArray[np.bool_]]]:
    """Return which responses are fitted, by scope: all, each reward class, those not truncated."""
    found: dict[str, Callable[[PromptScores], NDArray[np.bool_]]] = {
        ALL_RESPONSES: lambda s: np.ones(len(s.lengths), dtype=bool)
    }
    if not subsets:
        return found
    rewards = np.concatenate([s.rewards for s in prompts.values()])
    rewards = rewards[~np.isnan(rewards)]
    values = np.unique(rewards)
    if 1 < len(values) <= MOST_CLASSES:
        for value in values:
            found[f"reward {value:g}"] = lambda s, value=value: s.rewards == value  # type: ignore[misc]
    elif len(values) > MOST_CLASSES:
        middle = float(np.median(rewards))
        found[f"reward at most {middle:g}"] = lambda s: s.rewards <= middle
        found[f"reward above {middle:g}"] = lambda s: s.rewards > middle
    if any(s.truncated.any() for s in studied.values()):
        found[NOT_TRUNCATED] = lambda s: ~s.truncated
    return found


def sample_of(
    scores: PromptScores, chosen: NDArray[np.bool_], advantage: str, seed: int, neighbours: int, left_out: int
) -> Sample:
    """Return the chosen responses of one prompt; the mean gradient is over all its responses."""
    factors = None
    if advantage != "score":
        factors = advantages(scores.rewards, advantage, lengths=scores.lengths)
    n = len(scores.lengths)
    spread = deviations(scores.gram, factors)
    part = scores if chosen.all() else scores.select(chosen)
    count = len(part.lengths)
    within = np.zeros(count)
    between: Dependence = _nothing_shared
    shared: Dependence = _nothing_shared
    near = np.zeros((count, 0), dtype=np.intp)
    if n > 1:
        between = deviation_dependence(scores.gram, factors, subset=chosen)
    if count > 1:
        ties = generator(seed, scores.prompt_id, "neighbours")
        near = nearest_in_length(part.lengths, min(neighbours, count - 1), rng=ties)

        def weighted(factors: Array | None) -> Array:
            return weighted_gram(part.gram, None if factors is None else factors[chosen])

        within = variance_among(weighted(factors), near)
        shared = dependence_among(weighted(factors), near)
        if factors is not None and n > 2:
            of_baseline = advantage_dependence(scores.rewards, advantage, scores.lengths, subset=chosen)
            between = _both(between, of_baseline(lambda x: deviations(scores.gram, x)[chosen]))
            shared = _both(shared, of_baseline(lambda x: variance_among(weighted(x), near)))
    noise = None
    if count >= PAIRS_FROM and near.shape[1] <= MOST_NEIGHBOURS:
        order = generator(seed, scores.prompt_id, "pairs")
        own_factors = None if factors is None else factors[chosen]
        noise = noise_squares(weighted_gram(part.gram, own_factors), part.lengths, rng=order)
    own, everyone = float(count), float(n)
    if factors is not None:
        own, everyone = effective_carrying(factors[chosen]), effective_carrying(factors)
    return Sample(
        lengths=part.lengths.astype(np.float64),
        deviations=spread[chosen],
        within=within,
        n_centred=np.full(count, float(n)),
        mean_deviation=np.full(count, float(spread.mean())),
        deviation_dependence=between,
        within_dependence=shared,
        near=near,
        forms={"deviation": deviation_form(n), "within": within_form(near)},
        noise=noise,
        left_out=left_out,
        carrying={"deviation": min(own, everyone), "within": own},
        names=part.rollout_ids or tuple(np.flatnonzero(chosen).tolist()),
    )


def pairs_of(samples: Sequence[Sample], weights: Mapping[str, Weights]) -> PairPart:
    """What pairs of responses add to sums of deviations and of within-length variances together.

    Samples of few responses (`PAIRS_FROM`) add 0.

    Args:
        samples: One a prompt.
        weights: Of "deviation" and of "within", or of one of them, over the responses of all samples.
    """
    cuts = np.cumsum([len(s.lengths) for s in samples])[:-1]
    pieces = {
        what: [Weights(*one) for one in zip(*(np.split(part, cuts) for part in parts), strict=True)]
        for what, parts in weights.items()
    }
    once, counted = 0.0, 0.0
    with np.errstate(all="ignore"):  # a fit that ran through one response has weights of 1e150: NaN takes nothing out
        for k, s in enumerate(samples):
            if s.noise is None:
                continue
            mine = {what: w[k] for what, w in pieces.items()}
            once += pair_variance(np.sum([s.forms[what](w.gain) for what, w in mine.items()], axis=0), s.noise)
            counted += jackknifed_pairs(
                deviation_kernels(mine["deviation"], int(s.n_centred[0])) if "deviation" in mine else None,
                s.kernels.of_jackknife(mine["within"]) if "within" in mine else None,
                s.noise,
            )
    return PairPart(once, counted)


def neighbours_of(samples: Sequence[Sample]) -> NDArray[np.intp]:
    """Neighbours (n, k) among the responses of all samples, -1 where a sample of few has fewer."""
    most = max(s.near.shape[1] for s in samples)
    starts = np.cumsum([0, *(len(s.lengths) for s in samples)])
    rows = [
        np.pad(s.near + start, ((0, 0), (0, most - s.near.shape[1])), constant_values=-1)
        for s, start in zip(samples, starts[:-1], strict=True)
    ]
    return np.concatenate(rows)


def _both(one: Dependence, two: Dependence) -> Dependence:
    return lambda q: one(q) + two(q)


def _nothing_shared(q: Array) -> Array:
    return np.zeros_like(q)


def usable_samples(samples: dict[str, Sample], what: str) -> tuple[dict[str, Sample], str]:
    """Drop prompts without any spread: identical responses cannot carry a constant of their own."""
    found = {
        name: s
        for name, s in samples.items()
        if len(s.lengths) > 1 and len(s.n_centred) and s.n_centred[0] >= 3 and spread_of(s, what).sum() > 0
    }
    return found, "fewer than 3 responses, or responses that are all identical: there is no variance to fit"


def spread_of(sample: Sample, what: str) -> Array:
    """Return the deviations ("deviation") or the within-length variances ("within")."""
    return sample.deviations if what == "deviation" else sample.within
