"""A seeded sketch of each response's gradient, whose inner products estimate those of responses to different prompts.

    sketch(G)_rk = 1/sqrt(R) sum over the entries u with h(u) = k of sigma_r(u) G_u,    r = 1..R, k = 1..w,  d = R w

A count sketch (Charikar, Chen and Farach-Colton 2002; feature hashing, Weinberger et al. 2009) with R sets of signs on
one hash h: every entry of the gradient falls into one of w buckets, with R independent random signs. For any two
gradients <sketch(G), sketch(H)> is unbiased for <G, H>, given any hash, and

    Var <= (||G||^2 ||H||^2 + <G, H>^2) / d

over hash and signs, as for a dense projection to d random signs (the Johnson-Lindenstrauss projection of TRAK), since
two entries meet with probability at most 1/w and the R estimates are independent given the hash. The R parts
estimate <G, H> each on its own: their spread measures the error.
A projection P G Q (LoGra, Choe et al. 2024; bergson) costs less where the gradient itself is never made, but errs more:
the squared norm of a gradient of rank one has the relative variance (1 + 2/p)(1 + 2/q) - 1, p q = d, a standard error
of 25% instead of 2.2% at d = 4096. On score gradients of the bundled policy it erred 1.3 to 5 times as much as this
sketch at the same d and about the same time (benchmarks/sketches.csv). The Gram makes the gradient's rows anyhow, so
this one adds R multiplications an entry.

Entries are hashed in chunks of w columns of one row: a random shift of each chunk, so entries of one chunk never meet.
Hash and signs depend on the seed, the target's key and its shape alone (Philox counters by row): neither prompts, runs,
tiles, threads nor devices matter, so sketches made at different times may be multiplied.
A CPU adds one chunk after another, each in its cache. On a GPU every chunk would be a few launches, 670,000 for the
237 million weights of last:qkv and 14:qkv,mlp at Qwen2.5-7B's shape: there the entries of many rows are put in the
order of their buckets at one time, and a batched product with their signs sums each bucket.
Shape letters: N responses, O outputs, I inputs, C chunks of a row, M chunks of some rows, R repeats, w width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradvar.errors import GradvarError

REPEATS = 8
"""R, estimates of every inner product that are independent given the hash."""
SMALLEST, LARGEST = 256, 1 << 16
_PIECE = 1 << 20
"""Entries of all responses' gradients that are hashed at one time."""
_AT_ONCE = 1 << 25
"""The same on other devices than the CPU, their last chunks filled up."""


@dataclass(frozen=True, kw_only=True)
class SketchPlan:
    """Which sketch is made of every gradient."""

    dimension: int = 4096
    """d = R w, a power of two: an inner product's error is about sqrt(1/d) of the norms' product."""
    seed: int = 0
    """Seed of hash and signs; only sketches of one seed and dimension may be multiplied."""

    def __post_init__(self) -> None:
        d = self.dimension
        if not (SMALLEST <= d <= LARGEST and d & (d - 1) == 0):
            raise GradvarError(f"sketch dimension: expected a power of two from {SMALLEST} to {LARGEST}, received {d}")
        if self.seed < 0:
            raise GradvarError(f"seed of the sketch: expected a whole number from 0, received {self.seed}")

    @property
    def width(self) -> int:
        """Buckets w of each repeat."""
        return self.dimension // REPEATS

    def bytes(self, shapes: Sequence[tuple[int, int]], responses: int, device: torch.device) -> int:
        """Return the memory, at most, that sketching targets of these shapes takes beside the tiles."""
        count = max(responses, REPEATS)
        if device.type == "cpu":
            largest = max(rows * max(columns, self.width) for rows, columns in shapes)
            making = 16 * min(2 * _PIECE, count * largest)  # padded, with its signs
        else:
            wide = [(rows, self.width * -(-columns // self.width)) for rows, columns in shapes]
            entries = max(min(rows * row, max(_AT_ONCE // count, row)) for rows, row in wide)
            making = entries * (8 * count + 16 * REPEATS)  # in the buckets' order; their signs and places
        return 8 * responses * self.dimension * (len(shapes) + 2) + making


class Sketch:
    """The sketches of N responses' gradients over one target, filled tile by tile."""

    def __init__(self, plan: SketchPlan, target: str, shape: tuple[int, int], responses: int) -> None:
        self.plan = plan
        self.columns = shape[1]
        self._chunks = -(-shape[1] // plan.width)
        self._name = f"gradvar sketch 1|{plan.seed}|{plan.dimension}|{target}|{shape[0]}x{shape[1]}"
        self._total = torch.zeros((responses, REPEATS, plan.width), dtype=torch.float64)

    def add_rows(self, first: int, tile: Tensor) -> None:
        """Add rows of all gradients, tile (N, rows I), the first of them row `first` of the target's module."""
        count = max(tile.shape[0], REPEATS)
        rows = tile.view(tile.shape[0], -1, self.columns)
        if tile.device.type == "cpu":
            add, height = self._add_by_chunks, _PIECE // (count * self.columns)
        else:
            add, height = self._add_at_once, _AT_ONCE // (count * self._chunks * self.plan.width)
        height = max(1, height)
        for start in range(0, rows.shape[1], height):
            add(first + start, rows[:, start : start + height])

    def add_bias(self, first: int, bias: Tensor) -> None:
        """Add the bias gradients of rows from `first` on, bias (N, rows)."""
        height = max(1, _PIECE // self.plan.dimension)
        for start in range(0, bias.shape[1], height):
            self._add_bias(first + start, bias[:, start : start + height])

    def _add_bias(self, first: int, bias: Tensor) -> None:
        rows, device = bias.shape[1], bias.device
        words = self._words("bias", first, rows, 4)[:, :2]
        hashed = torch.zeros((rows, REPEATS, self.plan.width), dtype=torch.float64, device=device)
        signs = torch.from_numpy(_signs(words[:, :1].astype("<u8").view(np.uint8))[:, :REPEATS]).to(
            device, torch.float64
        )
        bucket = torch.from_numpy((words[:, 1] % self.plan.width).astype(np.int64)).to(device)
        hashed[torch.arange(rows, device=device), :, bucket] = signs
        self._add((bias.double() @ hashed.view(rows, -1)).view_as(self._total))

    def _add(self, sums: Tensor) -> None:
        """Add sums (N, R, w) in float64, where they are if that device has it."""
        self._total = self._total.to("cpu" if sums.device.type == "mps" else sums.device)
        self._total += sums.to(self._total.device).double()

    def values(self) -> NDArray[np.float32]:
        """Return the (N, d) sketches; entry r w + k is bucket k of repeat r."""
        whole = self._total.cpu().reshape(self._total.shape[0], -1) / math.sqrt(REPEATS)
        return whole.numpy().astype(np.float32)

    def _hash(self, first: int, height: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return of each row's chunks the shifts (height, C) and the signs, eight a byte (height, C, R, w / 8)."""
        chunks, width = self._chunks, self.plan.width
        shifts = self._words("shift", first, height, chunks)[:, :chunks] % width
        words = self._words("signs", first, height, chunks * width * REPEATS // 64)
        return shifts.astype(np.int64), words.astype("<u8").view(np.uint8).reshape(height, chunks, REPEATS, width // 8)

    def _add_by_chunks(self, first: int, rows: Tensor) -> None:
        count, height, _ = rows.shape
        width = self.plan.width
        shifts, bits = self._hash(first, height)
        signs = torch.from_numpy(_signs(bits)[:, :, :, None]).to(rows.device, rows.dtype)
        sums = torch.zeros((REPEATS, count, width), dtype=rows.dtype, device=rows.device)
        for row in range(height):
            for chunk in range(self._chunks):
                piece = rows[:, row, chunk * width : (chunk + 1) * width]
                there = signs[row, chunk, :, :, : piece.shape[1]]
                shift = int(shifts[row, chunk])
                split = min(piece.shape[1], width - shift)
                sums[:, :, shift : shift + split].addcmul_(piece[None, :, :split], there[:, :, :split])
                if split < piece.shape[1]:
                    sums[:, :, : piece.shape[1] - split].addcmul_(piece[None, :, split:], there[:, :, split:])
        self._add(sums.transpose(0, 1))

    def _add_at_once(self, first: int, rows: Tensor) -> None:
        count, height, columns = rows.shape
        width, device = self.plan.width, rows.device
        hashed = self._hash(first, height)
        shifts, packed = (torch.from_numpy(x.reshape(-1, *x.shape[2:])).to(device) for x in hashed)
        source = (torch.arange(width, device=device)[:, None] - shifts) % width  # (w, M) what falls in a bucket
        places = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
        bits = (packed[..., None] >> places & 1).flatten(2).gather(2, source.T[:, None].expand(-1, REPEATS, -1))
        signs = bits.permute(2, 0, 1).to(rows.dtype).mul_(2).sub_(1)  # (w, M, R)
        chunk = torch.arange(self._chunks, device=device).repeat(height)
        source += chunk * width
        if columns % width:  # beyond the row's end nothing is added
            signs *= (source < columns)[..., None]
            source.clamp_(max=columns - 1)
        source += torch.arange(height, device=device).repeat_interleave(self._chunks) * columns
        ordered = rows.flatten(1).index_select(1, source.flatten()).view(count, width, -1)
        self._add(torch.bmm(ordered.transpose(0, 1), signs).permute(1, 2, 0))

    def _words(self, stream: str, first: int, rows: int, per_row: int) -> NDArray[np.uint64]:
        """Return random words (rows, >= per_row), a function of stream and row alone."""
        per_row = -(-per_row // 4) * 4  # one step of Philox's counter makes four
        key = np.frombuffer(hashlib.sha256(f"{self._name}|{stream}".encode()).digest()[:16], dtype="<u8")
        generator = np.random.Philox(key=key.astype(np.uint64), counter=first * per_row // 4)
        return np.asarray(generator.random_raw(rows * per_row), dtype=np.uint64).reshape(rows, per_row)


def _signs(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Return the 8 signs of every byte, along the last axis."""
    bits = np.unpackbits(packed, axis=-1).view(np.int8)
    return bits * np.int8(2) - np.int8(1)
