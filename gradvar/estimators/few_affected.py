"""What an extra does rests on few responses: the truncated, the punished, or the silent groups that a sample holds.

Where none is truncated the filtered update is the plain one, and its ratio has no error; the next sample may hold two.
Ratios to the plain CV were covered 50% (filtering, 1% truncated), 72 to 90% (punishment, 5% punished) and 78 to 90%
(dynamic sampling) at N = 64.
Shape letters: N responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.groups import GroupMoments
from gradvar.estimators.intervals import wilson
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

LEAST_AFFECTED = 3
"""Responses that an extra must change for its effect to have an interval."""
FURTHER = 2.0
"""As if so many more were changed, each with the influence of the farthest out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FewAffected:
    """The responses of one prompt that an extra changes."""

    rows: NDArray[np.bool_]
    """(N,)."""

    def unseen(self, influence: Array) -> tuple[float, float]:
        """Influences of further such responses: (down, up), on the side to which those seen move the estimate."""
        mine = influence[self.rows]
        if not mine.size:
            return 0.0, 0.0
        further = math.sqrt(FURTHER) * float(np.abs(mine).max())
        return (further, 0.0) if float(mine.sum()) < 0.0 else (0.0, further)


def enough_affected(prompts: Sequence[FewAffected], estimate: Estimate) -> Estimate:
    """The estimate, without interval where an extra changes fewer than `LEAST_AFFECTED` responses."""
    count = sum(int(one.rows.sum()) for one in prompts)
    if count >= LEAST_AFFECTED or math.isnan(estimate.value):
        return estimate
    note = f"{estimate.method}; no interval, the extra changes {count} of {estimate.n} responses"
    return replace(estimate, low=math.nan, high=math.nan, method=note)


def share_of_responses(changed: NDArray[np.bool_], *, level: float, seed: int | None) -> Estimate:
    """Share of the responses (N,) that an extra changes, with Wilson's interval."""
    n, count = len(changed), int(changed.sum())
    low, high = wilson(count, n, level)
    told: dict[str, Any] = {"level": level, "method": "share of responses, Wilson", "n": n, "clusters": 1, "seed": seed}
    return Estimate(value=count / n, low=min(low, count / n), high=max(high, count / n), **told)


def fewer_loud(sampled: Sequence[GroupMoments], shares: Sequence[tuple[float, float]], ratio: Estimate) -> Estimate:
    """The CV ratio of dynamic sampling with a low end as if fewer groups were loud, one prompt at a time.

    Given loud, E||ghat||^2 is E||ghat||^2 / P and ||E ghat||^2 is ||E ghat||^2 / P^2: the fewer are, the more it helps.

    Args:
        sampled: Of the update under dynamic sampling.
        shares: P of every prompt, and its lower end.
        ratio: Of these CVs to the plain ones.
    """
    same, cross = (sum(getattr(m, part) for m in sampled) for part in ("same", "cross"))
    if not (math.isfinite(ratio.low) and 0.0 < cross < same):
        return ratio
    square = 0.0
    for one, (share, least) in zip(sampled, shares, strict=True):
        more = share / least
        other_same, other_cross = same + one.same * (more - 1.0), cross + one.cross * (more**2 - 1.0)
        if not 0.0 < other_cross < other_same:
            return replace(ratio, low=0.0)
        change = 0.5 * (math.log(other_same / other_cross - 1.0) - math.log(same / cross - 1.0))
        square += min(change, 0.0) ** 2
    return replace(ratio, low=min(ratio.low, ratio.value * math.exp(-math.sqrt(square))))
