"""Does the sampler's distribution agree with the policy's? Log-probabilities of the same tokens, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class SamplerAgreement:
    """How far the sampler's log-probabilities lie from the policy's on the sampled tokens, in nats."""

    mean_abs: float
    """Mean over tokens of |log p_sampler - log p_policy|."""
    max_abs: float
    """Largest of these."""
    mean_difference: float
    """Mean over tokens of log p_sampler - log p_policy: an estimate of KL(sampler || policy) per token."""
    worst_response: int
    """Index of the response with the largest difference."""
    worst_token: int
    """Position of that token in its response."""
    n_tokens: int
    """Tokens compared."""


def sampler_agreement(
    sampler: Sequence[ArrayLike], policy: Sequence[ArrayLike], masks: Sequence[ArrayLike | None]
) -> SamplerAgreement:
    """Compare sampler and policy log-probabilities token by token.

    Args:
        sampler: N arrays, (T_i,) nats.
        policy: N arrays, (T_i,) nats.
        masks: N arrays of 0 and 1, (T_i,), tokens that count; None means all.

    Raises:
        ValueError: No token to compare, or shapes differ.
    """
    differences: list[NDArray[np.float64]] = []
    for ours, theirs, mask in zip(sampler, policy, masks, strict=True):
        difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
        counts = np.ones(len(difference), dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        differences.append(np.where(counts, difference, 0.0))
    n_tokens = sum(len(d) if m is None else int(np.sum(m)) for d, m in zip(differences, masks, strict=True))
    if n_tokens == 0:
        raise ValueError("no token carries both a sampler and a policy log-probability")
    peaks = np.array([np.max(np.abs(d)) for d in differences])
    worst = int(np.argmax(peaks))
    return SamplerAgreement(
        mean_abs=float(sum(np.abs(d).sum() for d in differences) / n_tokens),
        max_abs=float(peaks[worst]),
        mean_difference=float(sum(d.sum() for d in differences) / n_tokens),
        worst_response=worst,
        worst_token=int(np.argmax(np.abs(differences[worst]))),
        n_tokens=n_tokens,
    )
