"""A plan whose peak, activations too, stays within a memory budget: smaller batches, checkpointing, more passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from gradvar.errors import GradvarError
from gradvar.gradients.cost import (
    fixed_bytes,
    offloaded_bytes,
    sketch_bytes,
    staging_bytes,
    tile_casts,
    token_flop,
    transfer_bytes,
    work_bytes,
)
from gradvar.gradients.devices import devices_of
from gradvar.gradients.job import Job
from gradvar.gradients.logprobs import chunk_bytes
from gradvar.gradients.plan import (
    DEFAULT_TOKEN_BUDGET,
    Block,
    Plan,
    device_bytes,
    free_memory,
    host_bytes,
    least_bytes,
    smallest_tile,
    split_work,
)
from gradvar.gradients.sketch import SketchPlan
from gradvar.gradients.spill import FILLED
from gradvar.gradients.trunk import trunk_bytes
from gradvar.gradients.usage import OverLimitError, peak_bytes

_FREE_SHARE = 0.8
"""Part of what is free that is used without a budget: the rest is for the allocator and for other processes."""
_HOST_SHARE = 0.5
"""Part of the host's free memory that gradients may lock: the system cannot move such pages."""
_SLACK = 20
"""One part in so many of a budget is left to the allocator, at least."""
_SCRATCH = {"cpu": 24 << 20, "cuda": 64 << 20}
"""What libraries take beside tensors, at most: on the CPU as measured (MKL packs its operands; the process's small
blocks), on CUDA cuBLAS's workspaces, 32 MiB a handle on an H100 (torch's documentation of CUBLAS_WORKSPACE_CONFIG)."""
_SCRATCH_SHARE = 5
"""One part in so many of a budget is left to them, at most: small models take little."""
_TILE_SHARE = 0.15
_TILE_LIMIT = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Bytes of a tile, at most: on a GPU products of few rows leave most of it idle."""
_SHRINK = 0.7
"""Batches of so many times the tokens are tried next, for the passes that they save."""
_A_BATCH_TOKENS = 16
"""What a batch costs beside its tokens on the CPU, in tokens, as measured (27 M parameters, one thread: 0.02 s)."""
_SPEED = 4.5e14
_A_BATCH = 0.05
_A_LOCKED_BYTE = 1e-10
_A_COPIED_BYTE = 1.6e-10
"""Of an H200, as measured (benchmarks/gradients_gpu_plans.md): FLOP of a dense model a second; seconds for a batch
beside its tokens (its kernels' launches), for a byte of the host's memory (0.3 ns to lock it, once a process: a third
is counted), for a byte copied to the host or back, what waits for it counted."""
_TOO_MUCH = 1 << 62
"""More bytes than any budget."""
_CHUNK_SHARE = 1 / 32
"""A chunk of logits is at most this part of the budget."""


def default_budget(model: nn.Module) -> int:
    """Return what is free on the model's device (of several, on the fullest), less a margin, in bytes."""
    return int(_FREE_SHARE * min(free_memory(device) for device in devices_of(model)))


def default_host_budget(device: torch.device) -> int:
    """Return a part of what is free on the host; 0 where the device has no memory of its own."""
    return int(_HOST_SHARE * free_memory(torch.device("cpu"))) if device.type == "cuda" else 0


def usable(budget: int, device: torch.device) -> int:
    """Return the part of a budget that is planned with: the allocator's holes and libraries' scratch take the rest."""
    scratch = _SCRATCH.get(device.type, _SCRATCH["cpu"])
    return budget - max(budget // _SLACK, min(scratch, budget // _SCRATCH_SHARE))


def enough(needed: int, device: torch.device) -> int:
    """Return the least budget of which `needed` bytes are usable."""
    scratch = _SCRATCH.get(device.type, _SCRATCH["cpu"])
    below = min(needed + scratch, needed + (needed - 1) // (_SCRATCH_SHARE - 1))
    return max(needed + (needed - 1) // (_SLACK - 1), below)


def choose_plan(
    job: Job,
    *,
    token_budget: int | None,
    memory_budget: int | None,
    host_memory_budget: int | None = None,
    checkpointing: str,
    may_checkpoint: bool,
    sketch: SketchPlan | None = None,
) -> Plan:
    """Return a plan whose estimated peak is within the memory budget; only short probes are run.

    Batches take at most half of the budget where they can, gradients and tiles the rest; less, where gradients then
    need so many fewer passes that it is worth it.

    Args:
        job: The request; its plan is not looked at.
        token_budget: Padded tokens of a batch, at most; None chooses.
        memory_budget: Bytes for everything beside the model; None takes most of what is free.
        host_memory_budget: Bytes of the host's memory for gradients that do not fit; None takes a part of what is free
            where the device has memory of its own.
        checkpointing: "off", "reentrant" or "non_reentrant".
        may_checkpoint: Switch it on where nothing else would do, or would be slower.
        sketch: What is kept of every gradient beside.

    Raises:
        GradvarError: A budget is not positive, or too small for the longest response alone.
    """
    if token_budget is not None and token_budget < 1:
        raise GradvarError(f"token budget: expected at least 1 token, received {token_budget}")
    if memory_budget is not None and memory_budget < 1:
        raise GradvarError(f"memory budget: expected a positive number of bytes, received {memory_budget}")
    if host_memory_budget is not None and host_memory_budget < 0:
        raise GradvarError(f"host memory budget: expected 0 or more bytes, received {host_memory_budget}")
    if any(target.direct is not None for target in job.targets):
        token_budget = 1  # each response alone
    given = default_budget(job.model) if memory_budget is None else memory_budget
    sketches = sketch_bytes(job, sketch)
    total = max(0, usable(given, job.device) - sketches)
    host = default_host_budget(job.device) if host_memory_budget is None else host_memory_budget
    host = int(FILLED * host) if job.device.type == "cuda" else host - host // _SLACK
    search = _Search(job=job, given=given, total=total, host=host, trunk=_trunk(job))
    searches = [search, *([replace(search, host=0)] if job.device.type == "cuda" and host > 0 else [])]
    plans: list[Plan] = []
    kinds = [checkpointing, *(["non_reentrant"] if may_checkpoint and checkpointing == "off" else [])]
    usual = token_budget or DEFAULT_TOKEN_BUDGET.get(job.device.type, DEFAULT_TOKEN_BUDGET["cpu"])
    for kind in kinds:
        tokens, chunk, work = search.batching(usual, kind)
        for one in searches:
            plan = one.split(tokens, chunk, work, kind)
            if plan is not None:
                plans += [plan, *one.smaller(plan)]
        if len(job.batches(tokens)) == len(job.batches(usual)) and any(map(_all_at_once, plans)):
            break
    if plans:
        return min(plans, key=lambda plan: _work(job, plan))
    needed = min(_least(job, kind) for kind in kinds) + sketches  # probed beyond the budget, to say what would do
    would_do = enough(needed, job.device)
    raise GradvarError(
        f"memory budget of {given} bytes is too small: expected at least {would_do} bytes ({would_do / 2**30:.2g} "
        "GiB), for the longest response alone and one row of the largest target"
        + (f", {sketches} of them for sketches of {sketch.dimension} numbers" if sketch is not None else "")
    )


@dataclass(frozen=True, kw_only=True)
class _Search:
    """Plans of one job within one budget."""

    job: Job
    given: int
    """The budget."""
    total: int
    """Bytes of it that are planned with."""
    host: int
    """Bytes of the host's memory that are planned with."""
    trunk: tuple[int, int]
    """What the trunk takes: fixed, and for a token of the largest batch."""

    def batching(self, tokens: int, kind: str) -> tuple[int, int, int]:
        """Return (token budget, chunk of logits, bytes of the largest batch), at most half of the total if it can be.

        Args:
            tokens: The limit.
            kind: Activation checkpointing.
        """
        chunk = min(chunk_bytes(self.job.device), int(_CHUNK_SHARE * self.total))
        while True:
            work = self._work(tokens, chunk, kind)
            if 2 * work <= self.total:
                return tokens, chunk, work
            if len(self.job.batches(tokens)) == len(self.job.responses):  # each alone: one token's logits at a time
                return tokens, 1, self._work(tokens, 1, kind)
            tokens = max(1, min(tokens - 1, int(tokens * self.total / (2 * work))))

    def smaller(self, plan: Plan) -> list[Plan]:
        """Return plans with smaller batches, which leave more room for gradients, down to each response alone.

        None where one pass does, on the device alone.
        """
        plans: list[Plan] = []
        tokens, last = plan.token_budget, len(self.job.batches(plan.token_budget))
        while last < len(self.job.responses) and not _all_at_once((plans or [plan])[-1]):
            tokens = int(_SHRINK * tokens)
            count = len(self.job.batches(tokens))
            if count == last:
                continue
            last = count
            work = self._work(tokens, plan.chunk_bytes, plan.checkpointing)
            found = self.split(tokens, plan.chunk_bytes, work, plan.checkpointing)
            if found is not None:
                plans.append(found)
        return plans

    def split(self, tokens: int, chunk: int, work: int, kind: str) -> Plan | None:
        """Return the plan with batches of `work` bytes, None where too little is left for gradients and tiles.

        Args:
            tokens: Padded tokens of a batch.
            chunk: A chunk of logits.
            work: Bytes of the largest batch.
            kind: Activation checkpointing.
        """
        job = self.job
        spare = self.total - fixed_bytes(job)
        smallest = smallest_tile(job.targets, len(job.responses), job.dtype)
        limit = _TILE_LIMIT.get(job.device.type, _TILE_LIMIT["cpu"])
        wish = max(smallest, min(limit, max(work - tile_casts(job), int(_TILE_SHARE * spare))))
        fixed, a_token = self.trunk
        trunk = fixed + a_token * max(batch.input_ids.numel() for batch in job.batches(tokens)) if a_token else 0
        found: Plan | None = None
        for tile, held in ((wish, trunk), (smallest, trunk), (wish, 0), (smallest, 0)):
            room = spare - max(work + held, tile + tile_casts(job))
            if room < least_bytes(job.targets, job.lengths, job.factor_dtype):
                continue
            passes, in_host = self._passes(room)
            kept = max(device_bytes(blocks, len(job.responses)) for blocks in passes)
            free = spare - tile_casts(job) - staging_bytes(job) - kept
            plan = Plan(
                token_budget=tokens,
                memory_budget=self.given,
                tile_bytes=tile,
                chunk_bytes=chunk,
                work_bytes=work,
                spare_bytes=spare - work - kept - in_host * staging_bytes(job),
                trunk_bytes=held,
                passes=passes,
                host_memory_budget=self.host,
                host_tile_bytes=in_host * max(tile, free // 2),
                checkpointing=kind,
            )
            if in_host or self.host <= 0 or len(passes) == 1:
                return plan
            found = found or plan  # a lower tile may leave room for what is on its way to the host
        return found

    def _passes(self, room: int) -> tuple[tuple[tuple[Block, ...], ...], bool]:
        """Return the passes, and whether the host holds a part: where the device alone would need more of them."""
        job = self.job
        asked = (job.targets, job.lengths, job.factor_dtype)
        own = split_work(*asked, room)
        left = room - staging_bytes(job)
        if len(own) == 1 or self.host <= 0 or left < least_bytes(*asked):
            return own, False
        shared = split_work(*asked, left, self.host)
        return (shared, True) if len(shared) < len(own) else (own, False)

    def _work(self, tokens: int, chunk: int, kind: str) -> int:
        """Return the bytes of the largest batch; more than any budget where a probe takes all that there is."""
        try:
            peak = peak_bytes(self.job, None, kind, tokens, limit=self.total)
        except OverLimitError:
            return _TOO_MUCH
        return sum(work_bytes(self.job, peak, tokens, chunk))


def _trunk(job: Job) -> tuple[int, int]:
    """Return what sharing the prompt takes below the highest target, at most: fixed, and a token of a batch."""
    layers = [target.layer for target in job.targets if target.kind != "head" and target.layer is not None]
    if job.tied is not None:  # the head's passes end at the embedding
        return 0, 0
    with job.autocast.on(), torch.no_grad():
        return trunk_bytes(job.model, job.head.base, job.prompt, job.responses, max(layers, default=None))


def _all_at_once(plan: Plan) -> bool:
    """Return whether one pass does, with all gradients on the device."""
    return len(plan.passes) == 1 and not host_bytes(plan.passes[0])


def _work(job: Job, plan: Plan) -> float:
    """Return about how long a plan takes, in a unit of the device's own."""
    return _seconds_on_cuda(job, plan) if job.device.type == "cuda" else _tokens_on_a_cpu(job, plan)


def _tokens_on_a_cpu(job: Job, plan: Plan) -> float:
    batches = job.batches(plan.token_budget)
    fed = sum(batch.input_ids.numel() for batch in batches)
    return _passes(plan) * (fed + len(batches) * _A_BATCH_TOKENS)


def _seconds_on_cuda(job: Job, plan: Plan) -> float:
    batches = job.batches(plan.token_budget)
    fed = sum(batch.input_ids.numel() for batch in batches)
    a_batch = _A_BATCH + 2 * offloaded_bytes(job.model) * _A_COPIED_BYTE  # forward and backward
    held = max(host_bytes(blocks) for blocks in plan.passes) * _A_LOCKED_BYTE
    moved = transfer_bytes(job, plan) * _A_COPIED_BYTE
    return _passes(plan) * (fed * token_flop(job) / _SPEED + len(batches) * a_batch) + held + moved


def _passes(plan: Plan) -> float:
    """Return the passes; one that makes layers again counts a third more."""
    return len(plan.passes) * (1 if plan.checkpointing == "off" else 4 / 3)


def _least(job: Job, kind: str) -> int:
    """Return a budget that does: every response alone, one token's logits, one row of a target."""
    work = sum(work_bytes(job, peak_bytes(job, None, kind, 1), 1, 1))
    tile = smallest_tile(job.targets, len(job.responses), job.dtype) + tile_casts(job)
    return fixed_bytes(job) + least_bytes(job.targets, job.lengths, job.factor_dtype) + max(work, tile)
