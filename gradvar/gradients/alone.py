"""One response run alone by the model's own code, what the engine captures of it held against plain autograd.

The tokens predicted are others than those fed: where the model is sure of what it sampled, all gradients are rounding.

Shape letters: M tokens predicted, T tokens fed, D hidden width, K vectors.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradvar.errors import GradvarError
from gradvar.gradients.batches import Batch, make_batches
from gradvar.gradients.capture import ParameterTaps, Sink, Taps, has_gradient_hooks, hooked
from gradvar.gradients.collect import Predictions, collector, predictions
from gradvar.gradients.devices import is_offloaded
from gradvar.gradients.gram import GradientStore, piece
from gradvar.gradients.job import Job
from gradvar.gradients.plan import Block

_ROUNDINGS = {8: 1e-7, 4: 1e-3, 2: 0.05}
"""By bytes of the dtype: relative gap of autograd's gradient and the captured one that rounding makes, and more."""
_TERM_ROUNDINGS = {8: 1e-12, 4: 1e-5, 2: 0.03}
"""The same relative to its terms, token by token: they may cancel (the bias of keys)."""
_HEAD_ROUNDINGS = {8: 1e-5, 4: 1e-2, 2: 0.25}
"""The same of the gradient at the last hidden states: softmax turns roundings of logits into relative ones."""


def make_alone(job: Job, chosen: int, start: int, stop: int) -> tuple[Job, Batch]:
    """Return the job of tokens [start, stop) of one response behind all before them, others to predict, and its batch.

    The tokens fed are the response's own.
    """
    response, mask = job.responses[chosen], job.masks[chosen][start:stop]
    alone = replace(
        job,
        prompt=[*job.prompt, *response[:start]],
        responses=[response[start:stop]],
        masks=[mask if any(mask) else [1] * (stop - start)],
        ids=(job.ids[chosen],),
        packed=False,
    )
    (batch,) = make_batches(alone.prompt, alone.responses, 1, alone.device)
    size = job.head.shape()[0]
    return replace(alone, responses=[[(token + size // 2) % size for token in alone.responses[0]]]), batch


def hold_against_autograd(
    job: Job, batch: Batch, stores: Sequence[tuple[Block, GradientStore]], room: int, watch: Sink
) -> Tensor:
    """Run a job of one response, its captured gradients held against autograd's; return (1, T, D) last hidden states.

    Args:
        job: The response alone.
        batch: Its tokens.
        stores: Where its gradients go.
        room: Bytes that a parameter's gradient may take.
        watch: Sees what the stores are given.

    Raises:
        GradvarError: The log-probabilities are not those of the model's own logits, or a gradient is not autograd's.
    """
    sink = collector(job, batch, [0], stores)
    held = _Autograd(job, stores, room)
    modules = {path: job.model.get_submodule(path) for path in job.tapped_paths([block for block, _ in stores])}

    def keep(path: str, a: Tensor, delta: Tensor) -> None:
        sink(path, a, delta)
        held.note(path, a, delta)
        watch(path, a, delta)

    with Taps(modules) as taps, ParameterTaps(held.parameters) as direct, torch.enable_grad():
        taps.listen(keep)
        direct.listen(held.compare)
        logprobs, hidden = _own_logprobs(job, batch, len(job.responses[0]))
        taps.listen(lambda path, a, delta: None)  # the model's own head may run once more, adapters in it too
        seen = predictions(job, batch, hidden)
        seen.fill_heads([0], stores)
        taps.listen(keep)
        gradient = _backward(logprobs, seen)
        held.compare_silent(set(direct.silent()))
    _compare_head(job, logprobs.detach(), gradient, seen)
    held.refuse()
    return hidden.detach()


def _own_logprobs(job: Job, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """Return (M,) log-probabilities from the model's own logits, with their graph, and (1, T, D) last hidden states."""
    states: list[Tensor] = []
    keeps = "logits_to_keep" in inspect.signature(job.model.forward).parameters

    def at_base(module: nn.Module, args: object, output: Any) -> Any:
        hidden = output.last_hidden_state
        # another tensor: its gradient is looked at, and states that carry no graph have one too
        states.append(hidden if hidden.requires_grad else hidden.detach().requires_grad_())
        kept = states[-1] if keeps else states[-1][:, -count:]  # logits of so many positions alone
        return type(output)(**{**output, "last_hidden_state": kept})

    options = {"logits_to_keep": count} if keeps else {}
    hook = job.head.base.register_forward_hook(at_base)
    try:
        with job.autocast.on():
            logits: Tensor = job.model(input_ids=batch.input_ids, use_cache=False, **options).logits[0]
    finally:
        hook.remove()
    if not states or len(logits) != count:
        raise GradvarError(
            f"{type(job.model).__name__} gives logits of another form for a response than for a probe: expected one "
            "for each token"
        )
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    logp = (wide / job.temperature).log_softmax(-1)
    tokens = torch.tensor(job.responses[0], device=logp.device)
    return logp.gather(1, tokens[:, None])[:, 0], states[0]


def _backward(logprobs: Tensor, seen: Predictions) -> Tensor:
    """Send the sum of the log-probabilities back; return its gradient (M, D) at the predicting states."""
    kept: list[Tensor] = []
    hook = seen.hidden.register_hook(kept.append)  # type: ignore[no-untyped-call]
    try:
        torch.autograd.backward((logprobs * seen.weights.to(logprobs.device, logprobs.dtype)).sum())
    finally:
        hook.remove()
    return kept[0].reshape(-1, kept[0].shape[-1])[seen.where]


def _compare_head(job: Job, logprobs: Tensor, gradient: Tensor, seen: Predictions) -> None:
    """Refuse a model whose logits are not what is made of its last hidden states."""
    own = seen.scores.logprobs.to(logprobs.device, logprobs.dtype)
    size = narrowest_bytes(job, gradient)
    # a token that the vocabulary's padding or a mask rules out is -inf for both
    gap = float((own - logprobs).abs().nan_to_num(nan=0.0, posinf=float("inf")).max())
    largest = float(logprobs.masked_fill(logprobs.isinf(), 0.0).abs().max())
    wide = seen.scores.hidden_gradient.to(gradient.device).double()
    off = float((gradient.double() - wide).norm() / wide.norm())
    limit = _HEAD_ROUNDINGS[size]
    if gap > limit * (1 + largest) or off > limit:
        hooks = hooked(job.model, job.head.base)
        raise GradvarError(
            f"response {job.ids[0]}: log-probabilities from the last hidden states are up to {gap:.3g} nats from those "
            f"of {type(job.model).__name__}'s own logits, their gradient {off:.2g} of its size: the model does more "
            f"to its logits than the last hidden states tell{hooks}"
        )


class _Autograd:
    """Holds what the stores captured of one response against autograd's own gradient of the parameters."""

    def __init__(self, job: Job, stores: Sequence[tuple[Block, GradientStore]], room: int) -> None:
        self._job = job
        self.parameters: dict[str, nn.Parameter] = {}
        self._stores: dict[str, list[tuple[Block, GradientStore]]] = {}
        self._wrong: dict[str, float] = {}
        self._terms: dict[str, float] = {}
        places = Counter(map(id, (module for _, module in job.model.named_modules(remove_duplicate=False))))
        for block, store in stores:
            module = job.model.get_submodule(block.target.module)
            if is_offloaded(module):
                job.unheld[block.target.key] = "offloaded: each call has another tensor in its weight's place"
                continue
            if job.plan.checkpointing == "reentrant" and places[id(module)] > 1:
                job.unheld[block.target.key] = "in several places under reentrant checkpointing: its parts come apart"
                continue
            for name in ("weight", "bias"):
                parameter = module._parameters.get(name)
                if parameter is None or (name == "bias" and not (job.extra.include_bias and block.target.has_bias)):
                    continue
                if has_gradient_hooks(parameter):
                    job.unheld[block.target.key] = "hooks on its gradient (an optimizer in backward?), which would run"
                elif parameter.nbytes > room:
                    job.unheld[block.target.key] = (
                        f"no room for its gradient of {parameter.nbytes} bytes beside a batch"
                    )
                else:
                    self.parameters[f"{block.target.module}.{name}"] = parameter
                    self._stores.setdefault(f"{block.target.module}.{name}", []).append((block, store))

    def note(self, path: str, a: Tensor, delta: Tensor) -> None:
        """Note how large the terms of a module's gradients are."""
        squares = _squares(delta)
        inputs = _squares(a.detach()).to(delta.device) if a.is_floating_point() else torch.ones_like(squares)
        for kind, size in (("weight", squares @ inputs), ("bias", squares.sum())):
            self._terms[f"{path}.{kind}"] = self._terms.get(f"{path}.{kind}", 0.0) + float(size)

    def compare(self, name: str, gradient: Tensor | None) -> None:
        """Compare a parameter's gradient; None is zero."""
        kind = name.rpartition(".")[2]
        for block, store in self._stores[name]:
            module = self._job.model.get_submodule(block.target.module)
            gap = size = 0.0
            for start, stop in _pieces(store, store.rows):
                if kind == "bias":
                    own = store.bias_gradient(0)[start:stop].clone()
                else:
                    own = torch.empty((stop - start, store.columns), dtype=store.dtype, device=store.device)
                    store.fill(0, start, stop, own)
                rows = slice(block.start + start, block.start + stop)
                size += float(torch.linalg.vector_norm(own)) ** 2
                if gradient is not None:
                    flat = gradient.flatten() if kind == "bias" else gradient
                    own -= (flat.T if isinstance(module, Conv1D) and kind == "weight" else flat)[rows].to(own.device)
                gap += float(torch.linalg.vector_norm(own)) ** 2
            width = narrowest_bytes(self._job, self.parameters[name])
            if width == 2 and gradient is not None and not gradient.isfinite().all():
                gap = 0.0  # float16 of autograd's own overflowed; ours is kept in float32
            terms = self._terms.get(name, 0.0)
            if gap > _ROUNDINGS[width] ** 2 * size + _TERM_ROUNDINGS[width] ** 2 * terms:
                self._wrong[block.target.key] = (gap / size) ** 0.5 if size else math.inf
            if kind == "weight":
                store.forget(0)

    def compare_silent(self, names: set[str]) -> None:
        """Compare parameters that autograd found no use of."""
        for name in names:
            self.compare(name, None)

    def refuse(self) -> None:
        """Refuse targets whose gradient was not captured whole.

        Raises:
            GradvarError: There is one.
        """
        if self._wrong:
            key, gap = next(iter(self._wrong.items()))
            path = key.partition(":")[0]
            module = self._job.model.get_submodule(path)
            said = f"{gap:.2g} of its size from" if gap < math.inf else "nothing beside"
            raise GradvarError(
                f"{key} ({type(module).__name__}): the gradient captured at its calls is {said} "
                "autograd's, so it cannot be measured: its weight is used outside its module's call too, or the "
                f"module does not compute x W' + b with its own weight{hooked(module)}; choose other targets"
            )


def narrowest_bytes(job: Job, tensor: Tensor) -> int:
    """Return the bytes of the narrowest dtype that is computed in."""
    kinds = [tensor.dtype, job.dtype, *([job.autocast.dtype] if job.autocast.dtype is not None else [])]
    return min(kind.itemsize for kind in kinds)


def _squares(values: Tensor) -> Tensor:
    """Return (K,) float64 squared norms of the K vectors, no float64 copy of them all made."""
    flat = values.reshape(-1, values.shape[-1])
    parts = torch.split(flat, max(1, piece(values.device) // flat.shape[1]))
    return torch.cat([part.double().square().sum(-1) for part in parts])


def _pieces(store: GradientStore, rows: int) -> Iterator[tuple[int, int]]:
    height = max(1, piece(store.device) // store.columns)
    for start in range(0, rows, height):
        yield start, min(start + height, rows)
