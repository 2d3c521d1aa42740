"""What a planned measurement would take: memory and arithmetic, from the plan and two short runs of the model.

Bytes kept for backward and FLOP of a sequence of T tokens are a T + b T^2; a and b are read off two probes of a few
tokens, so they hold for any architecture, attention implementation and checkpointing. Everything else is arithmetic.

Shape letters: N responses, T tokens fed, L response tokens, D hidden width, V vocabulary, R rows and I columns of a
block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from gradvar.gradients.batches import last_hidden, make_batches
from gradvar.gradients.capture import ParameterTaps, Taps
from gradvar.gradients.checkpointing import choose_checkpointing
from gradvar.gradients.logprobs import chunk_bytes
from gradvar.gradients.passes import Job, direct_parameters, prepared, tapped_paths
from gradvar.gradients.plan import Cost, Plan
from gradvar.gradients.reweighted import check_counts
from gradvar.gradients.targets import decoder_layers

_PROBE_LENGTH = 32


def plan_measurement(
    model: nn.Module,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    targets: str | Sequence[str],
    *,
    loss_masks: Sequence[Sequence[int] | None] | None = None,
    token_budget: int | None = None,
    memory_budget: int | None = None,
    rollout_ids: Sequence[int] | None = None,
    probes: int = 0,
    prefixes: int = 0,
    padding_side: str = "right",
    checkpointing: str | None = None,
) -> Plan:
    """Return how `measure_scores` would split this work, with what it would take in `Plan.cost`.

    Nothing is measured: only probes of a few tokens are run. Arguments as in `measure_scores`; of the responses only
    the lengths matter.

    Raises:
        GradvarError: The request does not fit the model or the budget, as in `measure_scores`.
    """
    check_counts(probes, prefixes, 0)
    kind = choose_checkpointing(model, checkpointing)
    usage: list[list[_Usage]] = []
    for each in dict.fromkeys((kind, "off")):
        with prepared(
            model,
            prompt_ids,
            responses,
            targets,
            loss_masks=loss_masks,
            token_budget=token_budget,
            memory_budget=memory_budget,
            rollout_ids=rollout_ids,
            padding_side=padding_side,
            checkpointing=each,
        ) as job:
            usage.append(_probe_passes(job))
            if each == kind:
                measured = job
    return replace(measured.plan, cost=_cost(measured, usage[0], usage[-1], probes + max(0, prefixes - 1)))


@dataclass(frozen=True, kw_only=True)
class _Growth:
    """a T + b T^2 for one sequence of T tokens."""

    linear: float
    square: float

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> _Growth:
        """Return the growth through two points (T, value); the square part is not negative."""
        (t, x), (u, y) = points
        square = max(0.0, (y / u - x / t) / (u - t)) if u > t else 0.0
        return cls(linear=y / u - square * u, square=square)

    def at(self, tokens: int) -> float:
        return self.linear * tokens + self.square * tokens**2


@dataclass(frozen=True, kw_only=True)
class _Usage:
    saved: _Growth
    """Bytes that a sequence's graph keeps between forward and backward."""
    forward: _Growth
    """FLOP of a sequence, without the head's."""
    backward: _Growth


class _Kept:
    """Bytes that stay in memory between forward and backward: each storage once, parameters not at all."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[int, Tensor] = {}  # held, so that no address is used twice
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(self, value: Tensor) -> Tensor:
        address = value.untyped_storage().data_ptr()
        if address not in self._weights:
            self._seen.setdefault(address, value)
        return value

    def sink(self, path: str, value: Tensor, gradient: Tensor) -> None:
        """Keep the input of a tapped module's call."""
        self.keep(value)

    @property
    def total(self) -> int:
        return sum(value.untyped_storage().nbytes() for value in self._seen.values())


def _probe_passes(job: Job) -> list[_Usage]:
    """Return the usage of each pass: backward ends at its own lowest target."""
    chosen = [(tuple(tapped_paths(job, blocks)), direct_parameters(job, blocks)) for blocks in job.plan.passes]
    names = [(paths, tuple(parameters)) for paths, parameters in chosen]
    found = {name: _probe(job, *chosen[names.index(name)]) for name in dict.fromkeys(names)}
    return [found[name] for name in names]


def _probe(job: Job, paths: Sequence[str], parameters: Mapping[str, nn.Parameter]) -> _Usage:
    """Run short sequences of two lengths forward and back, the targets tapped as in the measurement.

    Where the measurement pads, the probe does: with a mask, attention keeps more.
    """
    device = next(job.model.parameters()).device
    fed = max(len(job.prompt) + len(response) - 1 for response in job.responses)
    long = max(6, min(_PROBE_LENGTH, fed))
    word = job.prompt[-1:]
    planned = make_batches(job.prompt, job.responses, job.plan.token_budget, device, job.padding_side)
    padded = any(batch.attention_mask is not None for batch in planned)
    rows: list[tuple[Any, ...]] = []
    modules = {path: job.model.get_submodule(path) for path in paths}
    with job.autocast.off(), Taps(modules) as taps, ParameterTaps(parameters):
        for length in (3, long // 2, long):  # the first is not counted: it holds the checks of each module
            kept = _Kept(job.model)
            inputs = kept if job.plan.checkpointing != "reentrant" else _Kept(job.model)  # made again at backward
            taps.listen(inputs.sink)
            sequences = [word * length, word * (length - 1)] if padded else [word * length]
            (batch,) = make_batches(word, sequences, len(sequences) * length, device, job.padding_side)
            keep = torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda value: value)
            with _counter() as forward, keep, job.autocast.on():
                hidden = last_hidden(job.head.base, batch)
            with _counter() as backward:
                if hidden.requires_grad:
                    torch.autograd.backward(hidden, torch.ones_like(hidden))
            totals = (kept.total, forward.get_total_flops(), backward.get_total_flops())
            rows.append((length, *(total / len(sequences) for total in totals)))
    saved, forth, back = ([(row[0], row[i]) for row in rows[1:]] for i in (1, 2, 3))
    return _Usage(saved=_Growth.through(saved), forward=_Growth.through(forth), backward=_Growth.through(back))


def _counter() -> FlopCounterMode:
    """Return a counter that knows the attention operators of the CPU too."""
    operators = torch.ops.aten

    def forth(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def back(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]

    known = {
        operators._scaled_dot_product_flash_attention_for_cpu: forth,
        operators._scaled_dot_product_flash_attention_for_cpu_backward: back,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def _cost(job: Job, usage: Sequence[_Usage], plain: Sequence[_Usage], extra: int) -> Cost:
    """Return the cost of a job's plan.

    Args:
        job: The request.
        usage: Of the model as it is run, by pass.
        plain: Of the model without checkpointing, by pass.
        extra: Backward passes beside the first.
    """
    n = len(job.responses)
    device = next(job.model.parameters()).device
    batches = make_batches(job.prompt, job.responses, job.plan.token_budget, device, job.padding_side)
    shapes = [tuple(batch.input_ids.shape) for batch in batches]
    predicted = sum(len(response) for response in job.responses)
    vocabulary, width = job.head.shape()
    held = max(
        rows * _held(job, one, off, length)
        for one, off in zip(usage, plain, strict=True)
        for rows, length in shapes
    )  # fmt: skip
    forward = sum(rows * one.forward.at(length) for one in usage for rows, length in shapes)
    backward = sum(rows * one.backward.at(length) for one in usage for rows, length in shapes)
    head = len(job.plan.passes) * 2 * predicted * vocabulary * width
    wide = 8 if job.dtype == torch.float64 else 4
    largest = max(sum(len(job.responses[i]) for i in batch.members) for batch in batches)
    fed = predicted + n * (len(job.prompt) - 1)
    gram = gradients = tallest = 0
    for block in (block for blocks in job.plan.passes for block in blocks):
        tokens = 2 * predicted if block.target.kind == "head" else fed  # the head's logits are made again
        area = (block.stop - block.start) * block.target.in_features
        tallest = max(tallest, n * area * wide)
        gradients += 2 * tokens * area
        gram += 2 * n * n * area
    return Cost(
        batches=len(batches),
        tokens=fed,
        padded_tokens=sum(rows * length for rows, length in shapes),
        kept_bytes=max(sum(block.bytes for block in blocks) for blocks in job.plan.passes),
        tile_bytes=min(job.plan.tile_bytes, tallest),
        activation_bytes=round(held),
        logits_bytes=3 * min(chunk_bytes(device), largest * vocabulary * wide),
        forward_flop=round(forward) + head,
        backward_flop=round((1 + extra) * backward) + head,
        gram_flop=(1 + extra) * gradients + gram,
    )


def _held(job: Job, usage: _Usage, plain: _Usage, length: int) -> float:
    """Return the bytes held at most for one sequence: its graph and, under checkpointing, one layer made again."""
    kept = usage.saved.at(length)
    lowest = min((t.layer for t in job.targets if t.layer is not None), default=-1)
    above = max(1, len(decoder_layers(job.model)) - 1 - (-1 if job.tied is not None else lowest))
    return kept + max(0.0, plain.saved.at(length) - kept) / above
