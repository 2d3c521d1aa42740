"""What a run holds, read once, for the figures and the report."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gradvar.runs import SUM, EstimateConfig, Prompt, PromptScores, Rollout, Run

COMMANDS = {
    "law": "fit",
    "identity": "fit",
    "cv": "cv",
    "alpha": "alpha",
    "forms": "alpha",
    "planning": "alpha",
    "audit": "audit",
    "proxies": "fit",
    "check": "check",
    "batches": "cv",
    "token_covariance": "audit",
    "prefixes": "audit",
}
"""Table to the command that makes it."""
NEEDED = {
    "batches": "measure RUN --cross sketch",
    "token_covariance": "measure RUN --probes 4",
    "prefixes": "measure RUN --prefixes 8",
}
"""Table to what has to be measured for it beforehand."""
SHOWN_PROMPTS = 3
"""Prompts that get a figure of their own."""


class Held:
    """A run's tables, scores and responses, each read once.

    Raises:
        GradvarError: Nothing was measured yet.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._tables: dict[str, pd.DataFrame | None] = {}
        self._scores: dict[str, list[PromptScores]] = {}
        self.targets = [*run.targets, SUM] if len(run.targets) > 1 else run.targets or [SUM]
        self.last = self.targets[-1]
        """The sum of all targets, or the only one."""
        self.prompt_ids = [group.prompt_id for group in self.scores(self.last)]
        """Prompts that were measured."""
        self.shown = self.prompt_ids[:SHOWN_PROMPTS]

    def options(self, table: str) -> EstimateConfig:
        """Return the options that a table was made with; of a table that the run lacks, the defaults."""
        return self.run.options(COMMANDS.get(table, table))

    def table(self, name: str) -> pd.DataFrame | None:
        """Return one estimate table, None where the run has none."""
        if name not in self._tables:
            there = (self.run.path / "tables" / f"{name}.parquet").exists()
            self._tables[name] = self.run.table(name) if there else None
        return self._tables[name]

    def why_not(self, *names: str) -> str | None:
        """Return what is missing of these tables and what makes it; None where nothing is."""
        missing = [name for name in names if self.table(name) is None]
        if not missing:
            return None
        commands = [f"{COMMANDS[name]} RUN" for name in missing]
        before = [NEEDED[name] for name in missing if name in NEEDED]
        words = [f"`gradvar {one.replace('RUN', str(self.run.path))}`" for one in dict.fromkeys([*before, *commands])]
        what = " and ".join(f"`{name}`" for name in missing)
        return f"the run holds no table {what}: {', then '.join(words)} {'makes' if len(words) == 1 else 'make'} it"

    def scores(self, target: str) -> list[PromptScores]:
        """Return what the estimators need of every measured prompt."""
        if target not in self._scores:
            self._scores[target] = self.run.scores(target)
        return self._scores[target]

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Every prompt of the run."""
        return self.run.prompts()

    @cached_property
    def rollouts(self) -> dict[str, list[Rollout]]:
        """Every prompt's rollouts, those not measured too."""
        return {
            name: self.run.rollouts(name) for name in self.run.prompt_ids if self.run.file("rollouts", name).exists()
        }

    @cached_property
    def rewards(self) -> dict[str, NDArray[np.float64]]:
        """Every prompt's rewards in the rollouts' order, NaN where unverified or not scored."""
        found = {}
        for name, rollouts in self.rollouts.items():
            known = self.run.rewards(name) if self.run.file("rewards", name).exists() else np.array([])
            known = known[: len(rollouts)]
            found[name] = np.concatenate([known, np.full(len(rollouts) - len(known), np.nan)])
        return found

    @cached_property
    def log_probs(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Log-probabilities of all loss tokens under sampler and policy, (T,) each, in nats; empty without either."""
        sampler: list[NDArray[np.float64]] = []
        policy: list[NDArray[np.float64]] = []
        for name in self.prompt_ids:
            if not self.run.file("measures", name).exists():
                continue
            measures, rollouts = self.run.measures(name), {r.rollout_id: r for r in self.rollouts[name]}
            for rollout_id, values in zip(measures.rollout_ids, measures.policy_logprobs, strict=True):
                rollout = rollouts.get(rollout_id)
                if rollout is None or rollout.sampler_logprobs is None:
                    continue
                counts = np.ones(len(values), bool) if rollout.loss_mask is None else np.array(rollout.loss_mask, bool)
                sampler.append(np.array(rollout.sampler_logprobs, dtype=np.float64)[counts])
                policy.append(values.astype(np.float64)[counts])
        return (np.concatenate(sampler), np.concatenate(policy)) if sampler else (np.array([]), np.array([]))
