"""One response's beginning, measured by the model's own code and plain autograd: what a pass is held against.

Probes of a few tokens miss what shows in real ones. So before a pass a response of its first batch is cut short and run
alone, its log-probabilities taken from the model's own logits, its gradients from autograd. They must be those of the
engine's own path (a weight used outside its module's call, a module that is not linear in its weight, a head that
reads more than the last hidden states differ here). In the pass, the same response in its batch must show the same
hidden states and inputs of the targets (a batch whose members change each other, or whose tokens a module puts in
another order, differs here); the model is causal, so a beginning is enough for that.

A beginning does not show what a module does in long sequences alone, or from some position on. So the last tokens of a
longer stretch, all of it fed, are held against autograd too, and against its states in its batch: of the longest
response, whole where responses go alone because their states are not those of a beginning or of a batch, elsewhere as
far as `STRETCH_SHARE` of the tokens goes. The model's later passes over the same targets, of other prompts mostly, look
at whole responses one after another, spread over the lengths, as often as that share of their tokens pays for.

Shape letters: M tokens predicted, T tokens fed, D hidden width, I inputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradvar.errors import GradvarError
from gradvar.gradients.alone import hold_against_autograd, make_alone, narrowest_bytes
from gradvar.gradients.batches import Batch, ChangedInBatchError, last_hidden
from gradvar.gradients.capture import Sink
from gradvar.gradients.collect import new_store
from gradvar.gradients.job import Job
from gradvar.gradients.plan import Block, device_bytes
from gradvar.gradients.spill import HostMemory
from gradvar.gradients.targets import decoder_layers
from gradvar.gradients.tokenwise import PartsWatch

_turns: weakref.WeakKeyDictionary[nn.Module, dict[object, tuple[int, int]]] = weakref.WeakKeyDictionary()
"""By targets, and whether every response's length is paid for: stretches so far, and tokens saved up for the next."""
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
    """The part of the last layer that takes each token by itself, if nothing in it or behind it is measured."""
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """By module path, what went into each call from `start` on, last call first: (M times vectors a token, I)."""

    def watching(self, batch: Batch, sink: Sink) -> Sink:
        """Return the sink of a batch, with the inputs it takes compared on their way.

        The sink raises ChangedInBatchError where they differ.
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
                if not same_in_batch(seen, alone, self.narrowest):
                    raise ChangedInBatchError(f"{path} sees other inputs for a response in a batch than alone")

        return watch

    def compare_states(self, batch: Batch, hidden: Tensor) -> None:
        """Compare the last hidden states (B, T, D) of the batch.

        Raises:
            ChangedInBatchError: The response has others in the batch, behind a shared prompt or whole than its
                beginning has alone.
        """
        if batch.members != self.batch:
            return
        row = batch.members.index(self.response)
        own = batch.split(hidden.detach(), "the last hidden states")[row]
        if not same_in_batch(own[self.start : self.start + len(self.hidden)], self.hidden, self.narrowest):
            raise ChangedInBatchError("a batch, a prompt run apart or what follows changes a response's hidden states")


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
    head = () if job.head.module is None else tuple(job.head.module.modules())
    measured = {job.model.get_submodule(block.target.module) for block in blocks}.difference(head)
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


def check_stretch(job: Job, blocks: Sequence[Block], batches: Sequence[Batch], tokens: int) -> Witness | None:
    """Feed a stretch of one response and hold its last tokens against the model and autograd; return its states.

    At a model's first pass over these targets it is so many tokens of the longest response, later a whole one, once the
    tokens of the passes since come to as many. None where it is no more than a beginning. Kept is what the pass keeps
    of one response.

    Raises:
        GradvarError: They differ.
    """
    blocks = [block for block in blocks if block.target.direct is None]
    if not blocks:
        return None
    chosen, fed = _next_stretch(job, blocks, tokens)
    stop = min(fed - len(job.prompt) + 1, len(job.responses[chosen]))
    if stop <= _most(job):
        return None
    alone, batch = make_alone(job, chosen, stop - _most(job), stop)
    host = HostMemory(pinned=job.device.type == "cuda", budget=job.plan.host_memory_budget or None)
    stores = [(block, new_store(alone, block, 1, host)) for block in blocks]
    kept = device_bytes(blocks, len(job.responses)) * max(job.lengths) // sum(job.lengths)
    room = job.plan.memory_budget - job.plan.work_bytes - kept
    try:
        hidden = hold_against_autograd(alone, batch, stores, room, lambda path, a, delta: None)
    except GradvarError as error:
        said = f"seen in {fed} tokens fed, so what was measured before of the same targets may be wrong too"
        raise GradvarError(f"{error} ({said})") from error
    start = len(alone.prompt) - 1
    return Witness(
        response=chosen,
        batch=next(other.members for other in batches if chosen in other.members),
        start=start,
        fed=batch.input_ids.shape[1],
        hidden=hidden[0, start:].clone(),
        narrowest=narrowest_bytes(job, torch.empty(0, dtype=torch.float64)),
    )


def look_at_longest(job: Job, batches: Sequence[Batch], witness: Witness) -> Witness | None:
    """Return the states that a response of the batch of longest rows has at its beginning alone.

    Where rows are longer than in the witness's batch, a model that goes by the row's length may differ there alone.
    None where they are not.
    """
    shared = [batch for batch in batches if len(batch.members) > 1]
    longest = max(shared, key=lambda batch: batch.input_ids.shape[1], default=None)
    seen = next(batch for batch in batches if batch.members == witness.batch)
    if longest is None or longest.input_ids.shape[1] <= seen.input_ids.shape[1]:
        return None
    chosen = longest.members[0]
    alone, batch = make_alone(job, chosen, 0, min(len(job.responses[chosen]), _most(job)))
    with torch.no_grad(), job.autocast.on():
        hidden = last_hidden(job.head.base, batch)
    start = len(alone.prompt) - 1
    return Witness(
        response=chosen,
        batch=longest.members,
        start=start,
        fed=batch.input_ids.shape[1],
        hidden=hidden[0, start:].clone(),
        narrowest=witness.narrowest,
    )


def turns_of(model: nn.Module) -> dict[object, tuple[int, int]]:
    """Return how far the model's stretches are."""
    return dict(_turns.get(model, {}))


def turn_back(model: nn.Module, turns: dict[object, tuple[int, int]]) -> None:
    """Let the model's stretches be as far as they were, for a pass that is run again."""
    _turns[model] = dict(turns)


def _next_stretch(job: Job, blocks: Sequence[Block], tokens: int) -> tuple[int, int]:
    """Return a response and how many tokens of it and its prompt to feed, 0 while they are saved up."""
    longest = max(job.lengths)
    turns = _turns.setdefault(job.model, {})
    name = frozenset(block.target.key for block in blocks), tokens >= longest
    turn, saved = turns.get(name, (0, 0))
    order = sorted(range(len(job.responses)), key=lambda i: (len(job.responses[i]), -i))
    chosen = order[round(_spread(turn) * (len(order) - 1))]
    saved = min(saved + tokens, longest)
    if turn > 0 and saved < job.lengths[chosen]:
        turns[name] = (turn, saved)
        return chosen, 0
    fed = min(saved, job.lengths[chosen])
    turns[name] = (turn + 1, saved - fed)
    return chosen, fed


def _spread(turn: int) -> float:
    """Return 1, then numbers between 0 and 1 of which every part is met soon: 1/2, 1/4, 3/4, 1/8 (van der Corput's)."""
    if turn == 0:
        return 1.0
    digits = f"{turn:b}"[::-1]
    return int(digits, 2) / (1 << len(digits))


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


def same_in_batch(own: Tensor, alone: Tensor, narrowest: int = 8) -> bool:
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
