"""One line of the calibration table: how the draws of one quantity in one setting cover its truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.calibration_draws import HERE
from benchmarks.calibration_simulated import Found
from gradvar.estimators.comparison import estimate_difference
from gradvar.estimators.intervals import decide_from_margin, wilson
from gradvar.runs.records import Estimate

KINDS = {"law", "groups", "audit", "proxies", "forms", "lines", "extras"}
MARGINS = {
    "deviation exponent": (0.75, 1.25),
    "within exponent": (0.75, 1.25),
    "cv ratio": (-math.inf, 1.0),
    "length pressure": (-math.inf, 0.0),
    "assumption 0: identity": (-math.inf, 0.1),
    "assumption 1": (-0.1, 0.1),
    "assumption 3": (0.9, 1.1),
    "assumption 4": (-math.inf, 0.25),
}
"""Quantities with a verdict, by the beginning of their name."""
EDGES = {
    "cosine ": (-1.0, 1.0),
    "silent share": (0.0, 1.0),
    "eta ratio ": (0.0, math.inf),
    "eta ": (0.0, 1.0),
    "alpha* ": (0.0, 3.0),
}
"""Least and greatest value of a quantity (of alpha*, on the grid), by the beginning of its name, where an interval may
end: beyond it nothing can fail."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is drawn: one law, or K prompts each with one of several."""

    name: str
    laws: tuple[str, ...]
    n: int
    prompts: int
    draws: int
    kinds: frozenset[str] = frozenset(KINDS)


def _of_quantity(ranges: dict[str, tuple[float, float]], quantity: str) -> tuple[float, float] | None:
    """The range of a quantity, if it has one."""
    return next((ends for start, ends in ranges.items() if quantity.startswith(start)), None)


def row_of(found: Sequence[Found], setting: Setting) -> dict[str, Any]:
    """One line of the table."""
    truth, value, low, high = (np.array([getattr(f, x) for f in found]) for x in ("truth", "value", "low", "high"))
    too_high, too_low = low > truth + 1e-12, high < truth - 1e-12
    missed = too_high | too_low
    bounded = np.isfinite(low) & np.isfinite(high)
    one = found[0]
    if one.quantity.endswith("p value"):
        missed, bounded = value < 0.05, np.ones_like(missed)
    count = len(found)
    ends = wilson(int((~missed).sum()), count, 0.95)
    error = (value - truth)[np.isfinite(value) & np.isfinite(truth)]
    margin, wrong, rejected = _of_quantity(MARGINS, one.quantity), math.nan, math.nan
    edges = _of_quantity(EDGES, one.quantity) or (-math.inf, math.inf)
    if margin is not None:
        sides = np.array([decide_from_margin(f.value, f.low, f.high, *margin) for f in found])
        inside = (margin[0] <= truth) & (truth <= margin[1])
        wrong = float((((sides == 1) & ~inside) | ((sides == -1) & inside)).mean())
        rejected = float((sides == -1).mean())
    return {
        "setting": setting.name,
        "n": setting.n,
        "prompts": setting.prompts,
        "quantity": one.quantity,
        "estimand": one.estimand,
        "draws": count,
        "truth": _short(float(np.median(truth))),
        "coverage": round(1 - float(missed.mean()), 3),
        "coverage_low": round(ends[0], 3),
        "coverage_high": round(ends[1], 3),
        "too_high": round(float(too_high.mean()), 3),
        "too_low": round(float(too_low.mean()), 3),
        "at_edge": round(float((bounded & ((low <= edges[0]) | (high >= edges[1]))).mean()), 3),
        "no_interval": round(1 - float(bounded.mean()), 3),
        "bounded_coverage": round(1 - float(missed[bounded].mean()), 3) if bounded.any() else "",
        "median_bias": _short(float(np.median(error))) if error.size else "",
        "width": _short(float(np.median(high[bounded] - low[bounded])))
        if bounded.any() and np.isfinite(low).any()
        else "",
        "wrong": "" if math.isnan(wrong) else round(wrong, 3),
        "rejected": "" if math.isnan(rejected) else round(rejected, 3),
    }


def _short(x: float) -> Any:
    return "" if math.isnan(x) else float(f"{x:.4g}")


def difference_of(name: str, one: Found, two: Found) -> Found:
    """Two runs of the same law, as `compare` sets them side by side: no difference, or a ratio of 1."""
    first, second = (
        Estimate(value=f.value, low=f.low, high=f.high, level=0.95, method="", n=1, clusters=1, seed=None)
        for f in (one, two)
    )
    made = estimate_difference(name, first, second)
    ratio = name in ("cv", "noise_scale")
    label = f"compare: {one.quantity}, {'ratio' if ratio else 'difference'} of two runs"
    return Found(
        quantity=label, estimand=HERE, truth=1.0 if ratio else 0.0, value=made.value, low=made.low, high=made.high
    )
