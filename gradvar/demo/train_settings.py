"""How the bundled policy is trained: every setting, and which problems are kept out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gradvar.demo.countdown import CountdownProblem
from gradvar.demo.policy_model import PolicySize
from gradvar.demo.traces import TraceSettings, search_problems


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How the policy is trained and measured."""

    steps: int | None = None
    """Optimiser steps; None: until `minutes` are over."""
    minutes: float | None = None
    """Training time [minutes]; None: until `steps` are done."""
    seed: int = 0
    """Seed of problems, traces, initial weights and measured responses."""
    threads: int = 1
    """Threads of torch; more of them wait for one another on a busy machine."""
    bfloat16: bool = False
    """Compute matrix products in bfloat16 while training; the weights stay float32."""
    tokens_per_batch: int = 2000
    """Most tokens in a batch, padding included."""
    learning_rate: float = 3e-3
    """Highest learning rate of AdamW; it falls linearly to a fiftieth."""
    warmup_steps: int = 60
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    short_share: float = 0.4
    """Share of the training, at its beginning, that sees short traces of easier problems only."""
    held_out: int = 64
    """Problems kept out of training."""
    measured_prompts: int = 16
    """Held-out problems measured, from the first on."""
    measured_responses: int = 128
    """Responses sampled to each of them."""
    checkpoint_steps: int = 500
    """Steps between two savings of the weights."""
    size: PolicySize = field(default_factory=PolicySize)
    """The policy's sizes."""
    traces: TraceSettings = field(default_factory=TraceSettings)
    """The problems and the search."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"expected either steps or minutes, received steps={self.steps}, minutes={self.minutes}.")

    def progress(self, *, step: int, seconds: float) -> float:
        """Returns the share of the training that is done."""
        if self.steps is not None:
            return step / self.steps
        return seconds / (60 * (self.minutes or 1.0))

    def short_traces(self) -> TraceSettings:
        """Returns the search of the first part of the training: easier problems and one to six attempts."""
        return TraceSettings(
            number_range=self.traces.number_range,
            target_range=self.traces.target_range,
            chance_range=(self.traces.chance_range[1], 1.0),
            budget_median=4.0,
            budget_sigma=0.5,
            budget_limit=6,
        )


def split_problems(settings: TrainSettings) -> tuple[list[CountdownProblem], list[CountdownProblem]]:
    """Shuffles all problems of the settings and returns those held out and those to train on.

    The numbers within a held-out problem are shuffled as well.
    """
    rng = np.random.default_rng(np.random.SeedSequence((settings.seed, 0)))
    problems = search_problems(settings.traces)
    problems = [problems[i] for i in rng.permutation(len(problems))]
    held_out = [
        CountdownProblem(tuple(problem.nums[i] for i in rng.permutation(len(problem.nums))), problem.target)
        for problem in problems[: settings.held_out]
    ]
    return held_out, problems[settings.held_out :]
