"""Advantage estimators: rewards of one group of responses to the number that multiplies each score.

Every kind works on the last axis, so one call serves one group or a stack of groups. Shape letters: ... stacked
groups, n responses of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.runs.config import ADVANTAGE_KINDS

Array = NDArray[np.float64]

STD_FLOOR = 1e-6
"""Added to the standard deviation by verl (0.8.0.dev, compute_grpo_outcome_advantage)."""


def _grpo(rewards: Array, lengths: Array | None) -> Array:
    centred = _mean(rewards, lengths)
    scaled: Array = centred / (np.std(rewards, axis=-1, ddof=1, keepdims=True) + STD_FLOOR)
    return scaled


def _mean(rewards: Array, lengths: Array | None) -> Array:
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    # A group of equal rewards has advantage 0, not the rounding error of its mean.
    silent = np.ptp(rewards, axis=-1, keepdims=True) == 0.0
    return np.asarray(np.where(silent, 0.0, centred))


def _rloo(rewards: Array, lengths: Array | None) -> Array:
    n = float(rewards.shape[-1])
    return _mean(rewards, lengths) * (n / (n - 1))


def _raw(rewards: Array, lengths: Array | None) -> Array:
    return rewards.copy()


def _score(rewards: Array, lengths: Array | None) -> Array:
    return np.ones_like(rewards)


def _opo(rewards: Array, lengths: Array | None) -> Array:
    if lengths is None:
        raise GradvarError("advantage 'opo' weights its baseline by length: give lengths")
    baseline = (lengths * rewards).sum(axis=-1, keepdims=True) / lengths.sum(axis=-1, keepdims=True)
    silent = np.ptp(rewards, axis=-1, keepdims=True) == 0.0
    return np.asarray(np.where(silent, 0.0, rewards - baseline))


_DEFINED: dict[str, Callable[[Array, Array | None], Array]] = {
    "grpo": _grpo,
    "mean": _mean,
    "rloo": _rloo,
    "raw": _raw,
    "score": _score,
    "opo": _opo,
}
ADVANTAGES = {name: _DEFINED[name] for name in ADVANTAGE_KINDS}
"""Every advantage estimator by its name; the names stand in the run's settings."""

_NEEDS_TWO = {"grpo", "mean", "rloo"}


def check_advantage(kind: str) -> None:
    """Refuse an unknown advantage.

    Raises:
        GradvarError: No advantage estimator has the name.
    """
    if kind not in ADVANTAGES:
        raise GradvarError(f"unknown advantage {kind!r}: expected one of {', '.join(ADVANTAGES)}")


def advantages(rewards: Any, kind: str, *, lengths: Any | None = None) -> Array:
    """Advantages A (..., n) inside groups of responses to one prompt.

    With r the rewards of the group (last axis):
        grpo   (r - mean) / (std + 1e-6), std with n - 1 (verl, SkyRL)
        mean   r - mean (Dr. GRPO)
        rloo   r_i - mean of the others = (r_i - mean) n / (n - 1)
        raw    r
        score  1
        opo    r - sum(L r) / sum(L) (verl's opo)
    A group whose rewards are all equal has advantage exactly 0 under grpo, mean, rloo and opo.

    Args:
        rewards: (..., n) rewards, one group in the last axis.
        kind: One of the names above.
        lengths: (..., n) lengths in tokens, needed by opo.

    Returns:
        (..., n) float64.

    Raises:
        GradvarError: Unknown kind, a reward that is NaN (an unverified response: leave it out first), lengths
            missing or of another shape, or a single response where a baseline needs two.
    """
    check_advantage(kind)
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise GradvarError(f"rewards must hold at least one response, received shape {values.shape}")
    if kind != "score" and not np.isfinite(values).all():
        raise GradvarError(
            f"{int((~np.isfinite(values)).sum())} rewards are not finite: leave unverified responses out "
            "(PromptScores.verified) before an advantage is computed"
        )
    if kind in _NEEDS_TWO and values.shape[-1] < 2:
        raise GradvarError(f"advantage {kind!r} compares responses: expected a group of at least 2, received 1")
    sizes = None if lengths is None else np.asarray(lengths, dtype=np.float64)
    if sizes is not None and sizes.shape != values.shape:
        raise GradvarError(f"lengths of shape {sizes.shape} do not match rewards of shape {values.shape}")
    return ADVANTAGES[kind](values, sizes)
