"""What a run gives to the estimators: every measured prompt, for every target and their sum."""

from __future__ import annotations

from collections.abc import Sequence

from gradvar.errors import GradvarError
from gradvar.runs import SUM, EstimateConfig, PromptScores, Run
from gradvar.stages.listener import Listener


def estimated_groups(run: Run, listener: Listener | None = None) -> list[PromptScores]:
    """Return every measured prompt for every target, and for their sum where there are several.

    What the run holds beyond what was measured is told, and what was left out: it is not in the estimates.
    """
    names = [*run.targets, SUM] if len(run.targets) > 1 else run.targets or [SUM]
    groups = run.scores_of(names)
    measured = {group.prompt_id: len(run.measured_ids(group.prompt_id)) for group in groups}
    waiting = [
        name
        for name in run.prompt_ids
        if not run.file("rollouts", name).exists() or len(run.rollouts(name)) > measured.get(name, 0)
    ]
    if listener is not None and (line := left_out_line(run)) is not None:
        listener.warn(line)
    if listener is not None and all(len(group.verified().lengths) == 0 for group in groups):
        listener.warn(
            "no response has a verified reward, so there are results of the score (A = 1) alone: "
            f"run `gradvar reward {run.path}`"
        )
    if waiting and listener is not None:
        listener.warn(
            f"{len(waiting)} prompts (first: {waiting[0]}) have rollouts that are missing or not measured and are not "
            f"in these estimates: run `gradvar sample {run.path}`, `reward` and `measure`"
        )
    return groups


def left_out_line(run: Run) -> str | None:
    """Return one line that counts the responses that are in no estimate, None where there are none."""
    found = run.left_out()
    if not found:
        return None
    prompt_id, reasons = next(iter(found.items()))
    rollout_id, why = next(iter(reasons.items()))
    return (
        f"{sum(map(len, found.values()))} responses of {len(found)} prompts were left out, by --leave-out-non-finite, "
        f"and are in no number (first: prompt {prompt_id}, response {rollout_id}: {why}); if length or reward decides "
        "who is left out, the estimates are biased"
    )


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
