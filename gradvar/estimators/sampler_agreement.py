"""Does the sampler's distribution agree with the policy's? Two tests on log-probabilities.

With the sampler's log-probabilities at hand, token by token; without them, by the policy's alone: a token drawn from
the policy has E[log p + H] = 0 given what came before, H the policy's entropy there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from gradvar.runs.records import Estimate


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


@dataclass(frozen=True, kw_only=True)
class EntropyBalance:
    """Whether the sampled tokens are as likely under the policy as its own samples are."""

    surplus: Estimate
    """Mean over responses of sum_t (log p_t + H_t), nats a response; 0 under the policy, above 0 for a sampler that is
    too sure (a lower temperature, top-p, top-k), below 0 for one that is not sure enough."""
    p_value: float
    """Two-sided, Student t over responses."""


def entropy_balance(log_probs: Sequence[ArrayLike], entropies: Sequence[ArrayLike], *, level: float) -> EntropyBalance:
    """Test E[sum_t (log p_t + H_t)] = 0, the prompts' mean of a per-response martingale.

    Args:
        log_probs: K arrays (N_k,), summed log-probability of each response of a prompt under the policy, in nats.
        entropies: K arrays (N_k,), summed entropy of the policy along it, in nats.
        level: Nominal coverage of the interval.

    Returns:
        The mean with its interval, responses drawn again within these prompts, and the p value.

    Raises:
        ValueError: Fewer than two responses to a prompt.
    """
    surpluses = [
        np.asarray(lp, dtype=np.float64) + np.asarray(h, dtype=np.float64)
        for lp, h in zip(log_probs, entropies, strict=True)
    ]
    if not surpluses or min(len(one) for one in surpluses) < 2:
        raise ValueError("the entropy balance needs at least two responses to every prompt")
    n = sum(len(one) for one in surpluses)
    value = float(np.concatenate(surpluses).mean())
    variance = sum(len(one) * np.var(one, ddof=1) for one in surpluses) / n**2
    degrees = n - len(surpluses)
    half = float(special.stdtrit(degrees, 0.5 + level / 2) * np.sqrt(variance))
    z = value / np.sqrt(variance) if variance > 0 else (0.0 if value == 0 else np.inf)
    return EntropyBalance(
        surplus=Estimate(
            value=value,
            low=value - half,
            high=value + half,
            level=level,
            method="mean of sum_t (log p + H), t over responses within prompts",
            n=n,
            clusters=len(surpluses),
            seed=None,
        ),
        p_value=float(2 * special.stdtr(degrees, -abs(z))),
    )
