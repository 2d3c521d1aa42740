"""Draws gradients with a known mean, law, rank and reward structure."""

from __future__ import annotations

import numpy as np

from gradvar.runs.records import PromptScores

TYPICAL_LENGTH = 150.0


def draw(n, *, rng, beta=1.0, dimensions=20, decay=0.8, signal=0.0, shift=0.0, p=0.4, spread=0.6):
    """Scores s (n, d) with Var(s | L) = (L/150)^beta C, tr C = 1, binary rewards and lognormal lengths.

    E[s | L, r] = signal (r - p) along the last axis, which has the least noise, plus `shift` along the first.
    """
    lengths = np.clip(np.round(TYPICAL_LENGTH * np.exp(rng.normal(0.0, spread, n))), 2, 3000)
    rewards = (rng.random(n) < p).astype(float)
    scale = decay ** np.arange(dimensions)
    scale /= np.sqrt((scale**2).sum())
    scores = rng.normal(size=(n, dimensions)) * scale * np.sqrt((lengths / TYPICAL_LENGTH) ** beta)[:, None]
    scores[:, -1] += signal * (rewards - p)
    scores[:, 0] += shift
    return scores, rewards, lengths


def prompt(name, n, *, rng, target="layer", max_length=3000, **law):
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


def true_moments(rule_weights, advantage, *, groups, group_size, rng, chunk=5000, **law):
    """(E||ghat||^2, ||E ghat||^2) by drawing groups, the second from two independent halves."""
    same, means, count = 0.0, [0.0, 0.0], 0
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
