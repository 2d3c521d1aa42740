"""One response's beginning, measured by the model's own code and plain autograd: what a pass is held against.

Probes of a few tokens miss what shows in real ones. So before a pass a response of its first batch is cut short and run
alone, its log-probabilities taken from the model's own logits, its gradients from autograd. They must be those of the
engine's own path (a weight used outside its module's call, a module that is not linear in its weight, a head that
reads more than the last hidden states differ here). In the pass, the same response in its batch must show the same
hidden states and inputs of the targets (a batch whose members change each other, or whose tokens a module puts in
another order, differs here); the model is causal, so a beginning is enough for that.

A beginning does not show what a module does in long sequences alone, or from some position on. So the last tokens of a
longer stretch, all of it fed, are held against autograd too: of the longest response whole where responses go alone
because their states are not those of a beginning or of a batch, elsewhere as far as `STRETCH_SHARE` of the tokens goes.

Shape letters: M tokens predicted, T tokens fed, D hidden width, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradvar.gradients.alone import hold_against_autograd, make_alone, narrowest_bytes
from gradvar.gradients.batches import Batch, UnalignedTokensError
from gradvar.gradients.capture import Sink
from gradvar.gradients.collect import new_store
from gradvar.gradients.job import Job
from gradvar.gradients.plan import Block, device_bytes
from gradvar.gradients.spill import HostMemory
from gradvar.gradients.targets import decoder_layers
from gradvar.gradients.tokenwise import PartsWatch

_LONGEST = 32
"""Response tokens of the witness, at most."""
STRETCH_SHARE = 1 / 80
"""Part of a pass's tokens that a stretch may have: its time is then 1% to 3% of the pass (one thread, 512 wide)."""
LEAST_SAVING = 0.1
"""Share of a pass's tokens that predict nothing, padding too, before the last layer's MLP leaves them out."""
_SHORTEST = 8
"""Response tokens that it has where one of the batch has so many."""
_BATCH_ROUNDINGS = {8: 1e-5, 4: 1e-4}
"""By bytes of the dtype: how far a batch may move states, relative to the largest. Some compute in float32 always."""
_BATCH_SHARE = 1 / 8
"""In half precision: part of what differs between tokens."""


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
    tokenwise: nn.Module | None = None
    """The part of the last layer that takes each token by itself, where there is one and nothing in it is measured."""
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

    def compare_states(self, batch: Batch, hidden: Tensor) -> None:
        """Compare the last hidden states (B, T, D) of the batch.

        Raises:
            UnalignedTokensError: The response has others in the batch, behind a shared prompt or whole than its
                beginning has alone.
        """
        if batch.members != self.batch:
            return
        row = batch.members.index(self.response)
        own = batch.split(hidden.detach(), "the last hidden states")[row]
        if not _same_in_batch(own[self.start : self.start + len(self.hidden)], self.hidden, self.narrowest):
            raise UnalignedTokensError("a batch, a prompt run apart or what follows changes a response's hidden states")


def make_witness(job: Job, blocks: Sequence[Block], batches: Sequence[Batch]) -> Witness:
    """Run the beginning of a response alone and hold the engine's path against the model's own and autograd.

    Raises:
        GradvarError: They differ.
    """
    members = _fullest(job, batches)
    long = [i for i in members if len(job.responses[i]) >= _SHORTEST]
    chosen = long[-1] if long else max(members, key=lambda i: len(job.responses[i]))
    count = min(len(job.responses[chosen]), _most(job))
    alone, batch = make_alone(job, chosen, 0, count)
    witness = Witness(
        response=chosen,
        batch=members,
        start=len(alone.prompt) - 1,
        fed=batch.input_ids.shape[1],
        hidden=torch.empty(0),
        narrowest=narrowest_bytes(job, torch.empty(0, dtype=torch.float64)),
    )
    measured = [job.model.get_submodule(block.target.module) for block in blocks]
    blocks = [block for block in blocks if block.target.direct is None]

    def keep(path: str, a: Tensor, delta: Tensor) -> None:
        if path != job.tied:
            vectors, rest = divmod(a.numel() // a.shape[-1], witness.fed)
            if not rest:
                tail = a.detach().reshape(-1, a.shape[-1])[witness.start * vectors :]
                witness.inputs.setdefault(path, []).append(tail.clone())

    stores = [(block, new_store(alone, block, 1, None)) for block in blocks]
    room = job.plan.memory_budget - job.plan.work_bytes
    with PartsWatch(decoder_layers(job.model)[-1][1], measured) as parts:
        hidden = hold_against_autograd(alone, batch, stores, room, keep)
    witness.hidden = hidden[0, witness.start :].clone()
    if witness.narrowest > 2 and _spares(job, batches):
        witness.tokenwise = parts.tokenwise(witness.start)
    return witness


def check_stretch(job: Job, blocks: Sequence[Block], tokens: int) -> None:
    """Feed so many tokens of the longest response and hold its last ones among them against the model and autograd.

    Nothing where that is no more than its beginning. Kept is what the pass keeps of one response.

    Raises:
        GradvarError: They differ.
    """
    chosen = max(range(len(job.responses)), key=lambda i: len(job.responses[i]))
    stop = min(tokens - len(job.prompt) + 1, len(job.responses[chosen]))
    blocks = [block for block in blocks if block.target.direct is None]
    if stop <= _most(job) or not blocks:
        return
    alone, batch = make_alone(job, chosen, stop - _most(job), stop)
    host = HostMemory(pinned=job.device.type == "cuda", budget=job.plan.host_memory_budget or None)
    stores = [(block, new_store(alone, block, 1, host)) for block in blocks]
    kept = device_bytes(blocks, len(job.responses)) * max(job.lengths) // sum(job.lengths)
    room = job.plan.memory_budget - job.plan.work_bytes - kept
    hold_against_autograd(alone, batch, stores, room, lambda path, a, delta: None)


def _spares(job: Job, batches: Sequence[Batch]) -> bool:
    """Return whether enough tokens of a pass predict nothing; on a GPU it was not measured."""
    fed = sum(batch.input_ids.numel() for batch in batches)
    return job.device.type == "cpu" and sum(map(len, job.responses)) <= (1 - LEAST_SAVING) * fed


def _most(job: Job) -> int:
    """Return how many tokens are predicted, at most: one chunk of logits is made of them."""
    return min(_LONGEST, max(2, job.plan.chunk_bytes // (job.head.shape()[0] * 8)))


def _fullest(job: Job, batches: Sequence[Batch]) -> tuple[int, ...]:
    """Return the members of the batch of most tokens, one with a response of several tokens where there is one.

    The longest response where each goes alone.
    """

    def rank(batch: Batch) -> tuple[bool, int]:
        return any(len(job.responses[i]) >= _SHORTEST for i in batch.members), batch.input_ids.numel()

    return max((batch for batch in batches if len(batch.members) > 1), key=rank, default=batches[0]).members


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
