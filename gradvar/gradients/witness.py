"""One response's beginning, measured by the model's own code and plain autograd: what a pass is held against.

Probes of a few tokens miss what shows in real ones. So before a pass a response of its first batch is cut short and run
alone, its log-probabilities taken from the model's own logits, its gradients from autograd. They must be those of the
engine's own path (a weight used outside its module's call, a module that is not linear in its weight, a head that
reads more than the last hidden states differ here). In the pass, the same response in its batch must show the same
hidden states and inputs of the targets (a batch whose members change each other, or whose tokens a module puts in
another order, differs here); the model is causal, so a beginning is enough for that. What a module does differently
further on alone (another weight from some position on) is not seen: `capture` looks at two rows of its first call.

The tokens predicted are others than those fed: where the model is sure of what it sampled, all gradients are rounding.

Shape letters: M tokens predicted, T tokens fed, D hidden width, O outputs, I inputs, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradvar.errors import GradvarError
from gradvar.gradients.batches import Batch, UnalignedTokensError, make_batches
from gradvar.gradients.capture import ParameterTaps, Sink, Taps, has_gradient_hooks, hooked
from gradvar.gradients.collect import Predictions, collector, new_store, predictions
from gradvar.gradients.devices import is_offloaded
from gradvar.gradients.gram import GradientStore, piece
from gradvar.gradients.job import Job
from gradvar.gradients.plan import Block

_LONGEST = 32
"""Response tokens of the witness, at most."""
_SHORTEST = 8
"""Response tokens that it has where one of the batch has so many."""
_BATCH_ROUNDINGS = {8: 1e-5, 4: 1e-4}
"""By bytes of the dtype: how far a batch may move states, relative to the largest. Some compute in float32 always."""
_BATCH_SHARE = 1 / 8
"""In half precision: part of what differs between tokens."""
_ROUNDINGS = {8: 1e-7, 4: 1e-3, 2: 0.05}
"""By bytes of the dtype: relative gap of autograd's gradient and the captured one that rounding makes, and more."""
_TERM_ROUNDINGS = {8: 1e-12, 4: 1e-5, 2: 0.03}
"""The same relative to its terms, token by token: they may cancel (the bias of keys)."""
_HEAD_ROUNDINGS = {8: 1e-5, 4: 1e-2, 2: 0.25}
"""The same of the gradient at the last hidden states: softmax turns roundings of logits into relative ones."""


@dataclass(kw_only=True, eq=False)
class Witness:
    """What the beginning of one response shows alone."""

    response: int
    """Its index."""
    batch: tuple[int, ...]
    """Members of the batch in which it is looked at."""
    start: int
    """First position that predicts a response token."""
    fed: int
    """T."""
    hidden: Tensor
    """(M, D) last hidden states from `start` on."""
    narrowest: int = 8
    """Bytes of the narrowest dtype that is computed in."""
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """By module path, what went into each call from `start` on, last call first: (M times vectors a token, I)."""

    def watching(self, batch: Batch, sink: Sink) -> Sink:
        """Return the sink of a batch, with the inputs it takes compared on their way.

        The sink raises UnalignedTokensError where they differ.
        """
        if batch.members != self.batch or len(batch.members) == 1:
            return sink
        expected = {path: list(calls) for path, calls in self.inputs.items()}
        row = batch.members.index(self.response)

        def watch(path: str, a: Tensor, delta: Tensor) -> None:
            sink(path, a, delta)
            if expected.get(path):
                alone = expected[path].pop(0)
                own = batch.split(a.detach(), path)[row]
                vectors = len(alone) // len(self.hidden)
                seen = own[self.start * vectors : self.start * vectors + len(alone)]
                if not _same_in_batch(seen, alone, self.narrowest):
                    raise UnalignedTokensError(f"{path} sees other inputs for a response in a batch than alone")

        return watch

    def compare_states(self, batch: Batch, hidden: Tensor, *, plain: bool) -> None:
        """Compare the last hidden states (B, T, D) of the batch.

        Args:
            batch: The batch.
            hidden: Its states.
            plain: Whether the model's own run made them; a single response's are then what they are.

        Raises:
            UnalignedTokensError: The response has others in the batch, or behind a shared prompt, than alone.
        """
        if batch.members != self.batch or (plain and len(batch.members) == 1):
            return
        row = batch.members.index(self.response)
        own = batch.split(hidden.detach(), "the last hidden states")[row]
        if not _same_in_batch(own[self.start : self.start + len(self.hidden)], self.hidden, self.narrowest):
            raise UnalignedTokensError("a batch, or a prompt run apart, changes the hidden states of a response")


def make_witness(job: Job, blocks: Sequence[Block], batches: Sequence[Batch]) -> Witness:
    """Run the beginning of a response alone and hold the engine's path against the model's own and autograd.

    Raises:
        GradvarError: They differ.
    """
    members = _fullest(job, batches)
    long = [i for i in members if len(job.responses[i]) >= _SHORTEST]
    chosen = long[-1] if long else max(members, key=lambda i: len(job.responses[i]))
    width = job.head.shape()[0] * 8
    count = min(len(job.responses[chosen]), _LONGEST, max(2, job.plan.chunk_bytes // width))
    mask = job.masks[chosen][:count]
    alone = replace(
        job,
        responses=[job.responses[chosen][:count]],
        masks=[mask if any(mask) else [1] * count],
        ids=(job.ids[chosen],),
        packed=False,
    )
    (batch,) = make_batches(alone.prompt, alone.responses, 1, alone.device)
    size = job.head.shape()[0]
    alone = replace(alone, responses=[[(token + size // 2) % size for token in alone.responses[0]]])
    witness = Witness(
        response=chosen,
        batch=members,
        start=len(alone.prompt) - 1,
        fed=batch.input_ids.shape[1],
        hidden=torch.empty(0),
        narrowest=_size(job, torch.empty(0, dtype=torch.float64)),
    )
    blocks = [block for block in blocks if block.target.direct is None]
    stores = [(block, new_store(alone, block, 1, None)) for block in blocks]
    sink = collector(alone, batch, [0], stores)
    modules = {path: job.model.get_submodule(path) for path in job.tapped_paths(blocks)}

    def keep(path: str, a: Tensor, delta: Tensor) -> None:
        sink(path, a, delta)
        held.note(path, a, delta)
        if path != job.tied:
            vectors, rest = divmod(a.numel() // a.shape[-1], witness.fed)
            if not rest:
                tail = a.detach().reshape(-1, a.shape[-1])[witness.start * vectors :]
                witness.inputs.setdefault(path, []).append(tail.clone())

    held = _Autograd(job, stores)
    with Taps(modules) as taps, ParameterTaps(held.parameters) as direct, torch.enable_grad():
        taps.listen(keep)
        direct.listen(held.compare)
        logprobs, hidden = _own_logprobs(alone, batch, count)
        taps.listen(lambda path, a, delta: None)  # the model's own head may run once more, adapters in it too
        seen = predictions(alone, batch, hidden)
        seen.fill_heads([0], stores)
        taps.listen(keep)
        gradient = _backward(logprobs, seen)
        held.compare_silent(set(direct.silent()))
    witness.hidden = hidden.detach()[0, witness.start :].clone()
    _compare_head(alone, logprobs.detach(), gradient, seen)
    held.refuse()
    return witness


def _fullest(job: Job, batches: Sequence[Batch]) -> tuple[int, ...]:
    """Return the members of the batch of most tokens, one with a response of several tokens where there is one."""

    def rank(batch: Batch) -> tuple[bool, int]:
        return any(len(job.responses[i]) >= _SHORTEST for i in batch.members), batch.input_ids.numel()

    return max((batch for batch in batches if len(batch.members) > 1), key=rank, default=batches[-1]).members


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
    size = _size(job, gradient)
    gap = float((own - logprobs).abs().max())
    wide = seen.scores.hidden_gradient.to(gradient.device).double()
    off = float((gradient.double() - wide).norm() / wide.norm())
    limit = _HEAD_ROUNDINGS[size]
    if gap > limit * (1 + float(logprobs.abs().max())) or off > limit:
        hooks = hooked(job.model, job.head.base)
        raise GradvarError(
            f"response {job.ids[0]}: log-probabilities from the last hidden states are up to {gap:.3g} nats from those "
            f"of {type(job.model).__name__}'s own logits, their gradient {off:.2g} of its size: the model does more "
            f"to its logits than the last hidden states tell{hooks}"
        )


class _Autograd:
    """Holds what the stores captured of one response against autograd's own gradient of the parameters."""

    def __init__(self, job: Job, stores: Sequence[tuple[Block, GradientStore]]) -> None:
        self._job = job
        self.parameters: dict[str, nn.Parameter] = {}
        self._stores: dict[str, list[tuple[Block, GradientStore]]] = {}
        self._wrong: dict[str, float] = {}
        self._terms: dict[str, float] = {}
        room = job.plan.memory_budget - job.plan.work_bytes
        places = Counter(map(id, (module for _, module in job.model.named_modules(remove_duplicate=False))))
        for block, store in stores:
            module = job.model.get_submodule(block.target.module)
            if is_offloaded(module):  # each call has other tensors in their place
                continue
            if job.plan.checkpointing == "reentrant" and places[id(module)] > 1:  # autograd hands its parts over apart
                continue
            for name in ("weight", "bias"):
                parameter = module._parameters.get(name)
                if parameter is None or (name == "bias" and not (job.extra.include_bias and block.target.has_bias)):
                    continue
                if has_gradient_hooks(parameter):
                    continue  # the user's own (an optimizer in backward) would run
                if parameter.nbytes <= room:
                    self.parameters[f"{block.target.module}.{name}"] = parameter
                    self._stores.setdefault(f"{block.target.module}.{name}", []).append((block, store))

    def note(self, path: str, a: Tensor, delta: Tensor) -> None:
        """Note how large the terms of a module's gradients are."""
        squares = delta.double().square().sum(-1).flatten()
        inputs = torch.ones_like(squares)
        if a.is_floating_point():
            inputs = a.detach().to(delta.device).double().square().sum(-1).flatten()
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
            width = _size(self._job, self.parameters[name])
            terms = self._terms.get(name, 0.0)
            if gap > _ROUNDINGS[width] ** 2 * size + _TERM_ROUNDINGS[width] ** 2 * terms:
                self._wrong[block.target.key] = (gap / size) ** 0.5 if size else float("inf")
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
            said = f"{gap:.2g} of its size from" if gap < float("inf") else "nothing beside"
            raise GradvarError(
                f"{key} ({type(module).__name__}): the gradient captured at its calls is {said} "
                "autograd's, so it cannot be measured: its weight is used outside its module's call too, or the "
                f"module does not compute x W' + b with its own weight{hooked(module)}; choose other targets"
            )


def _size(job: Job, tensor: Tensor) -> int:
    """Return the bytes of the narrowest dtype that is computed in."""
    kinds = [tensor.dtype, job.dtype, *([job.autocast.dtype] if job.autocast.dtype is not None else [])]
    return min(kind.itemsize for kind in kinds)


def _pieces(store: GradientStore, rows: int) -> Iterator[tuple[int, int]]:
    height = max(1, piece(store.device) // store.columns)
    for start in range(0, rows, height):
        yield start, min(start + height, rows)


def _same_in_batch(own: Tensor, alone: Tensor, narrowest: int = 8) -> bool:
    """Return whether a batch changed no more than roundings; what is not finite alone is found elsewhere."""
    if own.shape != alone.shape:
        return False
    size = min(own.dtype.itemsize, narrowest)
    own, alone = own.double(), alone.to(own.device).double()
    gap = (own - alone).abs()
    if not bool(alone.isfinite().all()):
        return True
    if size > 2:
        return float(gap.max()) <= _BATCH_ROUNDINGS[size] * float(alone.abs().max())
    differs = float((alone - alone.mean(0)).square().mean().sqrt())
    tokens = float(alone.square().mean().sqrt())
    limit = max(_BATCH_SHARE * differs, 2 * torch.finfo(torch.bfloat16).eps * tokens)
    return float(gap.square().mean().sqrt()) <= limit
