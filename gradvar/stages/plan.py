"""What `measure` would do, and take: told before anything is done, from short probes of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradvar.errors import GradvarError
from gradvar.gradients import Cost, Plan, plan_measurement
from gradvar.runs import Run
from gradvar.stages.listener import Listener, Silent
from gradvar.stages.measure import Work, find_work

_UNPLANNED = ("temperature", "include_bias", "seed")
"""What no plan depends on."""


@dataclass(frozen=True, kw_only=True)
class PlannedPrompt:
    """One prompt that is to be measured."""

    work: Work
    plan: Plan
    cost: Cost
    """What the plan takes, estimated."""


@dataclass(frozen=True, kw_only=True)
class MeasurementPlan:
    """What measuring with these settings would do in a run."""

    dtype: str
    device: str
    targets: list[str]
    """Keys of the targets asked for."""
    probes: int
    prefixes: int
    prompts: list[PlannedPrompt]
    """Those of which something is missing."""
    complete: int
    """Prompts of which nothing is missing."""

    @property
    def peak_bytes(self) -> int:
        """The most that is held at one time beside the model."""
        return max((one.cost.peak_bytes for one in self.prompts), default=0)

    @property
    def host_bytes(self) -> int:
        """The most that is held at one time in the host's memory for a device that has no room."""
        return max((one.cost.host_bytes for one in self.prompts), default=0)

    @property
    def flop(self) -> int:
        """Multiplications and additions of all prompts."""
        return sum(one.cost.flop for one in self.prompts)


def plan_measure(run: Run, given: Mapping[str, Any], listener: Listener | None = None) -> MeasurementPlan:
    """Return how `measure` would split the work that is missing; writes nothing.

    Args:
        run: A run with rollouts.
        given: Settings of `MeasureConfig` given now.
        listener: Who is told.

    Raises:
        GradvarError: As in `measure`, for everything that can be known before the work.
    """
    listener = listener or Silent()
    ready = find_work(run, given)
    missing = [work for work in ready.work if work.targets]
    planned = []
    with listener.task("plan", len(missing)) as advance:
        for work in missing:
            options = work.options(ready.config, ready.made.temperature)
            asked = {key: value for key, value in options.items() if key not in _UNPLANNED}
            responses = [list(rollout.token_ids) for rollout in work.kept]
            try:
                plan = plan_measurement(ready.model, list(work.prompt.token_ids), responses, work.targets, **asked)
            except GradvarError as error:
                raise GradvarError(f"prompt {work.prompt.prompt_id!r}: {error}") from error
            if plan.cost is None:
                raise TypeError("a plan without its cost")
            planned.append(PlannedPrompt(work=work, plan=plan, cost=plan.cost))
            advance(1)
    return MeasurementPlan(
        dtype=ready.made.dtype,
        device=ready.made.device,
        targets=ready.targets,
        probes=ready.config.probes,
        prefixes=ready.config.prefixes,
        prompts=planned,
        complete=len(ready.work) - len(missing),
    )
