"""CV of one rule over the CV of another, paired on the same permutation groups.

The interval is a delete-one jackknife of the log with four things that the calibration asked for:

Skewness: Hall's transformation of t.
Bias: the jackknife's estimate of it widens the side it points to (a normalised weight makes a ratio of means), and
counts as error beside the variance.
Permutations: what their choice adds to the replicates is taken out of the variance where it is much of it.
Unseen lengths: GRPO divides by length and nothing bounds its total weight sum 1/L, so its CV rests on rare very short
responses. A sample without one looks quiet, and its interval was too narrow (73 to 83% coverage where the law is flat
or E[g | L] moves). A response as short as one expected among 4 N, lognormal through the lengths, is put beside the
sample with the influence that the 8 shortest have, carried on by L^-(4 - growth) where ||g||^2 grows like L^growth. It
can only raise GRPO's CV, so only that side of the ratio is widened. Now 94 to 100% at N of 64, 128 and 512.

Shape letters: N responses, n of a group, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from gradvar.estimators.advantages import advantages
from gradvar.estimators.aggregation import Rule
from gradvar.estimators.cv import influence_of, replicate_quantile
from gradvar.estimators.groups import GroupMoments
from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    jackknife_variance,
    skew_corrected,
    t_quantile,
    without_surplus,
)
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

UNBOUNDED = "grpo"
"""The rule whose weights fall with length and are not normalised."""
SHORTEST = 8
"""Responses whose influence is carried on to shorter lengths."""
WORTH_TAKING = 0.3
"""The permutations' noise is taken out where it is more of the variance than this, that is where two rules nearly
agree: dr_grpo's ratio where ||g||^2 grows like L^2, with rare long responses, needs all it has (95%, without 92%)."""
OWN_POWER = 2.0
"""For log(1 - rho) of an unbounded rule alone: the square of its weight."""
WEIGHT_POWER = 4.0
"""Influence of a short response on an unbounded rule's log CV grows like L^-4 ||g||^2: the square of its weight beside
another rule's."""

_METHOD = "delete-one jackknife of the log, t with skewness correction, widened by bias and unseen short responses"


@dataclass(frozen=True, kw_only=True, eq=False)
class ShortResponses:
    """What shorter responses than the shortest seen could do to a ratio of one prompt."""

    lengths: Array
    """(N,) tokens."""
    growth: float
    """Slope of log ||g||^2 on log length."""
    side: int
    """1: a shorter response would raise the ratio, -1: lower it, 0: neither."""
    power: float = WEIGHT_POWER
    """Its influence grows like L^-power ||g||^2."""

    def unseen(self, influence: Array) -> float:
        """Influence of a response as short as one expected among 4 N; 0 where the sample holds one as short."""
        x = np.log(self.lengths)
        count = len(x)
        edge = float(x.mean() - x.std(ddof=1) * special.ndtri(1.0 - 1.0 / (4.0 * count)))
        if self.side == 0 or edge >= float(x.min()) or np.ptp(x) == 0.0:
            return 0.0
        shortest = np.argsort(x, kind="stable")[:SHORTEST]
        step = float(x[shortest].mean()) - edge
        size = math.sqrt(float((influence[shortest] ** 2).mean()))
        return size * math.exp(max(0.0, self.power - self.growth) * step)


def short_responses(
    gram: Array, rewards: Array, lengths: Array, rule: Rule, reference: Rule | None, *, advantage: str
) -> ShortResponses:
    """Describe one prompt's lengths and norms for the ratio of `rule` over `reference`, or for the rho of `rule` alone.

    Args:
        gram: (N, N) score Gram.
        rewards: (N,) verified rewards (any numbers for advantage "score").
        lengths: (N,) tokens.
        rule: Rule above the line.
        reference: Rule below it; None for `rule` alone.
        advantage: Kind of `advantages`, here over all N responses.
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    factors = np.ones(len(sizes)) if advantage == "score" else advantages(rewards, advantage, lengths=sizes)
    norms = factors**2 * np.diagonal(gram)
    held = norms > 0
    x = np.log(sizes[held])
    growth = 0.0
    if held.any() and np.ptp(x) > 0:
        x = x - x.mean()
        growth = float(x @ np.log(norms[held]) / (x @ x))
    if reference is None:
        return ShortResponses(lengths=sizes, growth=growth, side=int(rule.name == UNBOUNDED), power=OWN_POWER)
    side = int(rule.name == UNBOUNDED) - int(reference.name == UNBOUNDED)
    return ShortResponses(lengths=sizes, growth=growth, side=side)


def cv_ratio(
    moments: GroupMoments,
    reference: GroupMoments,
    *,
    group_size: int,
    level: float,
    short: ShortResponses | None = None,
) -> Estimate:
    """CV of one rule over CV of a reference rule on the same permutations.

    NaN where either squared signal or either variance is not positive, in the estimate or in a replicate. Without
    `short` nothing is added for unseen short responses, right where neither rule is grpo.
    """
    return _ratio([moments], [reference], group_size, level, [short], "ratio of CVs on the same permutation groups")


def pooled_cv_ratio(
    prompts: Sequence[GroupMoments],
    references: Sequence[GroupMoments],
    *,
    group_size: int,
    level: float,
    short: Sequence[ShortResponses | None] | None = None,
) -> Estimate:
    """Pooled CV of one rule over a reference rule's, for these prompts."""
    name = f"pooled CV ratio, permutation groups, {THESE_PROMPTS}"
    return _ratio(prompts, references, group_size, level, short or [None] * len(prompts), name)


def cv_ratio_across(
    prompts: Sequence[GroupMoments], references: Sequence[GroupMoments], here: Estimate, *, level: float
) -> Estimate:
    """Pooled CV ratio for prompts like these: delete-one-prompt jackknife of the log, t over K - 1, from 4 prompts on.

    Never narrower than `here`, the same ratio for these prompts from `pooled_cv_ratio`: prompts drawn again vary at
    least as much as responses drawn again.
    """
    name = f"pooled CV ratio, permutation groups, delete-one-prompt jackknife of the log, t; {PROMPTS_LIKE_THESE}"
    none = replace(here, value=math.nan, low=math.nan, high=math.nan, level=level, method=name)
    if len(prompts) < MINIMUM_PROMPTS:
        return replace(none, method=f"{name}; not given below {MINIMUM_PROMPTS} prompts")
    sums = [np.array([getattr(m, part) for m in side]) for side in (prompts, references) for part in ("same", "cross")]
    with np.errstate(all="ignore"):
        value = float(_log_ratio(*[own.sum() for own in sums]))
        replicates = np.asarray(_log_ratio(*[own.sum() - own for own in sums]))
    if not (math.isfinite(value) and np.isfinite(replicates).all()):
        return replace(none, high=math.inf, low=0.0, method=f"{name}; unresolved")
    half = t_quantile(level, len(prompts) - 1) * math.sqrt(float(jackknife_variance(replicates)))
    low, high = math.exp(max(value - half, -700.0)), math.exp(min(value + half, 700.0))
    if math.isfinite(here.value):
        low, high = min(low, here.low), max(high, here.high)
    return replace(none, value=math.exp(value), low=low, high=high)


def _log_ratio(same: Any, cross: Any, reference_same: Any, reference_cross: Any) -> Any:
    return 0.5 * (
        np.log(same - cross) - np.log(cross) - np.log(reference_same - reference_cross) + np.log(reference_cross)
    )


def _permutation_noise(moments: GroupMoments, totals: Sequence[float]) -> Array:
    """(N,) noise of the permutations in the replicates of log CV, to first order; totals of same and cross."""
    same, cross = totals
    moved = (moments.same_noise - moments.cross_noise) / (same - cross) - moments.cross_noise / cross
    return np.asarray(0.5 * moved)


def _ratio(
    prompts: Sequence[GroupMoments],
    references: Sequence[GroupMoments],
    group_size: int,
    level: float,
    short: Sequence[ShortResponses | None],
    name: str,
) -> Estimate:
    none = Estimate(
        value=math.nan,
        low=math.nan,
        high=math.nan,
        level=level,
        method=f"{name}; {_METHOD}",
        n=sum(len(m.same_without) for m in prompts),
        clusters=len(prompts),
        seed=None,
    )
    totals = [sum(getattr(m, part) for m in side) for side in (prompts, references) for part in ("same", "cross")]
    replicates, noisy = [], 0.0
    with np.errstate(all="ignore"):
        value = float(_log_ratio(*totals))
        for m, r in zip(prompts, references, strict=True):
            noise = _permutation_noise(m, totals[:2]) - _permutation_noise(r, totals[2:])
            noisy += float(jackknife_variance(noise))
            parts = ((m, "same"), (m, "cross"), (r, "same"), (r, "cross"))
            moved = [
                total - getattr(side, part) + getattr(side, f"{part}_without")
                for total, (side, part) in zip(totals, parts, strict=True)
            ]
            replicates.append(np.asarray(_log_ratio(*moved)))
    if not math.isfinite(value):
        return replace(none, high=math.inf, low=0.0, method=f"{none.method}; unresolved")
    if any(len(m.same_without) < 3 * group_size for m in prompts):
        return replace(none, method=f"{none.method}; no interval below 3 groups")
    if not all(np.isfinite(r).all() for r in replicates):
        return replace(none, high=math.inf, low=0.0, method=f"{none.method}; unresolved")
    low, high = _interval(none, value, replicates, noisy, short)
    return replace(none, value=math.exp(value), low=math.exp(max(low, -700.0)), high=math.exp(min(high, 700.0)))


def _interval(
    none: Estimate,
    value: float,
    replicates: Sequence[Array],
    noisy: float,
    short: Sequence[ShortResponses | None],
) -> tuple[float, float]:
    influence = influence_of(replicates)
    variance = sum(float(jackknife_variance(r)) for r in replicates)
    quantile = replicate_quantile(none, replicates)
    bias = -sum((len(r) - 1) * (float(r.mean()) - value) for r in replicates)
    if noisy < WORTH_TAKING * variance:
        noisy = 0.0
    # Where two rules nearly agree the bias is as large as the error, and as uncertain.
    error = math.hypot(math.sqrt(float(without_surplus(variance, noisy))), bias)
    unseen = {-1: 0.0, 0: 0.0, 1: 0.0}
    for replicate, lengths in zip(replicates, short, strict=True):
        if lengths is not None:
            unseen[lengths.side] += lengths.unseen(influence_of([replicate])) ** 2
    # On the side of short responses nothing is taken out: the sample's own variance is too small there.
    ends = {
        side: math.hypot(math.sqrt(variance), bias, math.sqrt(unseen[side]))
        if any(one is not None and one.side == side for one in short)
        else error
        for side in (-1, 1)
    }
    low, _ = skew_corrected(value, influence, ends[-1], quantile)
    _, high = skew_corrected(value, influence, ends[1], quantile)
    return low + min(bias, 0.0), high + max(bias, 0.0)
