"""Assumption 0: the rollouts come from this policy at this temperature, so the score has mean zero.

E s = 0 holds for responses sampled from exactly the policy that is differentiated. A wrong temperature, a cut tail
(top-p), another tokenizer or checkpoint breaks it. Measured by the mean inner product of different responses,
which estimates ||E s||^2 without bias. Shape letters: N responses, n of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.intervals import (
    check_level,
    decide_from_margin,
    jackknife_variance,
    n_to_decide,
    t_quantile,
)
from gradvar.estimators.spread import weighted_gram
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

SUPPORTED = "supported"
REJECTED = "rejected"
UNDETERMINED = "undetermined"
VERDICTS = {1: SUPPORTED, -1: REJECTED, 0: UNDETERMINED}

FLIPS = 999


@dataclass(frozen=True, kw_only=True, eq=False)
class IdentityParts:
    """What one prompt contributes."""

    off_diagonal: float
    """Mean S_ij, i != j."""
    diagonal: float
    """Mean S_ii."""
    off_diagonal_without: Array
    """(N,) delete-one replicates."""
    diagonal_without: Array
    """(N,) delete-one replicates."""
    flipped: Array
    """(flips,) the off-diagonal mean under random signs of the responses."""


@dataclass(frozen=True, kw_only=True, eq=False)
class IdentityCheck:
    """Does E s = 0 hold, to within a margin that would matter?"""

    signal: Estimate
    """n ||E s||^2 / E||s||^2: squared length of the mean of n scores' expectation against its noise."""
    p_value: Estimate
    """One-sided, by random signs: small where different responses' scores point the same way."""
    verdict: str
    """"supported" (signal's interval below the margin), "rejected" (above it) or "undetermined"."""
    n_needed: float
    """Responses that would settle the verdict."""


def score_identity(
    gram: Any,
    *,
    group_size: int = 8,
    margin: float = 0.1,
    level: float = 0.95,
    flips: int = FLIPS,
    rng: np.random.Generator,
) -> IdentityCheck:
    """Check E s = 0 for one prompt.

    Args:
        gram: (N, N) score Gram.
        group_size: n; the margin asks whether the mean score would show against the noise of n responses.
        margin: ||E s||^2 has to be below margin * E||s||^2 / n.
        level: Nominal coverage.
        flips: Random sign vectors behind the p value.
        rng: Draws the signs.

    Returns:
        Signal, p value and verdict. The verdict rests on the interval alone: a p value that is not small is not
        support. Below 4 responses there is no interval and the verdict is "undetermined".

    Raises:
        GradvarError: Fewer than two responses, or scores that are all 0.
    """
    parts = identity_parts(gram, flips=flips, rng=rng)
    return identity_from_parts([parts], group_size=group_size, margin=margin, level=level)


def identity_parts(gram: Any, *, flips: int = FLIPS, rng: np.random.Generator) -> IdentityParts:
    """Compute one prompt's means, delete-one replicates and sign flips."""
    matrix = weighted_gram(gram)
    n = matrix.shape[0]
    if n < 2:
        raise GradvarError("the score identity compares different responses: expected at least 2, received 1")
    if float(np.trace(matrix)) <= 0.0:
        raise GradvarError("all scores are 0: these parameters do not act on the log-probabilities")
    diagonal = np.diagonal(matrix)
    rows = matrix.sum(axis=1) - diagonal
    total, trace = float(rows.sum()), float(diagonal.sum())
    signs = rng.integers(0, 2, size=(flips, n)) * 2.0 - 1.0
    flipped = (((signs @ matrix) * signs).sum(axis=1) - trace) / (n * (n - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        without = (total - 2.0 * rows) / (np.float64(n - 1) * (n - 2))
    return IdentityParts(
        off_diagonal=total / (n * (n - 1)),
        diagonal=trace / n,
        off_diagonal_without=without,
        diagonal_without=(trace - diagonal) / (n - 1),
        flipped=flipped,
    )


def identity_from_parts(prompts: list[IdentityParts], *, group_size: int, margin: float, level: float) -> IdentityCheck:
    """Judge one prompt, or several together (sums over prompts in numerator and denominator)."""
    check_level(level)
    if not margin > 0 or group_size < 1:
        raise GradvarError(f"margin must be positive and group_size at least 1, received {margin} and {group_size}")
    off, on = sum(p.off_diagonal for p in prompts), sum(p.diagonal for p in prompts)
    n, clusters = sum(len(p.diagonal_without) for p in prompts), len(prompts)
    value = group_size * off / on
    half = math.nan
    if all(len(p.diagonal_without) >= 4 for p in prompts):
        with np.errstate(invalid="ignore", divide="ignore"):  # one response carries all: no interval
            variance = sum(
                float(
                    jackknife_variance(
                        group_size
                        * (off - p.off_diagonal + p.off_diagonal_without)
                        / (on - p.diagonal + p.diagonal_without)
                    )
                )
                for p in prompts
            )
        half = t_quantile(level, n - clusters) * math.sqrt(variance)
    signal = Estimate(
        value=value,
        low=value - half,
        high=value + half,
        level=level,
        method="mean inner product of different responses, delete-one jackknife, t",
        n=n,
        clusters=clusters,
        seed=None,
    )
    flipped = np.sum([p.flipped for p in prompts], axis=0)
    # Random signs leave the value unchanged where N = 1 pair repeats it: count ties as at least as large.
    p = (1 + int((flipped >= off - 1e-12 * abs(off)).sum())) / (1 + len(flipped))
    return IdentityCheck(
        signal=signal,
        p_value=Estimate(
            value=p,
            low=math.nan,
            high=math.nan,
            level=level,
            method=f"one-sided, {len(flipped)} random sign flips of responses",
            n=n,
            clusters=clusters,
            seed=None,
        ),
        verdict=VERDICTS[decide_from_margin(value, signal.low, signal.high, -math.inf, margin)],
        n_needed=n_to_decide(n, value, signal.low, signal.high, -math.inf, margin),
    )
