"""What a run gives to the estimators: every measured prompt, for every target and their sum."""

from __future__ import annotations

from collections.abc import Sequence

from gradvar.errors import GradvarError
from gradvar.runs import SUM, EstimateConfig, PromptScores, Run
from gradvar.stages.listener import Listener


def estimated_groups(run: Run, listener: Listener | None = None) -> list[PromptScores]:
    """Return every measured prompt for every target, and for their sum where there are several.

    What the run holds beyond what was measured is told: it is not in the estimates.
    """
    names = [*run.targets, SUM] if len(run.targets) > 1 else run.targets or [SUM]
    groups = [group for name in names for group in run.scores(name)]
    measured = {group.prompt_id: len(group.lengths) for group in groups}
    waiting = [
        name
        for name in run.prompt_ids
        if not run.file("rollouts", name).exists() or len(run.rollouts(name)) > measured.get(name, 0)
    ]
    if waiting and listener is not None:
        listener.warn(
            f"{len(waiting)} prompts (first: {waiting[0]}) have rollouts that are missing or not measured and are not "
            f"in these estimates: run `gradvar sample {run.path}`, `reward` and `measure`"
        )
    return groups


def check_group_size(groups: Sequence[PromptScores], config: EstimateConfig) -> None:
    """Refuse a group larger than the rollouts of a prompt.

    Raises:
        GradvarError: It is.
    """
    fewest = min(groups, key=lambda group: len(group.lengths))
    if config.group_size > len(fewest.lengths):
        raise GradvarError(
            f"--group-size: expected at most the {len(fewest.lengths)} rollouts of prompt {fewest.prompt_id!r}, "
            f"received {config.group_size}"
        )
