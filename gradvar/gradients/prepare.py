"""From a request to a model held ready, with a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gradvar.gradients.checkpointing import checkpointed, choose_checkpointing
from gradvar.gradients.cost import cost_of, sketch_bytes
from gradvar.gradients.devices import input_device
from gradvar.gradients.fit import choose_plan, usable
from gradvar.gradients.job import Job, TokenColumns
from gradvar.gradients.logprobs import Head
from gradvar.gradients.packing import long_rows_hold, packs, refuse_long_rows
from gradvar.gradients.plan import DEFAULT_TOKEN_BUDGET, Plan
from gradvar.gradients.positions import must_go_alone, row_limit
from gradvar.gradients.request import (
    check_causal,
    check_padding,
    check_request,
    check_sharing,
    undisturbed,
    whole_numbers,
)
from gradvar.gradients.resident import Resident, blocks_apart, settled_bytes
from gradvar.gradients.reweighted import check_counts, reweightings
from gradvar.gradients.sketch import SketchPlan
from gradvar.gradients.specs import resolve_targets
from gradvar.gradients.states import Autocast, frozen, full_precision
from gradvar.gradients.targets import Target

_PROBE_TOKENS = 8


@contextmanager
def prepared(model: nn.Module, *request: Any, **options: Any) -> Iterator[Job]:
    """Hold the model ready for `run_pass` as the request's plan asks; arguments as in `planned`."""
    with planned(model, *request, **options) as job:
        if long_rows_hold(job):
            # holes may take half as much again as what is alive
            tight = job.device.type == "cpu" and 3 * job.plan.spare_bytes < job.plan.memory_budget
            with checkpointed(model, job.plan.checkpointing), blocks_apart(tight):
                yield job
            return
    if options.get("packing"):
        raise refuse_long_rows(model)
    with prepared(model, *request, **{**options, "packing": False}) as job:
        yield job


@contextmanager
def planned(
    model: nn.Module,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    targets: str | Sequence[str],
    *,
    loss_masks: Sequence[Sequence[int] | None] | None = None,
    temperature: float = 1.0,
    include_bias: bool = True,
    token_budget: int | None = None,
    memory_budget: int | None = None,
    host_memory_budget: int | None = None,
    rollout_ids: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
    probes: int = 0,
    seed: int | None = None,
    prefixes: int = 0,
    padding_side: str = "right",
    packing: bool | None = None,
    checkpointing: str | None = None,
    sketch: SketchPlan | None = None,
) -> Iterator[Job]:
    """Check a request, hold the model ready and plan the work; arguments as in `measure_scores`.

    Inside, the model is in eval mode with its parameters frozen, gradients are on, float32 products are float32
    products and autocast is as the caller set it; all is as before on leaving.
    """
    check_counts(probes, prefixes, seed)
    ids = tuple(range(len(responses))) if rollout_ids is None else tuple(rollout_ids)
    prompt_ids = whole_numbers(prompt_ids, "the prompt")
    responses = [whole_numbers(response, f"response {i}") for i, response in enumerate(responses)]
    masks = check_request(model, prompt_ids, responses, loss_masks, temperature, ids)
    chosen = resolve_targets(model, targets)
    if must_go_alone(model, len(prompt_ids) + max(map(len, responses)) - 1):
        token_budget = min(1, token_budget or 1)
    kind = choose_checkpointing(model, checkpointing)
    with torch.inference_mode(False), torch.enable_grad(), frozen(model), full_precision():
        few = _different(prompt_ids, model)
        head = Head(model, few)
        tied, tied_scale = check_sharing(model, chosen, head, include_bias)
        probe = list(prompt_ids)[-_PROBE_TOKENS:]
        seen = undisturbed(head.base, few, head.probe_states, padding_side)
        if seen is None:
            check_causal(head.base, probe)
            if not check_padding(head.base, probe, padding_side):
                token_budget = min(1, token_budget or 1)
        n, device = len(responses), input_device(model)
        usual = token_budget or DEFAULT_TOKEN_BUDGET.get(device.type, DEFAULT_TOKEN_BUDGET["cpu"])
        widest = min(usual, row_limit(model) or usual)
        job = Job(
            model=model,
            targets=chosen,
            prompt=list(prompt_ids),
            responses=[list(response) for response in responses],
            masks=masks,
            ids=ids,
            temperature=temperature,
            head=head,
            autocast=Autocast.current(device),
            device=device,
            padding_side=padding_side,
            packed=packs(
                model, head.base, probe, packing,
                longest=min(
                    widest,
                    sum(len(prompt_ids) + len(response) - 1 for response in responses),
                ),
            ),
            probe=seen,
            dtype=_dtype(model, chosen),
            tied=tied,
            tied_scale=tied_scale,
            tokens=TokenColumns(logprobs=[None] * n, entropy=[None] * n, collision=[None] * n),
            extra=reweightings(
                prompt_ids, responses, masks, ids, include_bias=include_bias, probes=probes, seed=seed or 0,
                prefixes=prefixes,
            ),
            report=on_progress or (lambda done: None),
            plan=Plan(
                token_budget=1, memory_budget=0, tile_bytes=0, chunk_bytes=0, work_bytes=0, spare_bytes=0,
                trunk_bytes=0, passes=(),
            ),
        )  # fmt: skip
        if job.packed and widest < usual:
            token_budget = widest
        before = settled_bytes() if device.type == "cpu" else None
        job.plan = choose_plan(
            job,
            token_budget=token_budget,
            memory_budget=memory_budget,
            host_memory_budget=host_memory_budget,
            checkpointing=kind,
            may_checkpoint=checkpointing is None,
            sketch=sketch,
        )
        if device.type == "cpu":
            job.resident = Resident(before, usable(job.plan.memory_budget, device) + job.plan.host_memory_budget)
        yield job


def _dtype(model: nn.Module, targets: Sequence[Target]) -> torch.dtype:
    """Return the model's dtype; float64 where a target's weights are, whatever is beside them."""
    modules = [model, *(model.get_submodule(target.module) for target in targets)]
    first = [next(p.dtype for p in module.parameters() if p.is_floating_point()) for module in modules]
    return torch.float64 if torch.float64 in first else first[0]


def _different(prompt: Sequence[int], model: nn.Module) -> list[int]:
    """Return a few token ids, none twice, 0 not last: what is done to the logits may depend on the tokens."""
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    found = dict.fromkeys([*reversed(prompt), *range(min(_PROBE_TOKENS, vocabulary))])
    return sorted(list(found)[:_PROBE_TOKENS], key=bool)  # padding, if it is among them, first


def plan_measurement(
    model: nn.Module,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    targets: str | Sequence[str],
    *,
    loss_masks: Sequence[Sequence[int] | None] | None = None,
    token_budget: int | None = None,
    memory_budget: int | None = None,
    host_memory_budget: int | None = None,
    rollout_ids: Sequence[int] | None = None,
    probes: int = 0,
    prefixes: int = 0,
    padding_side: str = "right",
    packing: bool | None = None,
    checkpointing: str | None = None,
    sketch: SketchPlan | None = None,
) -> Plan:
    """Return how `measure_scores` would split this work, with what it would take in `Plan.cost`.

    Nothing is measured: only probes of a few tokens are run. Arguments as in `measure_scores`; of the responses only
    the lengths matter.

    Raises:
        GradvarError: The request does not fit the model or the budget, as in `measure_scores`.
    """
    with planned(
        model,
        prompt_ids,
        responses,
        targets,
        loss_masks=loss_masks,
        token_budget=token_budget,
        memory_budget=memory_budget,
        host_memory_budget=host_memory_budget,
        rollout_ids=rollout_ids,
        probes=probes,
        seed=0,
        prefixes=prefixes,
        padding_side=padding_side,
        packing=packing,
        checkpointing=checkpointing,
        sketch=sketch,
    ) as job:
        return replace(job.plan, cost=cost_of(job, job.plan, job.extra.count, sketch_bytes(job, sketch)))
