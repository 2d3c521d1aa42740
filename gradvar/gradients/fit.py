"""A plan whose estimated peak, activations too, stays within a memory budget: smaller batches, then checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gradvar.errors import GradvarError
from gradvar.gradients.checkpointing import choose_checkpointing
from gradvar.gradients.cost import plan_measurement
from gradvar.gradients.plan import Plan


def fit_measurement(
    model: nn.Module,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    targets: str | Sequence[str],
    *,
    token_budget: int | None = None,
    memory_budget: int | None = None,
    checkpointing: str | None = None,
    **options: Any,
) -> Plan:
    """Return a plan with `plan.cost.peak_bytes` within the memory budget, by estimates; only short probes are run.

    Batches take at most half of the budget, gradients and tiles the rest. `measure_scores` works by the plan when given
    its `token_budget`, `memory_budget` (what is left for gradients and tiles) and `checkpointing`.

    Args:
        model: As in `measure_scores`, and so are the arguments not named here.
        prompt_ids: Token ids of the prompt.
        responses: The responses; only their lengths matter.
        targets: What `resolve_targets` understands.
        token_budget: Padded tokens of a batch, at most; None chooses.
        memory_budget: Bytes for everything beside the model; None takes most of what is free.
        checkpointing: As in `measure_scores`; None switches it on where nothing else would do.
        **options: As in `plan_measurement`.

    Raises:
        GradvarError: The request does not fit the model, or the longest response alone does not fit the budget.
    """
    kind = choose_checkpointing(model, checkpointing)
    kinds = (kind, "non_reentrant") if checkpointing is None and kind == "off" else (kind,)
    least: list[int] = []
    for each in kinds:
        tokens, total = token_budget, memory_budget
        while True:
            shape = {**options, "token_budget": tokens, "checkpointing": each}
            plan = plan_measurement(model, prompt_ids, responses, targets, memory_budget=total, **shape)
            total = plan.memory_budget if total is None else total
            if plan.cost is None:
                raise TypeError("a plan without its cost")
            work = plan.cost.activation_bytes + plan.cost.logits_bytes
            if 2 * work <= total:
                return plan_measurement(model, prompt_ids, responses, targets, memory_budget=total - work, **shape)
            if plan.cost.batches == len(responses):  # each alone already
                least.append(2 * work)
                break
            tokens = max(1, min(plan.token_budget - 1, int(plan.token_budget * total / (2 * work))))
    raise GradvarError(
        f"memory budget of {total} bytes is too small for the longest response alone: expected at least {min(least)} "
        "bytes"
    )
