"""Scores with other weights on their tokens, from the graph of the same forward pass: random signs and prefixes.

    s_i(w) = grad sum_t w_t m_it log pi(o_it | q, o_i,<t),  m the loss mask
    independent signs w_t = +1 or -1:    E||s_i(w)||^2 = sum_t m_it ||grad log pi_t||^2 = tau_i
    w_t = 1 up to the l-th loss token:   s_i(w) = s_i^(1..l), the score of a prefix

Each reweighting costs one more truncated backward pass. Only the squared norms are kept.

Shape letters: N responses, L response tokens, K reweightings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradvar.errors import GradvarError
from gradvar.runs.measures import PrefixNorms, TauEstimate


@dataclass(kw_only=True, eq=False)
class Reweightings:
    """K weights a token for each response, and the squared norms of the scores they make."""

    weights: list[NDArray[np.float64]]
    """Per response, (K, L): they multiply the loss mask."""
    include_bias: bool
    norms: dict[str, Tensor] = field(default_factory=dict)
    """By target key, (K, N) squared norms in float64 of the passes done so far."""

    @property
    def count(self) -> int:
        """How many reweightings of each response there are."""
        return len(self.weights[0]) if self.weights else 0

    def empty(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return zeros to add a pass's squared norms to."""
        shape = (self.count, len(self.weights))
        return {key: torch.zeros(shape, dtype=torch.float64) for key in keys} if self.count else {}

    def add(self, norms: dict[str, Tensor]) -> None:
        """Add the squared norms over a pass's rows."""
        for key, values in norms.items():
            self.norms[key] = self.norms[key] + values if key in self.norms else values

    def column(self, index: int, members: Sequence[int], like: Tensor) -> Tensor:
        """Return weights number `index` of the members' tokens, one after another, as `like` has dtype and device."""
        values = np.concatenate([self.weights[i][index] for i in members])
        return torch.from_numpy(values).to(like.device, like.dtype)


def check_counts(probes: int, prefixes: int, seed: int | None) -> None:
    """Refuse counts or a seed that mean nothing.

    Raises:
        GradvarError: A negative count or seed, or probes without a seed.
    """
    for name, count in (("probes", probes), ("prefixes", prefixes)):
        if count < 0:
            raise GradvarError(f"{name}: expected 0 or more, received {count}")
    if probes and seed is None:
        raise GradvarError("probes are random signs: expected a seed, received none")
    if seed is not None and seed < 0:
        raise GradvarError(f"seed: expected 0 or more, received {seed}")


def reweightings(
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]],
    ids: Sequence[int],
    *,
    include_bias: bool,
    probes: int,
    seed: int,
    prefixes: int,
) -> Reweightings:
    """Return what is measured beside the responses' own scores: the probes, then the prefixes but for the last."""
    weights = []
    for name, response, mask in zip(ids, responses, masks, strict=True):
        signs = random_signs(seed, prompt, name, len(response), probes)
        weights.append(np.concatenate([signs, prefix_weights(mask, prefixes)]))
    return Reweightings(weights=weights, include_bias=include_bias)


def random_signs(seed: int, prompt: Sequence[int], rollout_id: int, length: int, probes: int) -> NDArray[np.float64]:
    """Return (probes, length) signs, +1 or -1, of one response.

    They depend on the seed, the prompt's tokens and the rollout's id alone, never on the other responses. The first
    probes of a larger count are those of a smaller one.
    """
    entropy = [seed, abs(rollout_id), int(rollout_id < 0), *prompt]
    bits = np.random.default_rng(np.random.SeedSequence(entropy)).random((probes, length)) < 0.5
    return np.where(bits, 1.0, -1.0)


def tau_estimate(target: str, norms: NDArray[np.float64], seed: int) -> TauEstimate:
    """Return the mean over the probes of (K, N) squared norms, with its standard error."""
    probes = len(norms)
    with np.errstate(invalid="ignore"):
        spread = norms.std(axis=0, ddof=1) if probes > 1 else np.full(norms.shape[1], np.nan)
    return TauEstimate(
        target=target, value=norms.mean(axis=0), error=spread / np.sqrt(probes), probes=probes, seed=seed
    )


def prefix_lengths(loss_tokens: int, prefixes: int) -> NDArray[np.int64]:
    """Return (k,) prefix lengths ceil(j n / k), j = 1 to k, of n loss tokens: equal ones where n < k."""
    steps = np.arange(1, prefixes + 1, dtype=np.int64)
    return -(-steps * loss_tokens // prefixes)


def prefix_weights(mask: Sequence[int], prefixes: int) -> NDArray[np.float64]:
    """Return (k - 1, L) weights, 1 up to each prefix's last loss token, for all but the whole response."""
    ranks = np.cumsum(mask)
    return (ranks <= prefix_lengths(int(ranks[-1]), prefixes)[:-1, None]).astype(np.float64)


def prefix_norms(
    target: str, norms: NDArray[np.float64], diagonal: NDArray[np.float64], masks: Sequence[Sequence[int]]
) -> PrefixNorms:
    """Return the (k - 1, N) squared norms of the prefixes beside the Gram's (N,) diagonal."""
    lengths = np.stack([prefix_lengths(sum(mask), len(norms) + 1) for mask in masks])
    return PrefixNorms(target=target, lengths=lengths, value=np.column_stack([*norms, diagonal]))
