"""CV of one rule over the CV of another, paired on the same permutation groups.

The interval is a delete-one jackknife of the log, less what pairs of responses and the choice of permutations have too
much in it, with two things added: the jackknife's estimate of the bias counts as error, because where two rules nearly
agree it is as large, and widens the side it points to (a normalised weight makes a ratio of means); and each end
allows for shorter and longer responses than those seen (`tails`).

Shape letters: N responses, n of a group, K prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.cv import influence_of, replicate_quantile
from gradvar.estimators.groups import GroupMoments
from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    at_least_as_wide,
    jackknife_variance,
    reach_of_skewed,
    t_quantile,
    without_surplus,
)
from gradvar.estimators.tails import Unseen
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

_METHOD = "delete-one jackknife of the log, t, moved by skewness, widened by bias"


def cv_ratio(
    moments: GroupMoments,
    reference: GroupMoments,
    *,
    group_size: int,
    level: float,
    tails: Unseen | None = None,
) -> Estimate:
    """CV of one rule over CV of a reference rule on the same permutations.

    NaN where either squared signal or either variance is not positive, in the estimate or in a replicate. Without
    `tails` nothing is added for lengths beyond those seen.
    """
    return _ratio([moments], [reference], group_size, level, [tails], "ratio of CVs on the same permutation groups")


def pooled_cv_ratio(
    prompts: Sequence[GroupMoments],
    references: Sequence[GroupMoments],
    *,
    group_size: int,
    level: float,
    tails: Sequence[Unseen | None] | None = None,
) -> Estimate:
    """Pooled CV of one rule over a reference rule's, for these prompts.

    Where a prompt's two moments come from one call of `moments_of_kinds` what pairs of responses add is known; else it
    stays counted twice.
    """
    name = f"pooled CV ratio, permutation groups, {THESE_PROMPTS}"
    return _ratio(prompts, references, group_size, level, tails or [None] * len(prompts), name)


def cv_ratio_across(
    prompts: Sequence[GroupMoments], references: Sequence[GroupMoments], here: Estimate, *, level: float
) -> Estimate:
    """Pooled CV ratio for prompts like these: delete-one-prompt jackknife of the log, t over K - 1, from 4 prompts on.

    Never narrower than `here`, the same ratio for these prompts from `pooled_cv_ratio`.
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
    return at_least_as_wide(replace(none, value=math.exp(value), low=low, high=high), here)


def _log_ratio(same: Any, cross: Any, reference_same: Any, reference_cross: Any) -> Any:
    return 0.5 * (
        np.log(same - cross) - np.log(cross) - np.log(reference_same - reference_cross) + np.log(reference_cross)
    )


def _slopes(totals: Sequence[float]) -> tuple[float, float]:
    """Derivatives of log CV by same and by cross, at their totals."""
    same, cross = totals
    return 0.5 / (same - cross), -0.5 / (same - cross) - 0.5 / cross


def _ratio(
    prompts: Sequence[GroupMoments],
    references: Sequence[GroupMoments],
    group_size: int,
    level: float,
    tails: Sequence[Unseen | None],
    name: str,
) -> Estimate:
    none = Estimate(
        value=math.nan,
        low=math.nan,
        high=math.nan,
        level=level,
        method=f"{name}; {_METHOD}" + (" and unseen lengths" if any(one is not None for one in tails) else ""),
        n=sum(len(m.same_without) for m in prompts),
        clusters=len(prompts),
        seed=None,
    )
    totals = [sum(getattr(m, part) for m in side) for side in (prompts, references) for part in ("same", "cross")]
    replicates, noisy, pairs = [], 0.0, 0.0
    with np.errstate(all="ignore"):
        value = float(_log_ratio(*(np.float64(total) for total in totals)))
    if not math.isfinite(value):
        return replace(none, high=math.inf, low=0.0, method=f"{none.method}; unresolved")
    with np.errstate(all="ignore"):
        for m, r in zip(prompts, references, strict=True):
            (a, b), (c, d) = _slopes(totals[:2]), _slopes(totals[2:])
            noise = a * m.same_noise + b * m.cross_noise - c * r.same_noise - d * r.cross_noise
            noisy += float(jackknife_variance(noise))
            inside = (group_size - 1) / group_size
            pairs += m.pairs_of_difference(r, b + a * inside, d + c * inside)
            parts = ((m, "same"), (m, "cross"), (r, "same"), (r, "cross"))
            moved = [
                total - getattr(side, part) + getattr(side, f"{part}_without")
                for total, (side, part) in zip(totals, parts, strict=True)
            ]
            replicates.append(np.asarray(_log_ratio(*moved)))
    if any(len(m.same_without) < 3 * group_size for m in prompts):
        return replace(none, method=f"{none.method}; no interval below 3 groups")
    if not all(np.isfinite(r).all() for r in replicates):
        return replace(none, high=math.inf, low=0.0, method=f"{none.method}; unresolved")
    low, high = _interval(none, value, replicates, noisy, pairs, tails)
    return replace(none, value=math.exp(value), low=math.exp(max(low, -700.0)), high=math.exp(min(high, 700.0)))


def _interval(
    none: Estimate,
    value: float,
    replicates: Sequence[Array],
    noisy: float,
    pairs: float,
    tails: Sequence[Unseen | None],
) -> tuple[float, float]:
    variance = sum(float(jackknife_variance(r)) for r in replicates)
    quantile = replicate_quantile(none, replicates)
    bias = -sum((len(r) - 1) * (float(r.mean()) - value) for r in replicates)
    unseen = [
        one.unseen(influence_of([replicate]))
        for replicate, one in zip(replicates, tails, strict=True)
        if one is not None
    ]
    error = math.sqrt(float(without_surplus(variance, noisy, pairs)) + bias**2)
    below, above = (
        math.hypot(reach, *(quantile * ends[side] for ends in unseen))
        for side, reach in enumerate(reach_of_skewed(influence_of(replicates), error, quantile, none.level))
    )
    return value - below + min(bias, 0.0), value + above + max(bias, 0.0)
