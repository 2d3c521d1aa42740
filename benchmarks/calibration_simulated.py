"""What is drawn, and what one draw finds: simulated prompts, and an interval beside its truth.

Shape letters: K prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.calibration_truths import LAW, LONGEST, NATS, SCATTER
from gradvar.runs.records import Estimate, PromptScores
from tests.estimators import simulator

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One interval of one draw."""

    quantity: str
    estimand: str
    truth: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulated:
    """One prompt."""

    scores: PromptScores
    taus: Array
    entropies: Array
    """(N,) W, or anything that grows with the length."""

    @property
    def log_probs(self) -> Array:
        """(N,) sums over tokens, -`NATS` a token on average: grad H is `NATS` grad E[L]."""
        return -NATS * self.entropies


def simulate(laws: list[dict[str, Any]], n: int, rng: np.random.Generator) -> list[Simulated]:
    """K prompts, one a law."""
    made = []
    for k, law in enumerate(laws):
        s, rewards, lengths = simulator.draw(n, rng=rng, **{x: v for x, v in law.items() if x in LAW | {"shift"}})
        taus = simulator.draw_taus(s, rewards, lengths, share=law.get("share", 0.0), rng=rng)
        scores = PromptScores(
            prompt_id=f"p{k}",
            target="layer",
            gram=s @ s.T,
            rewards=rewards,
            lengths=lengths,
            truncated=np.zeros(n, dtype=bool),
            max_length=int(LONGEST),
        )
        entropies = lengths * rng.gamma(1.0 / SCATTER, SCATTER, n)
        made.append(Simulated(scores=scores, taus=taus, entropies=entropies))
    return made


def bare(law: dict[str, Any]) -> dict[str, Any]:
    """What of a law the simulator's prompts are drawn by."""
    return {name: value for name, value in law.items() if name in LAW}


def found_of(name: str, estimand: str, truth: float, e: Estimate) -> Found:
    """One interval beside its truth."""
    return Found(
        quantity=name, estimand=estimand, truth=float(truth), value=float(e.value), low=float(e.low), high=float(e.high)
    )
