"""The share of silent groups, whose rewards are all equal, of a prompt and over several.

Shape letters: N responses, K prompts, n responses of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from gradvar.estimators.groups import silent_share
from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    effective_degrees,
    jackknife_variance,
    t_quantile,
    wilson,
)
from gradvar.runs.records import Estimate, PromptScores, TableRow

Array = NDArray[np.float64]


METHOD = "exact over groups drawn without replacement; Wilson's interval for the commonest reward"


def silent_estimate(rewards: Array, group_size: int, *, level: float, seed: int | None) -> Estimate:
    """Share of silent groups of a prompt with these rewards (N,), n at most N.

    With q the chance of the commonest reward and the others' shares among themselves as they are, the share is
    q^n + (1 - q)^n sum_k o_k^n, convex in q: its image of Wilson's interval for q. Three rewards and more vary among
    themselves too: at least as wide as a jackknife (56 to 76% were covered without).
    """
    counts = np.sort(np.unique(rewards, return_counts=True)[1])[::-1]
    ends = wilson(int(counts[0]), len(rewards), level)
    others = float(((counts[1:] / max(len(rewards) - int(counts[0]), 1)) ** group_size).sum())
    # Least where q^(n - 1) = (1 - q)^(n - 1) others; where no other reward was seen, one that is as good as any.
    root = (others or 1.0) ** (1.0 / max(group_size - 1, 1))
    q = np.array([*ends, np.clip(root / (1.0 + root), *ends)])
    shares = q**group_size + (1.0 - q) ** group_size * (others or 1.0)
    value = silent_share(rewards, group_size)
    half = jackknife_half(rewards, group_size, level) if len(counts) > 2 else 0.0
    return Estimate(
        value=value,
        low=max(min(value - half, float(shares.min())), 0.0),
        high=min(max(value + half, float(shares.max())), 1.0),
        level=level,
        method=METHOD,
        n=len(rewards),
        clusters=1,
        seed=seed,
    )


def jackknife_half(rewards: Array, group_size: int, level: float) -> float:
    """Half-width of a prompt's share by leaving out one response; 1 where no group is left then."""
    if len(rewards) <= group_size:
        return 1.0
    _, first, counts = np.unique(rewards, return_index=True, return_counts=True)
    without = np.array([silent_share(np.delete(rewards, i), group_size) for i in first])
    variance = float(jackknife_variance(np.repeat(without, counts)))
    return float(special.ndtri(0.5 + level / 2.0)) * math.sqrt(variance)


def silent_rows(
    prompts: Sequence[PromptScores], sizes: Sequence[int], labels: dict[str, Any], *, level: float, seed: int
) -> list[TableRow]:
    """Mean share of silent groups over all prompts, silent ones among them, for both estimands.

    For these prompts the squares of each prompt's half-widths add (Zou and Donner 2008), at least a jackknife's: an
    interval that ends at 0, or at the least share that a half makes, has nothing on that side, and where many prompts'
    do 82 to 92% were covered. For prompts like these `share_interval`, from 4 prompts on.
    """
    rows = []
    for n in sizes:
        known = [s.rewards[~np.isnan(s.rewards)] for s in prompts]
        if any(len(rewards) < n for rewards in known):
            continue
        own = [silent_estimate(rewards, n, level=level, seed=seed) for rewards in known]
        shares = np.array([one.value for one in own])
        least = sum(jackknife_half(rewards, n, level) ** 2 for rewards in known)
        below, above = (
            math.sqrt(max(least, sum((end - one.value) ** 2 for end, one in zip(ends, own, strict=True)))) / len(own)
            for ends in ([one.low for one in own], [one.high for one in own])
        )
        low, high = share_interval(shares, level)
        method = f"mean of the prompts' exact shares, t on the logit; {PROMPTS_LIKE_THESE}"
        if math.isnan(low):
            few = len(shares) < MINIMUM_PROMPTS
            method += f"; not given below {MINIMUM_PROMPTS} prompts" if few else "; no interval, the shares are equal"
        estimate = Estimate(
            value=float(shares.mean()),
            low=low,
            high=high,
            level=level,
            method=method,
            n=sum(len(rewards) for rewards in known),
            clusters=len(known),
            seed=seed,
        )
        here = f"mean of the prompts' exact shares, half-widths added in squares; {THESE_PROMPTS}"
        mean = estimate.value
        for one, estimand in (
            (replace(estimate, low=max(mean - below, 0.0), high=min(mean + above, 1.0), method=here), THESE_PROMPTS),
            (estimate, PROMPTS_LIKE_THESE),
        ):
            extra = {"estimand": estimand}
            rows.append(TableRow(quantity="silent_share", estimate=one, group_size=n, **labels, extra=extra))
    return rows


def share_interval(shares: Array, level: float) -> tuple[float, float]:
    """Ends for the mean of shares (K,) of prompts like these; NaN below 4 prompts, or where shares are equal.

    Most prompts have few silent groups and some have nearly all, so the mean of few prompts misses the latter: a t
    interval covered 64 to 94% with 4 to 16 prompts. On the logit, with degrees of freedom from how unevenly prompts
    contribute, and as if two more prompts were like the one farthest out on either side, 88 to 99% were. Either end
    goes at least as far as the exact interval of K trials without a success (or a failure), for silent prompts of
    which these K hold none: 96 to 100%.
    """
    count, mean = len(shares), float(shares.mean())
    if count < MINIMUM_PROMPTS:
        return math.nan, math.nan
    rare = 1.0 - ((1.0 - level) / 2.0) ** (1.0 / count)
    if not 0.0 < mean < 1.0:
        return (0.0, rare) if mean == 0.0 else (1.0 - rare, 1.0)
    if np.ptp(shares) == 0.0:
        return math.nan, math.nan
    influence = (shares - mean) / count
    variance = count / (count - 1) * float(influence @ influence)
    quantile = t_quantile(level, effective_degrees(influence, count - 1))
    middle, slope = float(special.logit(mean)), 1.0 / (mean - mean**2)
    below, above = (
        quantile * slope * math.sqrt(variance + 2.0 * float(end) ** 2) for end in (influence.min(), influence.max())
    )
    low, high = float(special.expit(middle - below)), float(special.expit(middle + above))
    return min(low, 1.0 - rare), max(high, rare)
