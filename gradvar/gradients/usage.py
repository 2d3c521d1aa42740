"""What a run of the model takes, read off short probes: bytes held at one time, FLOP.

A batch of B rows of T tokens takes c + B (a T + b T^2); c, a and b are read off three probes of a few tokens, so they
hold for any architecture, attention implementation and checkpointing. A longer probe tests them: models that work on
whole chunks (state spaces, linear attention) take the same for any part of one, and models with a sliding window make
no mask within it. Where it finds more, three probes beyond the chunk and the window are read instead.

Bytes are those of every tensor alive, the temporaries of forward and backward among them, after every operator: the
peak of a short batch may lie elsewhere than a long one's, where attention that keeps T x T weights outgrows the rest,
so each moment has a growth of its own.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gradvar.gradients.batches import Batch, last_hidden, make_batches
from gradvar.gradients.capture import ParameterTaps, Taps
from gradvar.gradients.checkpointing import checkpointed
from gradvar.gradients.job import Job
from gradvar.gradients.plan import Block
from gradvar.gradients.resident import blocks_apart

_PROBE_LENGTH = {"cpu": 32, "cuda": 256}
"""Tokens of the longest probe, at most: kernels of a GPU fill up blocks of many tokens."""
_REACH = 128
"""Tokens that the testing probe goes beyond, at least: the chunk of gated delta rules, 64, is in no configuration."""
_TOLERANCE = 1.02
"""What the testing probe may take of what was foretold."""
_STEPS = ("chunk", "window", "block_size")
"""Parts of names under which configurations hold lengths beyond which a model takes memory differently."""
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class Growth:
    """c + B (a T + b T^2) for B rows of T tokens; of several, M, the largest."""

    constant: NDArray[np.float64]
    """(M,) c."""
    linear: NDArray[np.float64]
    """(M,) a."""
    square: NDArray[np.float64]
    """(M,) b."""

    @classmethod
    def through(cls, points: Sequence[tuple[int, ArrayLike]], rows: int = 1) -> Growth:
        """Return the growth through three points (T, value or values) of batches of `rows` rows; no part is negative.

        Where the three have not the same number of values, the largest of each is taken.
        """
        (t, x), (u, y), (v, z) = ((tokens, np.atleast_1d(np.asarray(value, dtype=float))) for tokens, value in points)
        if not x.shape == y.shape == z.shape:
            x, y, z = (values.max(keepdims=True) for values in (x, y, z))
        square = np.maximum(0.0, ((z - y) / (v - u) - (y - x) / (u - t)) / (v - t))
        linear = np.maximum(0.0, (z - y) / (v - u) - square * (u + v))
        constant = np.maximum(0.0, z - linear * v - square * v**2)
        parts = np.unique(np.stack([constant, linear / rows, square / rows]), axis=1)
        return cls(constant=parts[0], linear=parts[1], square=parts[2])

    def at(self, tokens: int, rows: int = 1) -> float:
        """Return the value for a batch."""
        return float((self.constant + rows * (self.linear * tokens + self.square * tokens**2)).max())


@dataclass(frozen=True, kw_only=True)
class Flop:
    """Multiplications and additions of a batch, without the head's."""

    forward: Growth
    backward: Growth


class OverLimitError(Exception):
    """A run holds more bytes than it may."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made inside and still alive; those from outside are not counted.

    Args:
        limit: The operator behind which more than that is alive raises `OverLimitError`.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit = limit
        self.now = 0
        self.peak = 0
        self.after: list[int] = []
        """What `now` was after each operator."""
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it made."""
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            self._see(value, 0)  # from outside, unless known: its views are nothing new
        output = func(*args, **kwargs)
        for value in tree_leaves(output):
            self._see(value, 1)
        self.after.append(self.now)
        if self.now > self._limit:
            raise OverLimitError
        return output

    def _see(self, value: object, count: int) -> None:
        if not isinstance(value, Tensor) or value.is_meta:
            return
        storage = value.untyped_storage()
        name, size = storage._cdata, count * storage.nbytes()
        if name in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._alive.pop(name, None)

        self._alive[name] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_bytes(
    job: Job, blocks: Sequence[Block] | None, kind: str, token_budget: int, limit: float = math.inf
) -> Growth:
    """Return the most bytes alive at one time in a batch's forward and backward, the model's own weights left out.

    What was found is kept for the model's next request.

    Args:
        job: The request.
        blocks: What is tapped, None for all targets: backward ends at the lowest.
        kind: Checkpointing: "off", "reentrant" or "non_reentrant".
        token_budget: Padded tokens of a batch: where batches are padded, attention keeps more.
        limit: Bytes that a probe longer than `_PROBE_LENGTH` may take. None is longer than the longest response.

    Raises:
        OverLimitError: One takes more.
    """

    def watch(run: _Run) -> tuple[ArrayLike, ...]:
        with LiveBytes(run.limit) as live:
            run.back(run.forth())
        return (live.after,)

    found: Growth = _probe(job, blocks, kind, token_budget, watch, limit)[0]
    return found


def flop(job: Job, blocks: Sequence[Block] | None, kind: str, token_budget: int) -> Flop:
    """Return the FLOP of a batch; arguments as in `peak_bytes`."""

    def watch(run: _Run) -> tuple[ArrayLike, ...]:
        with counter() as forward:  # it holds on to tensors: bytes are watched in a run of their own
            hidden = run.forth()
        with counter() as backward:
            run.back(hidden)
        return forward.get_total_flops(), backward.get_total_flops()

    forward, backward = _probe(job, blocks, kind, token_budget, watch)
    return Flop(forward=forward, backward=backward)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A short batch to send forward and back."""

    job: Job
    batch: Batch
    limit: float
    """Bytes that it may take."""

    def forth(self) -> Tensor:
        with self.job.autocast.on():
            return last_hidden(self.job.head.base, self.batch)

    def back(self, hidden: Tensor) -> None:
        if hidden.requires_grad:
            torch.autograd.backward(hidden, torch.ones_like(hidden))


def _probe(
    job: Job,
    blocks: Sequence[Block] | None,
    kind: str,
    token_budget: int,
    watch: Callable[[_Run], tuple[ArrayLike, ...]],
    limit: float = math.inf,
) -> list[Growth]:
    """Return how each number that `watch` reads off a run grows with the tokens; what passes the limit is kept too."""
    long = max(6, min(_PROBE_LENGTH.get(job.device.type, _PROBE_LENGTH["cpu"]), max(job.lengths)))
    further = _further(job, long)
    batches = job.batches(token_budget)
    packed = any(batch.packed for batch in batches)
    rows = 2 if any(batch.attention_mask is not None for batch in batches) else 1
    paths, parameters = job.tapped_paths(blocks), job.direct_parameters(blocks)
    attention = getattr(getattr(job.model, "config", None), "_attn_implementation", None)
    state = (attention, job.autocast, job.dtype, job.padding_side, job.device)
    key = (watch.__qualname__, paths, tuple(parameters), kind, long, further, rows, packed, state)
    known = _known.setdefault(job.model, {})
    if key in known:
        found: list[Growth] = known[key]
        return found
    if (key, limit) in known:
        raise OverLimitError
    word = job.prompt[-1:]
    modules = {path: job.model.get_submodule(path) for path in paths}

    def values(length: int, taps: Taps) -> tuple[ArrayLike, ...]:
        sequences = [word * length, word * (length - 1)][:rows]
        if packed:  # two that make up the length together
            sequences = [word * (length - length // 2), word * (length // 2)]
        (batch,) = make_batches(word, sequences, rows * length, job.device, job.padding_side, packed)
        taps.listen(lambda path, value, gradient: None)
        return watch(_Run(job=job, batch=batch, limit=limit if length > long else math.inf))

    try:
        with blocks_apart(job.device.type == "cpu"), job.autocast.off(), checkpointed(job.model, kind), \
                Taps(modules) as taps, ParameterTaps(parameters):  # fmt: skip
            values(3, taps)  # the first holds the checks of each module
            seen = [(length, values(length, taps)) for length in (max(3, long // 4), max(4, long // 2), long)]
            growths = _fitted(seen, rows)
            if further:
                seen.append((further[0], values(further[0], taps)))
                foretold = ((value, one.at(further[0], rows)) for value, one in _pairs(seen[-1], growths))
                if any(np.max(value) > _TOLERANCE * told for value, told in foretold):
                    seen += [(length, values(length, taps)) for length in further[1:]]
                    growths = _fitted(seen[-3:], rows)
    except OverLimitError:
        known[key, limit] = None
        raise
    known[key] = growths
    return growths


def _fitted(seen: Sequence[tuple[int, tuple[ArrayLike, ...]]], rows: int) -> list[Growth]:
    """Return the growth of each of the numbers through three probes."""
    return [Growth.through([(length, values[i]) for length, values in seen], rows) for i in range(len(seen[0][1]))]


def _pairs(probe: tuple[int, tuple[ArrayLike, ...]], growths: Sequence[Growth]) -> Iterator[tuple[ArrayLike, Growth]]:
    return zip(probe[1], growths, strict=True)


def _further(job: Job, long: int) -> tuple[int, ...]:
    """Return the lengths of the testing probe and of those behind it; none is longer than the longest response.

    Each is one token into a chunk, which is paid for whole: what is read off is never less than what lies between.
    """
    longest = max(job.lengths)
    reach = max([_REACH, *(step for step in _steps(job) if step < longest)])
    first = reach + 1 if longest > reach else longest // long * long  # the same for many prompts
    if longest <= reach:
        return (first,) if first > long else ()
    return tuple(sorted({first, min(longest, 2 * reach + 1), min(longest, 3 * reach + 1)}))


def _steps(job: Job) -> list[int]:
    """Return the chunks, windows and blocks that the model's configuration names."""
    config: Any = getattr(job.model, "config", None)
    if config is None:
        return []
    named = {**vars(config), **vars(config.get_text_config())}
    return [
        value for name, value in named.items()
        if type(value) is int and value > 0 and any(step in name for step in _STEPS)
    ]  # fmt: skip


def counter() -> FlopCounterMode:
    """Return a counter that knows attention on the CPU, shared heads and packed sequences too: older torch does not."""
    operators = torch.ops.aten
    known: dict[Any, Any] = {}
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        for ending, formula in (("", _attention_flop), ("_backward", _attention_backward_flop)):
            operator = getattr(operators, f"_scaled_dot_product_{name}{ending}", None)
            if operator is not None:
                known[operator] = formula
    packed = getattr(torch.ops.torch_attn, "_varlen_attn", None)  # known once it was imported
    if packed is not None:
        known[packed] = _packed_flop
        known[torch.ops.torch_attn._varlen_attn_backward] = _packed_backward_flop
    return FlopCounterMode(display=False, custom_mapping=known)


def _attention_flop(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the FLOP of attention, causality left out as torch leaves it out; arguments are shapes (B, H, T, D)."""
    (rows, heads, length, width), seen = query, key[2]
    return int(2 * rows * heads * length * seen * (width + value[3]))


def _attention_backward_flop(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    (rows, heads, length, width), seen = query, key[2]
    return int(2 * rows * heads * length * seen * (3 * width + 2 * value[3]))


def _packed_flop(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *args: Any, **kwargs: Any) -> int:
    """Return the FLOP of attention over packed sequences: (T, H, D) tensors, (sequences + 1,) where each begins."""
    squares = int(starts.long().diff().square().sum())
    return 2 * query.shape[1] * squares * (query.shape[2] + value.shape[2])


def _packed_backward_flop(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, starts: Tensor,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    squares = int(starts.long().diff().square().sum())
    return 2 * query.shape[1] * squares * (3 * query.shape[2] + 2 * value.shape[2])


_packed_flop._get_raw = _packed_backward_flop._get_raw = True  # type: ignore[attr-defined]
"""The counter hands them the tensors, not their shapes."""
