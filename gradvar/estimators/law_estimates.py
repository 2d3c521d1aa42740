"""From a fitted law to its numbers: exponent, scale, curvature and families, each with its interval.

Shape letters: n responses fitted, K prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.intervals import (
    MINIMUM_PROMPTS,
    PROMPTS_LIKE_THESE,
    THESE_PROMPTS,
    effective_degrees,
    symmetric,
    t_quantile,
    without_surplus,
)
from gradvar.estimators.quasi import QuasiFit
from gradvar.estimators.spread_pairs import PairPart
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

MINIMUM_RESPONSES = 16
"""Fewer responses than this get an exponent without interval: its coverage was not measured below."""

FEWEST_BEHIND = 2.0
"""An exponent that rests on fewer responses than this (`responses_behind`) gets no interval: one response sets it."""


LARGEST_SHARE = 0.1
"""A response with more than this share of the deviations (`weights_behind`) is left out once, to see what it does."""


@dataclass(frozen=True, kw_only=True)
class FamilyFit:
    """One family of the law."""

    name: str
    """constant, proportional, affine or power."""
    parameters: dict[str, float]
    """By name, per token where L enters; for K > 1 the constants' geometric mean."""
    deviance: float
    """Gamma quasi-deviance: smaller fits better."""
    explained: float
    """1 - deviance / deviance of the constant family."""
    converged: bool
    """False where the fit ran to the edge of what the family allows."""


NO_PAIRS = PairPart()
"""Nothing is known of pairs, and nothing taken out."""


def error_of(influence: Array, pairs: PairPart) -> float:
    """Standard error: the root of the influences' sum of squares, less what pairs of responses add to it too often."""
    variance = float(influence @ influence)
    return math.sqrt(min(float(without_surplus(variance, pairs.counted - 2.0 * pairs.once, pairs.once)), variance))


def half_width(influence: Array, most: float, level: float, pairs: PairPart = NO_PAIRS) -> float:
    """Half an interval by influences (n,), with at most `most` degrees of freedom."""
    return t_quantile(level, effective_degrees(influence, most)) * error_of(influence, pairs)


def exponent_of(fit: QuasiFit, level: float, pairs: PairPart = NO_PAIRS) -> Estimate:
    """Exponent for these prompts; no interval below `MINIMUM_RESPONSES`. `pairs`: what pairs of responses add."""
    n, clusters = len(fit.shape_influence), len(fit.constants)
    counted = ", pairs counted once" if pairs.once > 0.0 else ""
    method = f"Gamma quasi-likelihood, HC3 sandwich{counted}, t; {THESE_PROMPTS}"
    if not fit.converged:
        return symmetric(math.nan, math.nan, level, method + "; did not converge", n, clusters)
    half = half_width(fit.shape_influence[:, 0], fit.degrees, level, pairs)
    if n < MINIMUM_RESPONSES:
        half, method = math.nan, method + f"; no interval below {MINIMUM_RESPONSES} responses"
    return symmetric(float(fit.shape[0]), half, level, method, n, clusters)


def exponent_across_of(fit: QuasiFit, level: float, pairs: PairPart = NO_PAIRS) -> Estimate:
    """Exponent for prompts like these: one prompt left out at a time, by one Newton step."""
    n, clusters = len(fit.shape_influence), len(fit.constants)
    method = f"Gamma quasi-likelihood, delete-one-prompt jackknife, t; {PROMPTS_LIKE_THESE}"
    if not fit.converged or clusters < MINIMUM_PROMPTS:
        note = f"; not given below {MINIMUM_PROMPTS} prompts" if clusters < MINIMUM_PROMPTS else "; did not converge"
        return symmetric(math.nan, math.nan, level, method + note, n, clusters)
    information = fit.cluster_information[:, 0, 0]
    moved = -fit.cluster_scores[:, 0] / (information.sum() - information)
    if not np.isfinite(moved).all():
        return symmetric(math.nan, math.nan, level, method + "; one prompt holds all the lengths", n, clusters)
    variance = (clusters - 1) / clusters * float(((moved - moved.mean()) ** 2).sum())
    # Prompts drawn again vary at least as much as responses drawn again: with 16 responses to each of 8 prompts the
    # jackknife over prompts alone covered 83 to 88%.
    alone = t_quantile(level, clusters - 1) * math.sqrt(variance)
    half = max(alone, half_width(fit.shape_influence[:, 0], fit.degrees, level, pairs))
    return symmetric(float(fit.shape[0]), half, level, method, n, clusters)


def resting_on(estimate: Estimate, behind: float) -> Estimate:
    """Return the estimate without interval where fewer than `FEWEST_BEHIND` responses carry it, which is said."""
    if behind >= FEWEST_BEHIND or math.isnan(estimate.low):
        return estimate
    note = f"; no interval, rests on {behind:.1f} responses"
    return replace(estimate, low=math.nan, high=math.nan, method=estimate.method + note)


def moved_by_one(estimate: Estimate, without: float) -> Estimate:
    """Return the estimate without interval where one response moves it by more than its half-width.

    `without` is the estimate when that response is left out, NaN where it was not tried. Leaving it out approximately,
    as the sandwich does, misses that the fit runs through it.
    """
    if not abs(estimate.value - without) > estimate.high - estimate.value:
        return estimate
    note = f"; no interval, one response moves it from {without:.2f}, by more than its half-width"
    return replace(estimate, low=math.nan, high=math.nan, method=estimate.method + note)


def following(estimate: Estimate, exponent: Estimate) -> Estimate:
    """Return the estimate without interval where the exponent of the same fit has none."""
    if math.isfinite(exponent.low) or math.isnan(estimate.low):
        return estimate
    return replace(estimate, low=math.nan, high=math.nan, method=f"{estimate.method}; no interval, as the exponent")


def scales_of(
    fit: QuasiFit, centre: float, level: float, pairs: PairPart = NO_PAIRS
) -> tuple[Estimate, Estimate, float]:
    """Scale at one token, level where its error is uncorrelated with the exponent's, and the length of that.

    `pairs` as for the exponent.
    """
    n, clusters = len(fit.shape_influence), len(fit.constants)
    method = f"Gamma quasi-likelihood, HC3 sandwich on the log, t; {THESE_PROMPTS}"
    if not fit.converged:
        none = symmetric(math.nan, math.nan, level, method + "; did not converge", n, clusters)
        return none, none, math.nan
    slope_influence = fit.shape_influence[:, 0]
    constant_influence = fit.constants_influence.mean(axis=1)
    spread = float(slope_influence @ slope_influence)
    pivot = -float(constant_influence @ slope_influence) / spread if spread > 0 else 0.0

    # The exponent's error and degrees of freedom serve the whole band, so that its pieces fit together.
    quantile = t_quantile(level, effective_degrees(slope_influence, fit.degrees))
    own, steep = float(np.linalg.norm(constant_influence + pivot * slope_influence)), error_of(slope_influence, pairs)

    def at(log_length: float) -> Estimate:
        log_value = float(fit.constants.mean()) + float(fit.shape[0]) * log_length
        half = quantile * math.hypot(own, (log_length - pivot) * steep)
        told = method
        if n < MINIMUM_RESPONSES:
            half, told = math.nan, f"{method}; no interval below {MINIMUM_RESPONSES} responses"
        with np.errstate(over="ignore"):
            value, low, high = (float(np.exp(log_value + step)) for step in (0.0, -half, half))
        return Estimate(value=value, low=low, high=high, level=level, method=told, n=n, clusters=clusters, seed=None)

    return at(-centre), at(pivot), _exp(centre + pivot)


def curvature_of(fit: QuasiFit, level: float) -> Estimate:
    """Coefficient of log(L)^2 in a curved fit."""
    n, clusters = len(fit.shape_influence), len(fit.constants)
    method = "Gamma quasi-likelihood, HC3 sandwich, t; coefficient of log(L)^2"
    if not fit.converged:
        return symmetric(math.nan, math.nan, level, method + "; not determined", n, clusters)
    if n < MINIMUM_RESPONSES:
        return symmetric(
            math.nan, math.nan, level, f"{method}; not estimated below {MINIMUM_RESPONSES} responses", n, clusters
        )
    half = half_width(fit.shape_influence[:, 1], fit.degrees, level)
    return symmetric(float(fit.shape[1]), half, level, method, n, clusters)


def _exp(value: float) -> float:
    """Exponential that overflows to infinity, as a fit without a finite scale deserves."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def families_of(fits: dict[str, QuasiFit], x: Array, centre: float) -> dict[str, FamilyFit]:
    """Families by name, from their fits."""
    base = fits["constant"].deviance

    def parameters(name: str, fit: QuasiFit) -> dict[str, float]:
        constant = float(fit.constants.mean())
        if name == "constant":
            return {"c": _exp(constant)}
        if name == "proportional":
            return {"c": _exp(constant - centre)}
        if name == "affine":
            value, s = _exp(constant), float(fit.shape[0])
            return {"a": value * (1.0 - s), "b": value * s / float(x.mean())}
        return {"c": _exp(constant - float(fit.shape[0]) * centre), "beta": float(fit.shape[0])}

    return {
        name: FamilyFit(
            name=name,
            parameters=parameters(name, fit),
            deviance=fit.deviance,
            explained=1.0 - fit.deviance / base if base > 0 else math.nan,
            converged=fit.converged,
        )
        for name, fit in fits.items()
    }
