"""What an extra does rests on few responses: the truncated, the punished, or the silent groups that a sample holds.

Where none is truncated the filtered update is the plain one, and its ratio has no error; the next sample may hold two.
Ratios to the plain CV were covered 50% (filtering, 1% truncated), 72 to 90% (punishment, 5% punished) and 78 to 90%
(dynamic sampling) at N = 64.
Shape letters: N responses, n of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.bias import Jackknifed
from gradvar.estimators.groups import GroupMoments
from gradvar.estimators.intervals import wilson
from gradvar.estimators.ratios import pooled_cv_ratio
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

LEAST_AFFECTED = 3
"""Responses that an extra must change for its effect to have an interval."""
FURTHER = 2.0
"""As if so many more were changed, each with the influence of the farthest out."""
EITHER_WAY = 3.0
"""The same where others might move the estimate the other way: of what none was seen up to 3 are expected (the rule of
three, 95%). At N = 128 ratios under filtering were covered 86 to 100% with 2 on the side seen, 92 to 100% with this."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FewAffected:
    """The responses of one prompt that an extra changes."""

    rows: NDArray[np.bool_]
    """(N,)."""
    either_way: bool = False
    """Whether they pull both ways: left out of the update, a response takes signal and noise with it."""
    carrying: NDArray[np.bool_] | None = None
    """(N,) which responses carry the noise where they are few (`carrying.few_that_carry`)."""

    @property
    def mute(self) -> bool:
        """Whether none of those left out carries the noise where few do: one that does moves it by far more than they.

        One in ten right: ratios under filtering were covered 66% without (N = 128).
        """
        if self.carrying is None or not self.either_way or not self.rows.any():
            return False
        return not (self.carrying & self.rows).any()

    def unseen(self, influence: Array) -> tuple[float, float]:
        """Influences of further such responses: (down, up), on the side to which those seen move the estimate."""
        mine = influence[self.rows]
        if not mine.size:
            return 0.0, 0.0
        further = math.sqrt(EITHER_WAY if self.either_way else FURTHER) * float(np.abs(mine).max())
        if self.either_way:
            return further, further
        return (further, 0.0) if float(mine.sum()) < 0.0 else (0.0, further)


def enough_affected(prompts: Sequence[FewAffected], estimate: Estimate) -> Estimate:
    """The estimate, without interval where an extra changes fewer than `LEAST_AFFECTED` responses, or mute ones."""
    count = sum(int(one.rows.sum()) for one in prompts)
    affected = [one for one in prompts if one.rows.any()]
    mute = bool(affected) and all(one.mute for one in affected)
    if math.isnan(estimate.value) or (count >= LEAST_AFFECTED and not mute):
        return estimate
    note = f"{estimate.method}; no interval, the extra changes {count} of {estimate.n} responses"
    if count >= LEAST_AFFECTED:
        note += ", none of which is one of the few of A^2 above its mean"
    return replace(estimate, low=math.nan, high=math.nan, method=note)


def turn_of_further(prompts: Sequence[FewAffected], cosines: Jackknifed, k: int, plain: int) -> float:
    """By how much cosine k could fall if `FURTHER` more responses were changed, all turning the update one way.

    The angle's square has (FURTHER u)^2 of them, u^2 of each being what it adds to that square alone: the part of
    products of a response with itself, less the plain update's, over all changed (of dapo's under punishment 7% were
    covered less without, N = 128).
    """
    count = sum(int(one.rows.sum()) for one in prompts)
    if cosines.own is None or not count:
        return 0.0
    return FURTHER**2 * max(float(cosines.own[k] - cosines.own[plain]), 0.0) / count


def share_of_responses(changed: NDArray[np.bool_], *, level: float, seed: int | None) -> Estimate:
    """Share of the responses (N,) that an extra changes, with Wilson's interval."""
    n, count = len(changed), int(changed.sum())
    low, high = wilson(count, n, level)
    told: dict[str, Any] = {"level": level, "method": "share of responses, Wilson", "n": n, "clusters": 1, "seed": seed}
    return Estimate(value=count / n, low=min(low, count / n), high=max(high, count / n), **told)


def ratio_of_loud(
    plain: Sequence[GroupMoments],
    sampled: Sequence[GroupMoments],
    shares: Sequence[Estimate],
    *,
    group_size: int,
    level: float,
    still: bool = True,
) -> Estimate:
    """CV under dynamic sampling over the plain CV.

    Where a silent group's update is 0, given loud E||ghat||^2 is E||ghat||^2 / P, ||E ghat||^2 is ||E ghat||^2 / P^2:
    the ratio follows from the plain moments and each prompt's share S = 1 - P of silent groups, for one prompt
    1 - ratio^2 = S / (1 - rho). Its ends are what S makes of it at its own ends, flat or steep as S is there, and a
    jackknife with every S held fixed, added in squares (MOVER, Zou and Donner 2008).

    Args:
        plain: Moments of the update.
        sampled: Of the update under dynamic sampling, whose ratio is the value.
        shares: Of silent groups, one a prompt.
        group_size: n.
        level: Nominal coverage.
        still: Whether a silent group's update is 0; if not, the jackknife is that of the ratio itself.
    """
    found = pooled_cv_ratio(sampled, plain, group_size=group_size, level=level)
    if math.isnan(found.value) or math.isnan(found.low):
        return found
    if still and len(plain) == 1:  # no share of silent groups makes it more than 1
        found = replace(found, high=max(min(found.high, 1.0), found.value))
    held, loud = found, list(sampled)
    if still:
        given = [_given_loud(one, 1.0 - share.value) for one, share in zip(plain, shares, strict=True)]
        loud = [one for one, _ in given]
        held = pooled_cv_ratio(loud, [one for _, one in given], group_size=group_size, level=level)
    if not (math.isfinite(held.value) and held.low > 0.0):
        return replace(found, low=0.0)
    same, cross = (sum(getattr(one, part) for one in loud) for part in ("same", "cross"))

    def moved(one: GroupMoments, share: Estimate, end: float) -> float:
        """Log of the CV where this prompt's share lies at an end, less what it is."""
        more = (1.0 - share.value) / (1.0 - end) if end < 1.0 else math.inf
        other_same, other_cross = same + one.same * (more - 1.0), cross + one.cross * (more**2 - 1.0)
        if not 0.0 < other_cross < other_same:
            return -math.inf
        return 0.5 * (math.log(other_same / other_cross - 1.0) - math.log(same / cross - 1.0))

    falls = [min(moved(one, share, share.high), 0.0) for one, share in zip(loud, shares, strict=True)]
    rises = [max(moved(one, share, share.low), 0.0) for one, share in zip(loud, shares, strict=True)]
    low = held.value * math.exp(-math.hypot(math.log(held.value / held.low), *falls))
    high = held.value * math.exp(math.hypot(math.log(held.high / held.value), *rises))
    if still and len(plain) == 1:
        high = min(high, 1.0)
    method = f"{found.method}; dynamic sampling by shares of silent groups"
    return replace(found, low=min(low, found.value), high=max(high, found.value), method=method)


def _given_loud(plain: GroupMoments, loud: float) -> tuple[GroupMoments, GroupMoments]:
    """Moments of the update given that its group is loud, a share P of all, and its own beside them."""
    ways = np.array([loud**-2, 1.0])
    pairs = plain.pairs[plain.kind, plain.kind] * np.outer(ways, ways)
    given = replace(
        plain,
        same=plain.same / loud,
        cross=plain.cross / loud**2,
        same_without=plain.same_without / loud,
        cross_without=plain.cross_without / loud**2,
        same_noise=plain.same_noise / loud,
        cross_noise=plain.cross_noise / loud**2,
        kind=0,
        pairs=pairs,
    )
    return given, replace(plain, kind=1, pairs=pairs)
