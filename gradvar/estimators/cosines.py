"""The cosine of an update with grad J, whose error depends on where it lies.

Near 1 a cosine goes with the square of the angle: 1 - cos = delta^2 / 2 for the part delta of the update, in units of
its length, that grad J does not explain. Its estimate errs by the product of delta with delta's own error, and by that
error's square: the closer to 1 an estimate falls, the smaller a jackknife finds its error, though the truth may lie
where it is larger. So where an interval reaches 1 its other end is as far away as that error there has it (a score
interval, as Wilson's of a share).
Shape letters: R kinds of update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradvar.estimators.bias import Jackknifed, Known, estimate_of, what_is_known
from gradvar.estimators.intervals import at_least_as_wide, jackknife_variance
from gradvar.estimators.tails import LengthTails
from gradvar.estimators.update_products import Products
from gradvar.runs.records import Estimate


def cosine_estimate(
    prompts: Sequence[Products],
    result: Jackknifed,
    k: int,
    *,
    level: float,
    method: str,
    across: bool = False,
    tails: Sequence[LengthTails] | None = None,
    known: Known | None = None,
) -> Estimate:
    """Cosine of update k from `jackknifed(prompts, cosine)`, always within [-1, 1].

    Where E ghat and grad J are parallel, half of all estimates of their cosine come out above 1. If the interval
    reaches 1 the angle is not told apart from 0: the interval ends at 1, and so does the value if it lies beyond, and
    its other end allows for the larger error that a smaller cosine has (`error_further_away`). Else it is taken on
    Fisher's scale atanh(cos), whose image stays below 1. NaN, "unresolved", where ||grad J||^2 or ||E ghat||^2 is not
    told apart from 0. `tails` (of the angle), one a prompt, lower the lower end. `known` is `what_is_known`, which is
    found where it is not given.
    """
    spoken: dict[str, Any] = {"level": level, "method": method, "tails": tails}
    found = _estimate(replace(result, here=None), k, **spoken)
    if result.here is not None:
        found = at_least_as_wide(found, _estimate(result.here, k, **spoken))
    told = known or what_is_known(prompts, level=level, across=across)
    if math.isnan(found.value) or not told.updates[k] or not told.direction:
        return replace(found, value=math.nan, low=-math.inf, high=math.inf, method=f"{method}; unresolved")
    return found


def _estimate(result: Jackknifed, k: int, *, level: float, **spoken: Any) -> Estimate:
    found = estimate_of(result, k, level=level, **spoken)
    reaches = found.high >= 1.0 if found.value >= 0.0 else found.low <= -1.0
    if result.own is not None and reaches and math.isfinite(found.low):
        further = error_further_away(result, k, level)
        least = (further, 0.0) if found.value >= 0.0 else (0.0, further)
        found = estimate_of(result, k, level=level, least=least, **spoken)
    return within_one(found)


def error_further_away(result: Jackknifed, k: int, level: float) -> float:
    """How far from +-1 beyond its estimate cosine k may lie, at the error that it would have there.

    With d = 1 - |cos| the variance is pairs + slope d, d the estimate's own distance plus reach = q sqrt(variance).
    Pairs of responses add the same everywhere. The slope is twice the variance of delta along itself: what the
    jackknife finds (which has 2 pairs at d = 0) over d with the products of a response with itself in it, at most
    4 sqrt(pairs / 2), as if delta erred in its own direction alone. Where E[g | L] moves, grpo's and vl_norm 2's were
    covered 81 to 88% without (N = 512).
    """
    if result.own is None or result.surplus is None:
        raise ValueError("only of cosines by responses")
    noise, pairs = (max(float(part[k]), 0.0) for part in result.surplus)
    variance = sum(float(jackknife_variance(r[:, k])) for r in result.replicates) - noise
    distance, most = 1.0 - abs(float(result.value[k])), math.sqrt(pairs / 2.0)
    plain = max(distance, 0.0) + max(float(result.own[k]) * (1.0 if result.value[k] >= 0.0 else -1.0), most)
    if not (math.isfinite(variance) and variance > 0.0 and plain > 0.0):
        return 0.0
    slope, square = min(variance / plain, 4.0 * most), float(result.quantiles(level)[k]) ** 2
    half = square * slope / 2.0
    inside = half**2 + square * (pairs + slope * distance)
    return half + math.sqrt(inside) if inside >= 0.0 else 0.0


def within_one(found: Estimate) -> Estimate:
    """Estimate of a cosine with the interval brought into [-1, 1]; see `cosine_estimate`.

    An interval wholly beyond 1 is too narrow: its half-width is laid off from 1. NaN where a value beyond has none.
    """
    if math.isnan(found.value):
        return found
    if math.isnan(found.low):
        if abs(found.value) <= 1.0:
            return found
        return replace(found, value=math.nan, method=f"{found.method}; unresolved")
    if abs(found.value) < 1.0 and (found.high < 1.0 if found.value >= 0.0 else found.low > -1.0):
        width = 1.0 - found.value**2
        low, high = ((end - found.value) / width for end in (found.low, found.high))
        centre = math.atanh(found.value)
        ends = math.tanh(centre + low), math.tanh(centre + high)
        # Nor nearer than they were: where an interval falls just short of 1, Fisher's upper end missed up to 8% alone.
        return replace(found, low=min(ends[0], found.low), high=max(ends[1], found.high))
    value, low, high = (min(max(x, -1.0), 1.0) for x in (found.value, found.low, found.high))
    if low == 1.0:
        low = max(1.0 - (found.value - found.low), -1.0)
    if high == -1.0:
        high = min((found.high - found.value) - 1.0, 1.0)
    return replace(found, value=value, low=low, high=high)
