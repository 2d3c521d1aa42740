"""How the work is split so that memory stays within a budget: what is kept of each target, and in which pass.

Each pass runs the model over all responses once. A target whose gradients do not fit beside the others gets a pass
of its own, and a matrix too large for one pass is measured in blocks of rows: the Gram is a sum over rows, so the
answer is the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradvar.errors import GradvarError
from gradvar.gradients.targets import Target

DEFAULT_TOKEN_BUDGET = {"cpu": 512, "cuda": 16384}
_TILE_SHARE = 0.15
_TILE_LIMIT = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows of one target, kept in one pass."""

    target: Target
    start: int
    """First output row, counted in the module."""
    stop: int
    keep: str
    """"factors", "matrices" or "head"."""
    bytes: int
    """Estimated memory for all responses."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a measurement would take, estimated: bytes at one time, FLOP in all."""

    batches: int
    """Batches of a pass."""
    tokens: int
    """Tokens fed in a pass, the prompt's counted for each response."""
    padded_tokens: int
    """The same with padding."""
    kept_bytes: int
    """Gradients or factors of the largest pass."""
    tile_bytes: int
    """The largest tile of the Gram."""
    activation_bytes: int
    """What the graph of the largest batch keeps for backward, with one layer made again under checkpointing."""
    logits_bytes: int
    """A chunk of logits and what is made of it."""
    forward_flop: int
    backward_flop: int
    """Truncated at the lowest target, probes and prefixes included, layers made again too."""
    gram_flop: int
    """Gradients from factors, and the Grams' products."""

    @property
    def peak_bytes(self) -> int:
        """All that is held at one time beside the model, at most."""
        return self.kept_bytes + max(self.tile_bytes, self.activation_bytes + self.logits_bytes)

    @property
    def flop(self) -> int:
        """Multiplications and additions of all passes."""
        return self.forward_flop + self.backward_flop + self.gram_flop


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Batching and memory of one measurement."""

    token_budget: int
    """Padded tokens of a batch, at most (a single longer response goes alone)."""
    memory_budget: int
    """Bytes for gradients and tiles."""
    tile_bytes: int
    passes: tuple[tuple[Block, ...], ...]
    checkpointing: str = "off"
    """Activation checkpointing above the lowest target: "off", "reentrant" or "non_reentrant"."""
    cost: Cost | None = None
    """Set by `plan_measurement` alone."""


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // 4


def make_plan(
    targets: Sequence[Target],
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    token_budget: int | None,
    memory_budget: int | None,
    checkpointing: str = "off",
) -> Plan:
    """Return which rows of which targets are kept how, in which pass.

    Args:
        targets: What is measured.
        lengths: Tokens fed for each response, the prompt's included.
        dtype: The model's dtype.
        device: Where the factors are kept.
        token_budget: Padded tokens of a batch; None chooses by device.
        memory_budget: Bytes for gradients and tiles; None takes 60% of what is free.
        checkpointing: Noted in the plan.

    Raises:
        GradvarError: A budget is not positive, or too small for a single row of a target.
    """
    if token_budget is not None and token_budget < 1:
        raise GradvarError(f"token budget: expected at least 1 token, received {token_budget}")
    if any(target.direct is not None for target in targets):
        token_budget = 1  # each response alone
    if memory_budget is not None and memory_budget < 1:
        raise GradvarError(f"memory budget: expected a positive number of bytes, received {memory_budget}")
    budget = memory_budget if memory_budget is not None else int(0.6 * free_memory(device))
    tile = min(_TILE_LIMIT, int(_TILE_SHARE * budget))
    passes: list[list[Block]] = [[]]
    room = budget - tile
    inputs: set[str] = set()
    for target in targets:
        start, stop = target.rows or (0, target.out_features)
        while start < stop:
            block = _fit(target, start, stop, lengths, dtype, room, inputs)
            if block is None:
                if not passes[-1]:
                    raise GradvarError(
                        f"memory budget of {budget} bytes is too small for one row of {target.key}: "
                        f"expected at least {_least(target, lengths, dtype)} bytes"
                    )
                passes.append([])
                room, inputs = budget - tile, set()
                continue
            passes[-1].append(block)
            room -= block.bytes
            inputs.add(_input_of(target))
            start = block.stop
    return Plan(
        token_budget=token_budget or DEFAULT_TOKEN_BUDGET.get(device.type, DEFAULT_TOKEN_BUDGET["cpu"]),
        memory_budget=budget,
        tile_bytes=tile,
        passes=tuple(tuple(blocks) for blocks in passes),
        checkpointing=checkpointing,
    )


def _input_of(target: Target) -> str:
    """Return a name of the target's input, the same for projections that share it."""
    for name, kinds in (("attention", ("q", "k", "v", "qkv")), ("mlp", ("gate", "up", "gate_up"))):
        if target.kind in kinds and target.layer is not None:
            return f"{target.layer} {name} {target.in_features}"
    return target.module


def _costs(target: Target, lengths: Sequence[int], dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Return (fixed bytes, bytes a row) of each way to keep a target."""
    width = torch.finfo(dtype).bits // 8
    wide = 8 if dtype == torch.float64 else 4
    tokens, count = sum(lengths), len(lengths)
    if target.kind == "head":  # hidden states, and the gradient at a tied input embedding
        return {"head": (tokens * target.in_features * (width + wide), count * 8)}
    matrices = (0, count * (target.in_features * wide + 8))
    if target.direct is not None:
        return {"matrices": matrices}
    return {"factors": (tokens * target.in_features * width, tokens * width + count * 8), "matrices": matrices}


def _fit(
    target: Target,
    start: int,
    stop: int,
    lengths: Sequence[int],
    dtype: torch.dtype,
    room: int,
    inputs: set[str],
) -> Block | None:
    """Return the block from `start` that fits the room and costs least, as tall as it can be."""
    best: Block | None = None
    for keep, (fixed, a_row) in _costs(target, lengths, dtype).items():
        shared = keep == "factors" and _input_of(target) in inputs  # q, k and v have one input
        fixed = 0 if shared else fixed
        rows = min(stop - start, (room - fixed) // a_row)
        if rows < 1:
            continue
        block = Block(target=target, start=start, stop=start + int(rows), keep=keep, bytes=int(fixed + rows * a_row))
        if best is None or (-(block.stop - start), block.bytes) < (-(best.stop - start), best.bytes):
            best = block
    return best


def _least(target: Target, lengths: Sequence[int], dtype: torch.dtype) -> int:
    smallest = min(fixed + a_row for fixed, a_row in _costs(target, lengths, dtype).values())
    return int(smallest / (1 - _TILE_SHARE)) + 1
