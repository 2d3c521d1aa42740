"""A population of prompts: each with its own mean gradient, lengths and success rate; and products between prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.estimators.cross_products import ExactProducts, SketchProducts
from gradvar.runs.records import PromptScores

Array = NDArray[np.float64]


@dataclass(kw_only=True)
class Population:
    """g_i = A-independent score: s = noise sqrt(L) + (r - p_q) (common + own_q); lengths and p differ by prompt."""

    rng: np.random.Generator
    dimensions: int = 24
    signal: float = 1.2
    between: float = 0.8
    noise: float = 0.25
    common: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        direction = self.rng.normal(size=self.dimensions)
        self.common = self.signal * direction / np.linalg.norm(direction)

    def draw(self, prompts: int, responses: int) -> tuple[list[PromptScores], list[Array]]:
        """Return PromptScores p0, p1, ... and their gradients (N, d)."""
        found = [self._prompt(responses, self.rng) for _ in range(prompts)]
        scores = [prompt_scores(f"p{k}", s, r, lengths) for k, (s, r, lengths) in enumerate(found)]
        return scores, [s for s, _, _ in found]

    def truth(self, *, group_size: int, batches: int, rng: np.random.Generator) -> Array:
        """(power, given, signal) of one grpo group with advantages r - mean, two independent groups a prompt."""
        power, given, total = 0.0, 0.0, np.zeros(self.dimensions)
        for _ in range(batches):
            s, r, lengths = self._prompt(2 * group_size, rng)
            halves = []
            for rows in (slice(0, group_size), slice(group_size, None)):
                factor = (r[rows] - r[rows].mean()) / (group_size * lengths[rows])
                halves.append(factor @ s[rows])
            power += 0.5 * (halves[0] @ halves[0] + halves[1] @ halves[1])
            given += halves[0] @ halves[1]
            total += 0.5 * (halves[0] + halves[1])
        power, given, mean = power / batches, given / batches, total / batches
        # the mean's own noise, per prompt E||mean of two||^2, is taken out of its square
        one = 0.5 * (power + given)
        return np.array([power, given, (batches * (mean @ mean) - one) / (batches - 1)])

    def _prompt(self, responses: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        own = rng.normal(size=self.dimensions) * self.between / np.sqrt(self.dimensions)
        p = rng.uniform(0.25, 0.75)
        typical = rng.uniform(3.0, 12.0)
        lengths = np.clip(np.round(typical * np.exp(rng.normal(0.0, 0.5, responses))), 1, 40)
        rewards = (rng.random(responses) < p).astype(float)
        s = self.noise * rng.normal(size=(responses, self.dimensions)) * np.sqrt(lengths)[:, None]
        return s + (rewards - p)[:, None] * lengths[:, None] * (self.common + own), rewards, lengths


def prompt_scores(name: str, gradients: Array, rewards: Any, lengths: Any, target: str = "layer") -> PromptScores:
    """PromptScores of given gradients."""
    return PromptScores(
        prompt_id=name,
        target=target,
        gram=gradients @ gradients.T,
        rewards=np.asarray(rewards, dtype=float),
        lengths=np.asarray(lengths, dtype=float),
        truncated=np.zeros(len(lengths), dtype=bool),
        max_length=40,
    )


def exact_products(prompts: Sequence[PromptScores], gradients: Sequence[Array]) -> ExactProducts:
    """Exact products of all responses."""
    flat = np.concatenate(gradients)
    ends = np.cumsum([0, *(len(g) for g in gradients)])
    rows = {p.prompt_id: np.arange(a, b) for p, a, b in zip(prompts, ends[:-1], ends[1:], strict=True)}
    return ExactProducts(matrix=flat @ flat.T, rows=rows)


def signed_sketch(
    prompts: Sequence[PromptScores], gradients: Sequence[Array], *, seed: int, width: int = 64, parts: int = 8
) -> SketchProducts:
    """A dense random-sign projection, `parts` independent ones of `width`."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(parts, width, gradients[0].shape[1])).reshape(parts * width, -1)
    signs /= np.sqrt(parts * width)
    sketches = {p.prompt_id: (g @ signs.T).astype(np.float32) for p, g in zip(prompts, gradients, strict=True)}
    return SketchProducts(sketches=sketches, parts=parts)
