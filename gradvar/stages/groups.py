"""What a run gives to the estimators: every measured prompt, for every target and their sum."""

from __future__ import annotations

from collections.abc import Sequence

from gradvar.errors import GradvarError
from gradvar.estimators import find_rule
from gradvar.estimators.inputs import has_gradient
from gradvar.runs import SUM, EstimateConfig, PromptScores, Run, target_label
from gradvar.runs.records import counted
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
    if listener is not None:
        for told in _without_gradient(groups):
            listener.warn(told)
    if listener is not None and (line := left_out_line(run)) is not None:
        listener.warn(line)
    if listener is not None and all(len(group.verified().lengths) == 0 for group in groups):
        listener.warn(
            "no response has a verified reward, so there are results of the score (A = 1) alone: "
            f"run `gradvar reward {run.path}`"
        )
    if waiting and listener is not None:
        listener.warn(
            f"{counted(len(waiting), 'prompt')} with rollouts missing or not measured (first: {waiting[0]}), not in "
            f"these estimates: run `gradvar sample {run.path}`, `reward` and `measure`"
        )
    return groups


def _without_gradient(groups: Sequence[PromptScores]) -> list[str]:
    """Return one line for each target that does not act on the log-probabilities of some prompts."""
    found: dict[str, list[str]] = {}
    for group in groups:
        if not has_gradient(group):
            found.setdefault(group.target, []).append(group.prompt_id)
    prompts = len({group.prompt_id for group in groups})
    return [
        f"{target_label(target)} has no gradient at {len(names)} of {counted(prompts, 'prompt')} (first: {names[0]}): "
        "every score there is 0, as these parameters do not act on the log-probabilities; the other numbers stand"
        for target, names in found.items()
    ]


def left_out_line(run: Run) -> str | None:
    """Return one line that counts the responses that are in no estimate, None where there are none."""
    found = run.left_out()
    if not found:
        return None
    prompt_id, reasons = next(iter(found.items()))
    rollout_id, why = next(iter(reasons.items()))
    return (
        "left out, by --leave-out-non-finite, and in no number: "
        f"{counted(sum(map(len, found.values())), 'response')} of {counted(len(found), 'prompt')} "
        f"(first: prompt {prompt_id}, response {rollout_id}: {why}); if length or reward decides "
        "who is left out, the estimates are biased"
    )


def check_group_size(groups: Sequence[PromptScores], config: EstimateConfig) -> None:
    """Refuse a group larger than the rollouts of every prompt; one that is too small for it is told in the tables.

    Raises:
        GradvarError: It is.
    """
    most = max(groups, key=lambda group: len(group.lengths))
    if config.group_size > len(most.lengths):
        raise GradvarError(
            f"--group-size: expected at most the {len(most.lengths)} rollouts of prompt {most.prompt_id!r}, which has "
            f"the most, received {config.group_size}"
        )


def check_rule(name: str, alpha: float | None) -> None:
    """Refuse an alpha that the one rule studied would not look at.

    Raises:
        GradvarError: It takes none, or there is no such rule.
    """
    rule = find_rule(name)
    if alpha is not None and not rule.takes_alpha:
        raise GradvarError(
            f"--alpha: {rule.name} takes no alpha, received {alpha:g}: leave it out, or add --rule vl_norm"
        )


def check_buffer(groups: Sequence[PromptScores], config: EstimateConfig) -> None:
    """Refuse a soft overlong punishment that begins before the first token.

    Raises:
        GradvarError: It does.
    """
    limit = min(group.max_length if group.max_length > 0 else int(group.lengths.max()) for group in groups)
    if config.overlong_buffer is not None and config.overlong_buffer > limit:
        raise GradvarError(
            f"--overlong-buffer: expected at most the {limit} tokens that a response may have, received "
            f"{config.overlong_buffer}"
        )
