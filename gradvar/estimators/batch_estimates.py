"""From a batch's moments to numbers with intervals: rho, CV, ratios, the parts of the variance.

Intervals are for prompts like these: a delete-one-prompt jackknife, t over K - 1, none below 4 prompts. A sketch's own
error is told by the spread of its R parts (delete-one-part jackknife) and its variance is added, so that the interval
covers both; degrees of freedom by Satterthwaite. rho and CV are on the scale of log(1 - rho), ratios on the log; there
what a linearisation leaves out of the variance is added too.
Shape letters: K prompts, R repeats of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.batches import BatchMoments
from gradvar.estimators.intervals import MINIMUM_PROMPTS, jackknife_variance, t_quantile
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

METHOD = "inner products across prompts, delete-one-prompt jackknife, t"


class Moments(NamedTuple):
    """power, given and signal of one kind of batch, as numbers or as rows of replicates."""

    power: Array
    given: Array
    signal: Array


Statistic = Callable[..., Array]
"""Moments, of one kind of batch or of several paired ones, to a number, elementwise."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A statistic and what it may be off by."""

    value: float
    error: float
    """Standard error over prompts, the sketch's own included; NaN where there is none."""
    sketch: float
    """The part of it that the sketch makes; 0 for exact products."""
    degrees: float
    """Degrees of freedom of the error."""
    remainder: float = 0.0
    """Relative size of what linearisations leave out of the variances."""

    def half_width(self, level: float) -> float:
        """Return the half-width of the t interval; NaN where there is no error."""
        return t_quantile(level, self.degrees) * self.error


def total_rho(m: Moments) -> Array:
    """Return rho = signal / power: 1 / (1 + CV^2) of the update, prompts and responses drawn again."""
    return m.signal / m.power


def given_rho(m: Moments) -> Array:
    """Return given / power: rho of the update around its mean on the batch's own prompts."""
    return m.given / m.power


def between_share(m: Moments) -> Array:
    """Return the part of the variance that lies between prompts."""
    return (m.given - m.signal) / (m.power - m.signal)


def intra_variance(m: Moments) -> Array:
    """Return E tr Var(ghat | prompts)."""
    return m.power - m.given


def between_variance(m: Moments) -> Array:
    """Return tr Var E[ghat | prompts]."""
    return m.given - m.signal


def squared_signal(m: Moments) -> Array:
    """Return ||E ghat||^2."""
    return m.signal + 0.0


def log_cv_ratio(m: Moments, reference: Moments) -> Array:
    """Return log of the CV over the reference's; NaN where a variance or squared signal is not positive."""
    return np.asarray(
        0.5
        * (
            np.log(m.power - m.signal)
            - np.log(m.signal)
            - np.log(reference.power - reference.signal)
            + np.log(reference.signal)
        )
    )


def spread(statistic: Statistic, *batches: BatchMoments) -> Spread:
    """Evaluate a statistic of one or more kinds of batch, paired by prompt and part of the sketch."""
    repeats, prompts = batches[0].power_without.shape
    remainder = sum(b.remainder for b in batches)
    with np.errstate(all="ignore"):
        value = float(statistic(*[Moments(b.power.mean(), b.given.mean(), b.signal.mean()) for b in batches]))
        without_prompt = statistic(
            *[
                Moments(b.power_without.mean(axis=0), b.given_without.mean(axis=0), b.signal_without.mean(axis=0))
                for b in batches
            ]
        )
        by_prompts = float(jackknife_variance(without_prompt)) if prompts >= MINIMUM_PROMPTS else math.nan
        by_sketch = 0.0
        if repeats > 1:
            without_part = statistic(
                *[Moments(_without(b.power), _without(b.given), _without(b.signal)) for b in batches]
            )
            by_sketch = float(jackknife_variance(without_part))
    total = by_prompts + by_sketch
    if not math.isfinite(total):
        return Spread(value=value, error=math.nan, sketch=math.sqrt(by_sketch), degrees=math.nan, remainder=remainder)
    parts = by_prompts**2 / (prompts - 1) + (by_sketch**2 / (repeats - 1) if repeats > 1 else 0.0)
    degrees = total**2 / parts if parts > 0 else float(prompts - 1)
    return Spread(
        value=value, error=math.sqrt(total), sketch=math.sqrt(by_sketch), degrees=degrees, remainder=remainder
    )


def _without(parts: Array) -> Array:
    return np.asarray((parts.sum() - parts) / (len(parts) - 1))


def plain_estimate(found: Spread, none: Estimate) -> Estimate:
    """Return value and symmetric t interval."""
    half = found.half_width(none.level)
    return replace(none, value=found.value, low=found.value - half, high=found.value + half)


def rho_interval(found: Spread, none: Estimate) -> Estimate:
    """Return rho with its interval on the scale of log(1 - rho); NaN where there is no update at all."""
    value, half = found.value, found.half_width(none.level)
    if not math.isfinite(half):
        return replace(none, value=value)
    noise = 1.0 - value
    if noise <= 0.0:
        return replace(none, value=value, low=value - half, high=value + half)
    stretch = math.exp(min(half / noise + found.remainder, 700.0))
    return replace(none, value=value, low=1.0 - noise * stretch, high=1.0 - noise / stretch)


def ratio_estimate(found: Spread, none: Estimate) -> Estimate:
    """Return a ratio with its interval from its logarithm; NaN in [0, inf] where that is undefined ("unresolved")."""
    half = found.half_width(none.level)
    if not math.isfinite(found.value):
        return replace(none, value=math.nan, low=0.0, high=math.inf, method=f"{none.method}; unresolved")
    if not math.isfinite(half):
        return replace(none, value=math.exp(found.value))
    half += found.remainder / 2  # of log CV, half of that of log variance
    return replace(
        none,
        value=math.exp(found.value),
        low=math.exp(max(found.value - half, -700.0)),
        high=math.exp(min(found.value + half, 700.0)),
    )
