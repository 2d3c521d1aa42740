"""Draws gradients with a known mean, law, rank, token covariance and reward structure.

For z = (log L - log 150) / spread, a standard normal before lengths are rounded and cut:

    P(r = 1 | L) = p(L) = logistic(logit p + reward_slope z)
    E[s | L, r]  = signal (r - p(L)) on the last axis + drift z on the last but one + shift on the first
    Var(s | L)   = (L/150)^beta C,  tr C = 1, eigenvalues decay^(2k)
    E[tau | L, r] = (1 - share) E[||s||^2 | L, r]

So E s = shift (0 on policy), E[s | L] depends on L with drift, E[A s | L] with reward_slope too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.runs.records import PromptScores

Array = NDArray[np.float64]

TYPICAL_LENGTH = 150.0


def spectrum(dimensions: int, decay: float) -> Array:
    """Square roots (d,) of the eigenvalues of C."""
    scale = decay ** np.arange(dimensions)
    return np.asarray(scale / np.sqrt((scale**2).sum()))


def draw_lengths_and_rewards(
    n: int, *, rng: np.random.Generator, p: float = 0.4, spread: float = 0.6, reward_slope: float = 0.0
) -> tuple[Array, Array, Array, Array]:
    """Lengths, rewards, z and p(L), each (n,)."""
    lengths = np.clip(np.round(TYPICAL_LENGTH * np.exp(rng.normal(0.0, spread, n))), 2, 3000)
    z = np.log(lengths / TYPICAL_LENGTH) / spread if spread > 0 else np.zeros(n)
    chance = 1.0 / (1.0 + (1.0 / p - 1.0) * np.exp(-reward_slope * z))
    return lengths, (rng.random(n) < chance).astype(float), z, chance


def draw(
    n: int,
    *,
    rng: np.random.Generator,
    beta: float = 1.0,
    dimensions: int = 20,
    decay: float = 0.8,
    signal: float = 0.0,
    drift: float = 0.0,
    shift: float = 0.0,
    p: float = 0.4,
    spread: float = 0.6,
    reward_slope: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Scores s (n, d), rewards (n,) and lengths (n,) of one prompt's responses."""
    lengths, rewards, z, chance = draw_lengths_and_rewards(n, rng=rng, p=p, spread=spread, reward_slope=reward_slope)
    spreads = np.sqrt((lengths / TYPICAL_LENGTH) ** beta)
    scores = rng.normal(size=(n, dimensions)) * spectrum(dimensions, decay) * spreads[:, None]
    scores[:, -1] += signal * (rewards - chance)
    scores[:, -2] += drift * z
    scores[:, 0] += shift
    return scores, rewards, lengths


def draw_taus(scores: Array, rewards: Array, lengths: Array, *, share: float, rng: np.random.Generator) -> Array:
    """Sums of squared token gradients (n,) that leave `share` of ||s||^2 to products of different tokens.

    Half of tau follows the response's own ||s||^2, the rest is noise of mean 1, as with few random signs.
    """
    return np.asarray((1.0 - share) * (scores**2).sum(axis=1) * rng.gamma(8.0, 1.0 / 8.0, len(lengths)))


def prompt(
    name: str, n: int, *, rng: np.random.Generator, target: str = "layer", max_length: int = 3000, **law: Any
) -> PromptScores:
    """PromptScores of one drawn prompt."""
    scores, rewards, lengths = draw(n, rng=rng, **law)
    return PromptScores(
        prompt_id=name,
        target=target,
        gram=scores @ scores.T,
        rewards=rewards,
        lengths=lengths,
        truncated=lengths >= 500,
        max_length=max_length,
    )


def true_moments(
    rule_weights: Callable[[Array], Array],
    advantage: Callable[[Array], Array],
    *,
    groups: int,
    group_size: int,
    rng: np.random.Generator,
    chunk: int = 5000,
    **law: Any,
) -> tuple[float, float]:
    """(E||ghat||^2, ||E ghat||^2) by drawing groups, the second from two independent halves."""
    same, count = 0.0, 0
    means: list[Any] = [0.0, 0.0]
    for start in range(0, groups, chunk):
        scores, rewards, lengths = draw(chunk * group_size, rng=rng, **law)
        shape = (chunk, group_size)
        c = rule_weights(lengths.reshape(shape)) * advantage(rewards.reshape(shape))
        updates = np.einsum("gn,gnd->gd", c, scores.reshape(*shape, -1))
        same += float((updates**2).sum())
        means[(start // chunk) % 2] = means[(start // chunk) % 2] + updates.sum(axis=0)
        count += chunk
    half = count / 2
    return same / count, float(means[0] @ means[1]) / half**2


def moments_by_kind(
    coefficients: Callable[[Array, Array], list[Array]],
    *,
    groups: int,
    group_size: int,
    rng: np.random.Generator,
    chunk: int = 10_000,
    beta: float = 1.0,
    signal: float = 0.0,
    drift: float = 0.0,
    p: float = 0.4,
    spread: float = 0.6,
    reward_slope: float = 0.0,
    **unused: Any,
) -> tuple[Array, Array, Array]:
    """E ghat on (signal axis, drift axis) (R, 2), E||ghat||^2 and E sum c^2 ||s||^2 (R,) of R kinds of update.

    Given lengths and rewards the noise is known, so it is not drawn: E||ghat||^2 = E[sum c^2 v(L) + ||sum c mu||^2].
    Without shift. `coefficients` takes lengths and rewards (groups, n) and returns R arrays c = x A of that shape.
    """
    totals: Any = 0.0
    chunk = min(chunk, groups)
    for _ in range(groups // chunk):
        lengths, rewards, z, chance = draw_lengths_and_rewards(
            chunk * group_size, rng=rng, p=p, spread=spread, reward_slope=reward_slope
        )
        shape = (chunk, group_size)
        v = ((lengths / TYPICAL_LENGTH) ** beta).reshape(shape)
        axes = [(signal * (rewards - chance)).reshape(shape), (drift * z).reshape(shape)]
        found = []
        for c in coefficients(lengths.reshape(shape), rewards.reshape(shape)):
            along = [(c * axis).sum(axis=1) for axis in axes]
            noise = (c**2 * v).sum(axis=1)
            same = noise + sum(one**2 for one in along)
            norms = noise + (c**2 * sum(axis**2 for axis in axes)).sum(axis=1)
            found.append([float(x.mean()) for x in (*along, same, norms)])
        totals = totals + np.array(found)
    totals = totals / (groups // chunk)
    return totals[:, :2], totals[:, 2], totals[:, 3]
