"""The layers below the lowest target, the trunk, see the prompt once and not once for each response.

They carry no graph, and in a causal model their states over the prompt do not depend on what follows it: the prompt is
run once and its keys and values are kept, each response then runs behind them, and the layers from the lowest target
up run on whole sequences as ever. Whether a model gives the same last hidden states this way is found by a probe; where
it does not, or where little would be saved, whole sequences run through all layers.

Shape letters: B sequences of a batch, T their padded length, Q prompt tokens, D hidden width.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradvar.errors import GradvarError
from gradvar.gradients.batches import Batch, Probe, last_hidden, make_batches
from gradvar.gradients.devices import input_device
from gradvar.gradients.positions import chosen_keys, turns_with_length
from gradvar.gradients.request import is_half, other_start, same_states
from gradvar.gradients.targets import decoder_layers

Forward = Callable[[Batch], Tensor]
"""Batch to (B, T, D) last hidden states."""

LEAST_SAVING = 0.1
"""Share of the fed tokens that must be spared before the prompt is shared."""
_PROBE_PROMPT = 16
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], int]] = weakref.WeakKeyDictionary()
"""Bytes that a token of the trunk takes, found before: they hang on the model's form, not on its weights."""


def choose_forward(
    model: nn.Module,
    base: nn.Module,
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    lowest: int | None,
    *,
    measured: Iterable[nn.Module],
    batches: Sequence[Batch],
    spare_bytes: int,
    between_bytes: int,
    probe: Probe | None = None,
) -> Forward:
    """Return how a batch's last hidden states are had: with the trunk shared where that is the same and saves work.

    Args:
        model: The causal language model, held ready.
        base: Its inner model.
        prompt: The prompt that all responses follow.
        responses: The responses.
        lowest: Index of the lowest decoder layer that is measured; None where something below the layers is.
        measured: The modules that are measured: where one also runs below, its part there would be lost.
        batches: What will be run, in that order.
        spare_bytes: What the trunk may take beside a whole sequence's run.
        between_bytes: What it may take while no batch's graph is alive.
        probe: A short batch, where one was run.
    """
    if lowest is None or not _saves(model, base, prompt, responses, lowest):
        return lambda batch: last_hidden(base, batch)
    layers = [layer for _, layer in decoder_layers(model)]
    if not _same(base, layers, lowest, prompt, responses, measured, probe):
        return lambda batch: last_hidden(base, batch)
    trunk = Trunk(base, layers, lowest, prompt)
    tokens = max(batch.input_ids.numel() for batch in batches)
    if trunk.extra_bytes(tokens) > spare_bytes:
        return lambda batch: last_hidden(base, batch)
    trunk.look_ahead(batches, tokens, between_bytes)
    return trunk


def trunk_bytes(
    model: nn.Module, base: nn.Module, prompt: Sequence[int], responses: Sequence[Sequence[int]], lowest: int | None
) -> tuple[int, int]:
    """Return the bytes that sharing the prompt would take at most: (fixed, a padded token of the largest batch).

    Both are 0 where it saves little or cannot be; arguments as in `choose_forward`.
    """
    if lowest is None or not _saves(model, base, prompt, responses, lowest):
        return 0, 0
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    device = input_device(model)
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    key = (lowest, attention, autocast, next(model.parameters()).dtype)
    known = _known.setdefault(model, {})
    if key not in known:
        try:
            trunk = Trunk(base, [layer for _, layer in decoder_layers(model)], lowest, prompt[-_PROBE_PROMPT:])
        except _APART:
            return 0, 0
        known[key] = trunk.extra_bytes(1) - trunk.extra_bytes(0)
    return len(prompt) * known[key] // 2, known[key]


_APART = (AttributeError, GradvarError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model raises whose layers cannot be run apart."""


def _saves(
    model: nn.Module, base: nn.Module, prompt: Sequence[int], responses: Sequence[Sequence[int]], lowest: int
) -> bool:
    fed = sum(len(prompt) + len(response) - 1 for response in responses)
    saving = len(prompt) * (len(responses) - 1) / fed
    # not on a GPU: there rows are packed, which keeps no keys and values by sequence; padded, queries behind kept keys
    # need a mask, which leaves the flash kernels and takes (tokens x tokens) bytes for what is mostly a small saving
    on_cpu = input_device(model).type == "cpu"
    # what is behind the prompt runs in groups there, of several lengths
    longest = len(prompt) + max(map(len, responses)) - 1
    by_length = turns_with_length(base) or longest > chosen_keys(model)
    return lowest > 0 and saving >= LEAST_SAVING and on_cpu and not by_length


def _same(
    base: nn.Module,
    layers: Sequence[nn.Module],
    lowest: int,
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    measured: Iterable[nn.Module],
    probe: Probe | None,
) -> bool:
    """Return whether the prompt's end, run once, gives the last hidden states of a plain forward.

    No measured module may run on the way to the lowest layer.
    """
    below: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, args: below.append(module)) for module in measured]
    try:
        if probe is None or any(probe.batch.firsts):
            short, other = prompt[-_PROBE_PROMPT:], responses[0]
            (batch,) = make_batches(short, [[other[0]] * 5, [other[-1]] * 2], 10_000, input_device(base))
            probe = Probe(prompt=tuple(short), batch=batch, hidden=last_hidden(base, batch))
            below.clear()
        batch = probe.batch
        trunk = Trunk(base, layers, lowest, probe.prompt)
        if below:
            return False
        shared, plain = trunk(batch).double(), probe.hidden.double()
        moved = last_hidden(base, other_start(batch)).double() if is_half(base) else plain
        reach = (moved - plain)[0, 1:]
        return same_states(shared.flatten(0, 1)[batch.real], plain.flatten(0, 1)[batch.real], reach, base)
    except _APART:
        return False
    finally:
        for hook in hooks:
            hook.remove()


class Trunk:
    """Last hidden states of batches behind one prompt; the layers below `lowest` see that prompt once.

    Args:
        base: The inner model.
        layers: Its decoder layers, in the order they run.
        lowest: Index of the first one that runs on whole sequences, at least 1.
        prompt: Token ids of the prompt.

    Raises:
        GradvarError: A layer hands on more than hidden states, or the model keeps no keys and values.
    """

    def __init__(self, base: nn.Module, layers: Sequence[nn.Module], lowest: int, prompt: Sequence[int]) -> None:
        self._base = base
        self._below, self._above = list(layers[:lowest]), list(layers[lowest:])
        self._length = len(prompt)
        self._tuples = [False] * len(layers)
        self._order: list[Batch] = []
        self._at_once = (0, 0)
        self._behind: dict[Batch, Tensor] = {}
        ids = torch.tensor([list(prompt)], device=input_device(base))
        with torch.no_grad(), self._noting_forms():
            self._prompt, self._cache = self._run_below(ids)
        if not hasattr(self._cache, "batch_repeat_interleave"):
            raise GradvarError(f"{type(base).__name__} keeps no keys and values that could be repeated")

    def __call__(self, batch: Batch) -> Tensor:
        """Return the (B, T, D) last hidden states of a batch padded on the right; graphs start above the trunk."""
        if batch.packed or any(batch.firsts):
            return last_hidden(self._base, batch)
        rows, length = batch.input_ids.shape
        states = self._prompt.expand(rows, -1, -1)
        if length > self._length:
            if batch not in self._behind:
                self._run_behind(self._group(batch))
            states = torch.cat([states, self._behind.pop(batch)], dim=1)

        def replaced(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        hook = self._above[0].register_forward_pre_hook(replaced, with_kwargs=True)
        try:
            with self._passing(self._below):
                return last_hidden(self._base, batch)
        finally:
            hook.remove()

    def look_ahead(self, batches: Sequence[Batch], tokens: int, room: int) -> None:
        """Be told what is asked for in turn: several batches' tokens behind the prompt may run in one go.

        A batch within a budget of tokens has few of them where the prompt is long, and every run costs the layers'
        weights brought once.

        Args:
            batches: The batches in their order.
            tokens: Padded tokens behind the prompt that may run in one go.
            room: Bytes that it may take.
        """
        self._order = list(batches)
        self._at_once = (tokens, room)

    def _group(self, batch: Batch) -> list[Batch]:
        """Return the batch and those after it that run with it."""
        found, (most, room) = [batch], self._at_once
        start = self._order.index(batch) + 1 if batch in self._order else len(self._order)
        for other in self._order[start:]:
            rows = sum(len(one.input_ids) for one in [*found, other])
            longest = max(one.input_ids.shape[1] for one in [*found, other])
            fits = rows * (longest - self._length) <= most and self.extra_bytes(rows * longest) <= room
            if other.packed or any(other.firsts) or other.input_ids.shape[1] <= self._length or not fits:
                break
            found.append(other)
        return found

    def _run_behind(self, group: Sequence[Batch]) -> None:
        """Keep the states at the lowest layer behind the prompt, for each batch of a group."""
        longest = max(batch.input_ids.shape[1] for batch in group)
        shapes = [batch.input_ids.shape for batch in group]
        ids = torch.cat([functional.pad(batch.input_ids, (0, longest - batch.input_ids.shape[1])) for batch in group])
        masks = [
            functional.pad(
                torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask,
                (0, longest - batch.input_ids.shape[1]),
            )
            for batch in group
        ]
        padded = any(batch.attention_mask is not None or batch.input_ids.shape[1] < longest for batch in group)
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(ids))
        options = {"attention_mask": torch.cat(masks)} if padded else {}
        with torch.no_grad():
            states, _ = self._run_below(ids[:, self._length :], past_key_values=cache, **options)
        parts = torch.split(states, [rows for rows, _ in shapes])
        for batch, part, (_, length) in zip(group, parts, shapes, strict=True):
            self._behind[batch] = part[:, : length - self._length]

    def extra_bytes(self, tokens: int) -> int:
        """Return the bytes of keys, values and states for a batch of so many tokens, one layer's copies among them."""
        kept = [value for layer in self._cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
        a_token = (sum(value.nbytes for value in kept) + self._prompt.nbytes) // self._length + 1
        return (2 * tokens + self._length) * a_token

    def _run_below(self, ids: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """Return what arrives at the lowest layer that is not of the trunk, and the keys and values so far."""
        seen: list[Tensor] = []
        with self._passing(self._above, seen):
            output = self._base(input_ids=ids, use_cache=True, **options)
        return seen[0], output.past_key_values

    @contextmanager
    def _passing(self, layers: Sequence[nn.Module], seen: list[Tensor] | None = None) -> Iterator[None]:
        """Let the layers hand on their hidden states as they are, noted in `seen`."""
        every = [*self._below, *self._above]

        def passing(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden: Tensor = args[0] if args else kwargs["hidden_states"]
                if seen is not None:
                    seen.append(hidden)
                return (hidden,) if self._tuples[index] else hidden

            return forward

        before = [(layer, layer.__dict__.get("forward")) for layer in layers]
        try:
            for layer in layers:
                layer.forward = passing(every.index(layer))
            yield
        finally:
            for layer, own in before:
                if own is not None:
                    layer.forward = own
                else:
                    layer.__dict__.pop("forward", None)

    @contextmanager
    def _noting_forms(self) -> Iterator[None]:
        """Note whether layers return hidden states or a tuple of them; those not run are like the first."""

        def note(module: nn.Module, args: object, output: object) -> None:
            first, *rest = output if isinstance(output, tuple) else (output,)
            if not isinstance(first, Tensor) or any(value is not None for value in rest):
                raise GradvarError(f"{type(module).__name__} hands on more than hidden states")
            self._tuples[:] = [isinstance(output, tuple)] * len(self._tuples)

        hook = self._below[0].register_forward_hook(note)
        try:
            yield
        finally:
            hook.remove()
