"""How the work is split so that memory stays within a budget: what is kept of each target, and in which pass.

Each pass runs the model over all responses once. A target whose gradients do not fit beside the others gets a pass
of its own, and a matrix too large for one pass is measured in blocks of rows: the Gram is a sum over rows, so the
answer is the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from gradvar.gradients.targets import Target

DEFAULT_TOKEN_BUDGET = {"cpu": 512, "cuda": 16384}
_ALIGNED = 8
"""Rows or tokens of which 16 bytes hold a whole number, in half precision too."""
_LEAST_ROWS = 64
"""Rows for which a block begins in memory that others take a part of, unless it is all of its target's."""
_CGROUP = Path("/sys/fs/cgroup")


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
    home: str = "device"
    """Whose memory it is in: "device" or "host"."""


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
    """Gradients or factors of the largest pass on the device, the Grams and sketches."""
    host_bytes: int
    """Those of the largest pass in the host's memory."""
    transfer_bytes: int
    """Copied to the host's memory and back, by all passes."""
    tile_bytes: int
    """The largest tile of the Gram, with what it is made from."""
    host_tile_bytes: int
    """All there is on the device at the largest tile of what the host holds: its own gradients are done by then."""
    activation_bytes: int
    """Forward and backward of the largest batch at their peak, with what is copied of it."""
    logits_bytes: int
    """A chunk of logits and what is made of it."""
    forward_flop: int
    backward_flop: int
    """Truncated at the lowest target, probes and prefixes included, layers made again too."""
    gram_flop: int
    """Gradients from factors, and the Grams' products."""

    @property
    def peak_bytes(self) -> int:
        """All that is held at one time beside the model, at most; the host's memory is not in it."""
        own = self.kept_bytes + max(self.tile_bytes, self.activation_bytes + self.logits_bytes)
        return max(own, self.host_tile_bytes)

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
    """Bytes for everything beside the model."""
    tile_bytes: int
    """The largest tile of a Gram."""
    chunk_bytes: int
    """A chunk of logits, at most (that of a single token, where it is larger)."""
    work_bytes: int
    """The largest batch: its forward, backward and log-probabilities."""
    spare_bytes: int
    """What of the budget is left while a batch runs."""
    trunk_bytes: int
    """Of them, for the prompt's keys and values, where the layers below the lowest target see it once."""
    passes: tuple[tuple[Block, ...], ...]
    host_memory_budget: int = 0
    """Bytes of the host's memory for gradients that the device has no room for."""
    host_tile_bytes: int = 0
    """The largest tile of a Gram of what the host holds."""
    checkpointing: str = "off"
    """Activation checkpointing above the lowest target: "off", "reentrant" or "non_reentrant"."""
    cost: Cost | None = None
    """Set by `plan_measurement` alone."""


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on the device, blocks that torch holds unused among them."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    free = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // 4
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), free)
    with suppress(OSError, ValueError):  # a container's own limit; "max" where it has none
        limit, used = (int(_CGROUP.joinpath(name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(0, limit - used))
    return free


def split_work(
    targets: Sequence[Target], lengths: Sequence[int], dtype: torch.dtype, room: int, host_room: int = 0
) -> tuple[tuple[Block, ...], ...]:
    """Return which rows of which targets are kept how and where, in which pass: the device first, then the host.

    Args:
        targets: What is measured.
        lengths: Tokens fed for each response, the prompt's included.
        dtype: The model's dtype.
        room: Bytes for what is kept on the device in a pass, at least `least_bytes`.
        host_room: Bytes for what is kept in the host's memory in a pass.
    """
    passes: list[list[Block]] = [[]]
    rows = sum(target.out_features for target in targets)
    held = 8 * len(lengths) * rows if host_room > 0 else 0  # the biases' gradients stay on the device
    if room - held < least_bytes(targets, lengths, dtype):
        held = 0
    biases = "biases" if held else "device"
    left = {"device": room - held, "biases": held, "host": host_room}
    inputs: dict[str, set[str]] = {"device": set(), "host": set()}
    taken: set[str] = set()
    for target in targets:
        start, stop = target.rows or (0, target.out_features)
        while start < stop:
            least = {home: min(stop - start, _LEAST_ROWS) if home in taken else 1 for home in inputs}
            block = _fit(target, start, stop, lengths, dtype, left["device"], inputs["device"], least["device"])
            if block is None and host_room > 0 and target.kind != "head" and target.direct is None:
                end = start + aligned_rows(stop - start, left[biases] // (8 * len(lengths)))
                block = _fit(target, start, end, lengths, dtype, left["host"], inputs["host"], least["host"], "host")
            if block is None:
                if not passes[-1]:
                    raise ValueError(f"{room} bytes are too few for one row of {target.key}")
                passes.append([])
                left = {"device": room - held, "biases": held, "host": host_room}
                inputs, taken = {"device": set(), "host": set()}, set()
                continue
            passes[-1].append(block)
            taken.add(block.home)
            left[block.home] -= block.bytes
            if block.home == "host":
                left[biases] -= device_bytes([block], len(lengths))
            if block.keep == "factors":  # matrices hold no input
                inputs[block.home].add(_input_of(target))
            start = block.stop
    return tuple(tuple(blocks) for blocks in passes)


def device_bytes(blocks: Sequence[Block], count: int) -> int:
    """Return what the blocks of so many responses take on the device: of those on the host, the biases' gradients."""
    return sum(block.bytes if block.home == "device" else 8 * count * (block.stop - block.start) for block in blocks)


def host_bytes(blocks: Sequence[Block]) -> int:
    """Return what the blocks take of the host's memory."""
    return sum(block.bytes for block in blocks if block.home == "host")


def least_bytes(targets: Sequence[Target], lengths: Sequence[int], dtype: torch.dtype) -> int:
    """Return the bytes in which one row of every target can be kept, one at a time."""
    return max(min(fixed + a_row for fixed, a_row in _costs(target, lengths, dtype).values()) for target in targets)


def aligned_rows(rows: int, most: int) -> int:
    """Return how many of the rows to take at one time: all, or a multiple of 8 up to `most` (below 8, `most`).

    On CUDA a product in half precision whose operands begin at odd addresses, or have rows of odd lengths, runs without
    the fast kernels.
    """
    return rows if rows <= most else most - most % _ALIGNED if most > _ALIGNED else most


def aligned_tokens(tokens: int) -> int:
    """Return the length of a row of so many tokens in the host's memory, where each begins at an aligned address."""
    return tokens + -tokens % _ALIGNED


def smallest_tile(targets: Sequence[Target], count: int, dtype: torch.dtype) -> int:
    """Return the bytes of a tile of one row of the widest target."""
    return max(target.in_features for target in targets) * count * (8 if dtype == torch.float64 else 4)


def _input_of(target: Target) -> str:
    """Return a name of the target's input, the same for projections that share it."""
    for name, kinds in (("attention", ("q", "k", "v", "qkv")), ("mlp", ("gate", "up", "gate_up"))):
        if target.kind in kinds and target.layer is not None:
            return f"{target.layer} {name} {target.in_features}"
    return target.module


def _costs(
    target: Target, lengths: Sequence[int], dtype: torch.dtype, home: str = "device"
) -> dict[str, tuple[int, int]]:
    """Return (fixed bytes, bytes a row) of each way to keep a target."""
    width = torch.finfo(dtype).bits // 8
    wide = 8 if dtype == torch.float64 else 4
    tokens, count = sum(lengths), len(lengths)
    if target.kind == "head":  # hidden states, and the gradient at a tied input embedding
        return {"head": (tokens * target.in_features * (width + wide), count * 8)}
    matrices = (0, count * (target.in_features * wide + 8))
    if target.direct is not None:
        return {"matrices": matrices}
    row = tokens if home == "device" else sum(map(aligned_tokens, lengths))
    return {"factors": (tokens * target.in_features * width, row * width + count * 8), "matrices": matrices}


def _fit(
    target: Target,
    start: int,
    stop: int,
    lengths: Sequence[int],
    dtype: torch.dtype,
    room: int,
    inputs: set[str],
    least: int,
    home: str = "device",
) -> Block | None:
    """Return the block from `start` that fits the room and costs least, as tall as it can be; `least` rows or none."""
    best: Block | None = None
    for keep, (fixed, a_row) in _costs(target, lengths, dtype, home).items():
        shared = keep == "factors" and _input_of(target) in inputs  # q, k and v have one input
        fixed = 0 if shared else fixed
        rows = aligned_rows(stop - start, (room - fixed) // a_row)
        if rows < least:
            continue
        block = Block(
            target=target, start=start, stop=start + int(rows), keep=keep, bytes=int(fixed + rows * a_row), home=home
        )
        if best is None or (-(block.stop - start), block.bytes) < (-(best.stop - start), best.bytes):
            best = block
    return best
