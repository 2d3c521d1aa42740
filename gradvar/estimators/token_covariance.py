"""Assumption 1: the gradients of different tokens of a response are uncorrelated.

With tau_i = sum_t ||grad log pi_t||^2, measured by random signs, and S_ii = ||sum_t grad log pi_t||^2,

    share = 1 - sum_i tau_i / sum_i S_ii

is the part of the squared norm that comes from pairs of different tokens. Over all responses sampled from the policy it
is 0 in theory (a check of the instrument); given the length or the reward it need not be. A ratio of sums, never a mean
of ratios. Shape letters: N responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators.additive import Sums, of_these_prompts
from gradvar.estimators.identity import VERDICTS
from gradvar.estimators.intervals import check_level, decide_from_margin, n_to_decide
from gradvar.estimators.length_bins import length_bins
from gradvar.estimators.spread import weighted_gram
from gradvar.runs.records import Estimate

Array = NDArray[np.float64]

ALL = "all responses"
METHOD = "1 - sum tau / sum S_ii, delete-one jackknife, t"
MARGIN = 0.1
BINS = 2
"""Length bins within a reward class."""
SMALLEST = 8
"""Responses below which a bin is not made, and no interval given."""


@dataclass(frozen=True, kw_only=True)
class TokenShare:
    """Share of token covariance in one bin of length and reward."""

    scope: str
    """"all responses", or the bin: "reward 1, length bin 1 of 2"."""
    share: Estimate
    """1 - sum tau / sum S_ii."""
    length_low: float
    """Shortest response, tokens."""
    length_high: float
    """Longest response, tokens."""
    probe_part: float
    """Part of the squared error that the random signs make, which more probes would lower; NaN where not known."""
    verdict: str
    """"supported", "rejected" or "undetermined"."""
    n_needed: float
    """Responses that would settle the verdict, at as many probes a response."""


def token_covariance(
    gram: Any,
    taus: Any,
    tau_errors: Any | None,
    lengths: Any,
    rewards: Any,
    *,
    bins: int = BINS,
    margin: float = MARGIN,
    level: float = 0.95,
) -> list[TokenShare]:
    """Share of the squared score norm that comes from pairs of tokens, overall and by reward and length.

    Args:
        gram: (N, N) score Gram, or a ScoreGram.
        taus: (N,) estimates of tau, NaN where not measured (left out).
        tau_errors: (N,) their standard errors over probes, or None. The jackknife holds the probes' noise already.
        lengths: (N,) tokens.
        rewards: (N,) rewards, NaN where unverified: those count in the overall share alone.
        bins: Length bins within each reward value; classes below 8 responses are left out. More than 4 different
            rewards are not split by reward.
        margin: The share is called 0 where its interval lies in [-margin, margin].
        level: Nominal coverage.

    Returns:
        The overall share first, then the bins. Below 8 responses there is no interval.

    Raises:
        GradvarError: Shapes that differ, taus that are negative or all missing, or a margin that is not positive.
    """
    check_level(level)
    if not margin > 0:
        raise GradvarError(f"margin must be positive, for example {MARGIN}, received {margin!r}")
    matrix = weighted_gram(gram.gram() if hasattr(gram, "gram") else gram)
    found = share_sums(np.diagonal(matrix), taus, lengths, rewards, bins=bins)
    sizes = np.asarray(lengths, dtype=np.float64)
    errors = None if tau_errors is None else np.asarray(tau_errors, dtype=np.float64)
    if errors is not None and errors.shape != sizes.shape:
        raise GradvarError(f"tau_errors of shape {errors.shape} do not match {len(sizes)} responses")
    shares = []
    for scope, (sums, rows) in found.items():
        estimate, verdict, needed = share_estimate([sums], margin=margin, level=level)
        shares.append(
            TokenShare(
                scope=scope,
                share=estimate,
                length_low=float(sizes[rows].min()),
                length_high=float(sizes[rows].max()),
                probe_part=probe_part(sums, None if errors is None else errors[rows]),
                verdict=verdict,
                n_needed=needed,
            )
        )
    return shares


def share_sums(
    norms: Array, taus: Any, lengths: Any, rewards: Any, *, bins: int = BINS
) -> Mapping[str, tuple[Sums, NDArray[np.intp]]]:
    """(sum tau, sum S_ii) and the rows behind them, overall and by bin."""
    tau = np.asarray(taus, dtype=np.float64)
    sizes, r = np.asarray(lengths, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    if not tau.shape == sizes.shape == r.shape == norms.shape:
        raise GradvarError(
            f"{len(norms)} responses in the gram, but taus {tau.shape}, lengths {sizes.shape} and rewards {r.shape}"
        )
    held = ~np.isnan(tau)
    if not held.any():
        raise GradvarError("tau is missing for every response: measure this prompt with probes")
    if not (np.isfinite(tau[held]).all() and (tau[held] >= 0).all()):
        raise GradvarError("taus are sums of squared norms: expected finite numbers, none negative")
    scopes = {ALL: np.flatnonzero(held)}
    values = np.unique(r[held & ~np.isnan(r)])
    classes = (
        {f"reward {v:g}": held & (r == v) for v in values} if len(values) <= 4 else {"verified": held & ~np.isnan(r)}
    )
    for name, chosen in classes.items():
        rows = np.flatnonzero(chosen)
        if len(rows) < SMALLEST:
            continue
        labels = length_bins(sizes[rows], bins, SMALLEST)
        count = int(labels.max()) + 1
        for b in range(count):
            scope = f"{name}, length bin {b + 1} of {count}" if count > 1 else f"{name}, all lengths"
            scopes[scope] = rows[labels == b]
    return {scope: (_sums(tau[rows], norms[rows]), rows) for scope, rows in scopes.items()}


def _sums(tau: Array, norms: Array) -> Sums:
    parts = np.stack([tau, norms], axis=1)
    total = parts.sum(axis=0)
    return Sums(value=total, without=total - parts)


def share_statistic(parts: Array) -> Array:
    """1 - sum tau / sum S_ii."""
    return np.asarray(1.0 - parts[..., 0] / parts[..., 1])


def share_estimate(prompts: list[Sums], *, margin: float, level: float) -> tuple[Estimate, str, float]:
    """Share with its verdict and the responses that would settle it, for these prompts."""
    estimate = of_these_prompts(prompts, share_statistic, level=level, method=METHOD)
    if any(len(p.without) < SMALLEST for p in prompts):
        estimate = Estimate(
            value=estimate.value,
            low=math.nan,
            high=math.nan,
            level=level,
            method=f"{METHOD}; no interval below {SMALLEST} responses",
            n=estimate.n,
            clusters=estimate.clusters,
            seed=None,
        )
    where = (estimate.value, estimate.low, estimate.high, -margin, margin)
    return estimate, VERDICTS[decide_from_margin(*where)], n_to_decide(estimate.n, *where)


def probe_part(sums: Sums, errors: Array | None) -> float:
    """Part of the share's squared error that the random signs make; NaN where the errors are not known."""
    if errors is None or not np.isfinite(errors).all() or len(errors) < 2:
        return math.nan
    share = share_statistic(sums.without)
    n = len(share)
    whole = (n - 1) / n * float(((share - share.mean()) ** 2).sum())
    probes = float((errors**2).sum()) / float(sums.value[1]) ** 2
    return min(probes / whole, 1.0) if whole > 0 else math.nan
