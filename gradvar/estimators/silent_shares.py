"""The share of silent groups, whose rewards are all equal, over several prompts.

Shape letters: K prompts, n responses of a group.
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
    t_quantile,
)
from gradvar.runs.records import Estimate, PromptScores, TableRow

Array = NDArray[np.float64]


def silent_rows(
    prompts: Sequence[PromptScores], sizes: Sequence[int], labels: dict[str, Any], *, level: float, seed: int
) -> list[TableRow]:
    """Mean share of silent groups over all prompts, silent ones among them, for both estimands.

    For prompts like these `share_interval`, from 4 prompts on.
    """
    rows = []
    for n in sizes:
        known = [s.rewards[~np.isnan(s.rewards)] for s in prompts]
        if any(len(rewards) < n for rewards in known):
            continue
        shares = np.array([silent_share(rewards, n) for rewards in known])
        low, high = share_interval(shares, level)
        estimate = Estimate(
            value=float(shares.mean()),
            low=low,
            high=high,
            level=level,
            method=f"mean of the prompts' exact shares, t on the logit; {PROMPTS_LIKE_THESE}",
            n=sum(len(rewards) for rewards in known),
            clusters=len(known),
            seed=seed,
        )
        here = f"mean of the prompts' exact shares, no interval; {THESE_PROMPTS}"
        for one, estimand in (
            (replace(estimate, low=math.nan, high=math.nan, method=here), THESE_PROMPTS),
            (estimate, PROMPTS_LIKE_THESE),
        ):
            extra = {"estimand": estimand}
            rows.append(TableRow(quantity="silent_share", estimate=one, group_size=n, **labels, extra=extra))
    return rows


def share_interval(shares: Array, level: float) -> tuple[float, float]:
    """Ends for the mean of shares (K,) of prompts like these; NaN below 4 prompts, or where shares are equal.

    Most prompts have few silent groups and some have nearly all, so the mean of few prompts misses the latter: a t
    interval covered 64 to 94% with 4 to 16 prompts. On the logit, with degrees of freedom from how unevenly prompts
    contribute, and as if two more prompts were like the one farthest out on either side, 88 to 99% are.
    Where all shares are 0 (or 1), the exact interval of K trials without a success, shares being chances.
    """
    count, mean = len(shares), float(shares.mean())
    if count < MINIMUM_PROMPTS:
        return math.nan, math.nan
    if not 0.0 < mean < 1.0:
        rare = 1.0 - ((1.0 - level) / 2.0) ** (1.0 / count)
        return (0.0, rare) if mean == 0.0 else (1.0 - rare, 1.0)
    influence = (shares - mean) / count
    if not influence.any():
        return math.nan, math.nan
    variance = count / (count - 1) * float(influence @ influence)
    quantile = t_quantile(level, effective_degrees(influence, count - 1))
    middle, slope = float(special.logit(mean)), 1.0 / (mean - mean**2)
    below, above = (
        quantile * slope * math.sqrt(variance + 2.0 * float(end) ** 2) for end in (influence.min(), influence.max())
    )
    return float(special.expit(middle - below)), float(special.expit(middle + above))
