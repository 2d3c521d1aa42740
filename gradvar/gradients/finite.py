"""Measuring what is finite, where the user wants the rest left out: who is at fault is found out alone.

A response that overflows can spoil others in its batch, so nobody is left out for the company it was in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gradvar.errors import GradvarError
from gradvar.gradients.passes import NonFiniteError
from gradvar.gradients.scores import ScoreMeasurement, measure_scores


def measure_finite(
    model: nn.Module,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    targets: str | Sequence[str],
    *,
    rollout_ids: Sequence[int],
    loss_masks: Sequence[Sequence[int] | None] | None = None,
    **options: Any,
) -> tuple[ScoreMeasurement, dict[int, str]]:
    """Measure as `measure_scores` does; responses that are not finite, each alone, are left out.

    Costs nothing more where all are finite; else the failed attempt and one run of every response alone.

    Args:
        model: As in `measure_scores`, and so are the arguments not named here.
        prompt_ids: Token ids of the prompt.
        responses: N lists of token ids.
        targets: What `resolve_targets` understands.
        rollout_ids: Names of the responses.
        loss_masks: As in `measure_scores`.
        **options: As in `measure_scores`.

    Returns:
        The measurement of the others, and what was not finite, by rollout id.

    Raises:
        GradvarError: As `measure_scores`; fewer than 2 responses are finite; or all are alone and not together.
    """
    options["loss_masks"] = loss_masks
    try:
        return measure_scores(model, prompt_ids, responses, targets, rollout_ids=rollout_ids, **options), {}
    except NonFiniteError as error:
        first = error
    alone = {**options, "on_progress": None, "sketch": None}
    left_out: dict[int, str] = {}
    for row, name in enumerate(rollout_ids):
        alone["loss_masks"] = None if loss_masks is None else [loss_masks[row]]
        try:
            measure_scores(model, prompt_ids, [responses[row]], targets, rollout_ids=[name], **alone)
        except NonFiniteError as error:
            left_out[name] = f"{error.what} is not finite"
    kept = [row for row, name in enumerate(rollout_ids) if name not in left_out]
    if not left_out:
        raise first
    if len(kept) < 2:
        raise GradvarError(
            f"{len(left_out)} of {len(rollout_ids)} responses are not finite ({next(iter(left_out.values()))}): at "
            "least 2 must remain; measure in float32, or look at the model's weights"
        ) from first
    options["loss_masks"] = None if loss_masks is None else [loss_masks[row] for row in kept]
    measured = measure_scores(
        model,
        prompt_ids,
        [responses[row] for row in kept],
        targets,
        rollout_ids=[rollout_ids[row] for row in kept],
        **options,
    )
    return measured, left_out
