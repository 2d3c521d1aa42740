"""A plan whose peak, activations too, stays within a memory budget: smaller batches, checkpointing, more passes."""

from __future__ import annotations

from torch import nn

from gradvar.errors import GradvarError
from gradvar.gradients.cost import fixed_bytes, sketch_bytes, tile_casts, work_bytes
from gradvar.gradients.devices import devices_of
from gradvar.gradients.job import Job
from gradvar.gradients.logprobs import chunk_bytes
from gradvar.gradients.plan import DEFAULT_TOKEN_BUDGET, Plan, free_memory, least_bytes, smallest_tile, split_work
from gradvar.gradients.sketch import SketchPlan
from gradvar.gradients.usage import peak_bytes

_FREE_SHARE = 0.8
"""Part of what is free that is used without a budget: the rest is for the allocator and for other processes."""
_SLACK = 20
"""One part in so many of a budget is left to the allocator."""
_TILE_SHARE = 0.15
_TILE_LIMIT = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Bytes of a tile, at most: on a GPU products of few rows leave most of it idle."""
_CHUNK_SHARE = 1 / 32
"""A chunk of logits is at most this part of the budget."""


def default_budget(model: nn.Module) -> int:
    """Return what is free on the model's device (of several, on the fullest), less a margin, in bytes."""
    return int(_FREE_SHARE * min(free_memory(device) for device in devices_of(model)))


def usable(budget: int) -> int:
    """Return the part of a budget that is planned with: holes between the allocator's blocks take the rest."""
    return budget - budget // _SLACK


def choose_plan(
    job: Job,
    *,
    token_budget: int | None,
    memory_budget: int | None,
    checkpointing: str,
    may_checkpoint: bool,
    sketch: SketchPlan | None = None,
) -> Plan:
    """Return a plan whose estimated peak is within the memory budget; only short probes are run.

    Batches take at most half of the budget where they can, gradients and tiles the rest.

    Args:
        job: The request; its plan is not looked at.
        token_budget: Padded tokens of a batch, at most; None chooses.
        memory_budget: Bytes for everything beside the model; None takes most of what is free.
        checkpointing: "off", "reentrant" or "non_reentrant".
        may_checkpoint: Switch it on where nothing else would do.
        sketch: What is kept of every gradient beside.

    Raises:
        GradvarError: A budget is not positive, or too small for the longest response alone.
    """
    if token_budget is not None and token_budget < 1:
        raise GradvarError(f"token budget: expected at least 1 token, received {token_budget}")
    if memory_budget is not None and memory_budget < 1:
        raise GradvarError(f"memory budget: expected a positive number of bytes, received {memory_budget}")
    if any(target.direct is not None for target in job.targets):
        token_budget = 1  # each response alone
    given = default_budget(job.model) if memory_budget is None else memory_budget
    sketches = sketch_bytes(job, sketch)
    total = max(0, usable(given) - sketches)
    plans, least = [], []
    for kind in [checkpointing, *(["non_reentrant"] if may_checkpoint and checkpointing == "off" else [])]:
        tokens, chunk, work = _batching(job, token_budget, total, kind)
        plan = _split(job, tokens, total, chunk, work, kind, given)
        if plan is None:
            least.append(_least(job, kind))
        else:
            plans.append(plan)
            if 2 * work <= total:
                break
    if plans:  # layers made again cost about a third of a pass
        return min(plans, key=lambda plan: len(plan.passes) * (3 if plan.checkpointing == "off" else 4))
    needed = min(least) + sketches
    enough = needed + (needed - 1) // (_SLACK - 1)  # the least of which so much is usable
    raise GradvarError(
        f"memory budget of {given} bytes is too small: expected at least {enough} bytes ({enough / 2**30:.2g} "
        "GiB), for the longest response alone and one row of the largest target"
        + (f", {sketches} of them for sketches of {sketch.dimension} numbers" if sketch is not None else "")
    )


def _batching(job: Job, token_budget: int | None, total: int, kind: str) -> tuple[int, int, int]:
    """Return (token budget, chunk of logits, bytes of the largest batch), at most half of the total if it can be."""
    tokens = token_budget or DEFAULT_TOKEN_BUDGET.get(job.device.type, DEFAULT_TOKEN_BUDGET["cpu"])
    chunk = min(chunk_bytes(job.device), int(_CHUNK_SHARE * total))
    while True:
        peak = peak_bytes(job, None, kind, tokens)
        work = sum(work_bytes(job, peak, tokens, chunk))
        if 2 * work <= total:
            return tokens, chunk, work
        if len(job.batches(tokens)) == len(job.responses):  # each alone already: one token's logits at a time
            return tokens, 1, sum(work_bytes(job, peak, tokens, 1))
        tokens = max(1, min(tokens - 1, int(tokens * total / (2 * work))))


def _split(job: Job, tokens: int, total: int, chunk: int, work: int, kind: str, given: int) -> Plan | None:
    """Return the plan with batches of `work` bytes, None where too little is left for gradients and tiles.

    Args:
        job: The request.
        tokens: Padded tokens of a batch.
        total: Bytes that are planned with.
        chunk: A chunk of logits.
        work: Bytes of the largest batch.
        kind: Activation checkpointing.
        given: The budget, of which `total` is usable.
    """
    spare = total - fixed_bytes(job)
    smallest = smallest_tile(job.targets, len(job.responses), job.dtype)
    limit = _TILE_LIMIT.get(job.device.type, _TILE_LIMIT["cpu"])
    wish = max(smallest, min(limit, max(work - tile_casts(job), int(_TILE_SHARE * spare))))
    for tile in (wish, smallest):
        room = spare - max(work, tile + tile_casts(job))
        if room >= least_bytes(job.targets, job.lengths, job.factor_dtype):
            passes = split_work(job.targets, job.lengths, job.factor_dtype, room)
            return Plan(
                token_budget=tokens,
                memory_budget=given,
                tile_bytes=tile,
                chunk_bytes=chunk,
                work_bytes=work,
                spare_bytes=spare - work - max(sum(block.bytes for block in blocks) for blocks in passes),
                passes=passes,
                checkpointing=kind,
            )
    return None


def _least(job: Job, kind: str) -> int:
    """Return a budget that does: every response alone, one token's logits, one row of a target."""
    work = sum(work_bytes(job, peak_bytes(job, None, kind, 1), 1, 1))
    tile = smallest_tile(job.targets, len(job.responses), job.dtype) + tile_casts(job)
    return fixed_bytes(job) + least_bytes(job.targets, job.lengths, job.factor_dtype) + max(work, tile)
