"""Passes of the model over all responses: forward, truncated backward, gradients sorted into stores by response.

    s_i = grad sum_t m_it log pi(o_it | q, o_i,<t) over a target's parameters, m the loss mask

Shape letters: N responses, L response tokens, T tokens of a batch row, D hidden width.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradvar.errors import GradvarError
from gradvar.gradients.batches import Batch, ChangedInBatchError, UnalignedTokensError, last_hidden
from gradvar.gradients.capture import ParameterTaps, Taps, has_gradient_hooks
from gradvar.gradients.chosen import ChosenKeys
from gradvar.gradients.collect import Predictions, collector, direct_collector, new_store, predicting, predictions
from gradvar.gradients.devices import placed
from gradvar.gradients.experts import is_one_expert
from gradvar.gradients.gram import GradientStore
from gradvar.gradients.job import Job, TokenValues
from gradvar.gradients.plan import Block
from gradvar.gradients.spill import HostMemory
from gradvar.gradients.tokenwise import Narrowed, NotTokenwiseError
from gradvar.gradients.trunk import Trunk, choose_forward
from gradvar.gradients.witness import STRETCH_SHARE, check_stretch, look_at_longest, make_witness, turn_back, turns_of

_changed_in_batches: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that were seen to: not every pass looks where it shows."""


def run_pass(job: Job, blocks: Sequence[Block]) -> list[tuple[Block, GradientStore]]:
    """Run all responses through the model once and keep the gradients of the pass's blocks.

    Where a target's tokens cannot be told apart by response in a batch, or a batch changes what a response gives, each
    goes alone. Where a module that ran on some tokens is to see all, the pass is run again so. Where the device runs
    out of memory (another process may have taken it since the plan), it is run again once, in batches half as large.
    What a failed pass had kept is dropped.

    Raises:
        GradvarError: The device runs out of memory again.
    """
    done, tokens, turns = job.done, job.tokens, turns_of(job.model)
    tried: set[type[Exception]] = set()
    if job.model in _changed_in_batches:
        tried.add(UnalignedTokensError)
        job.plan, job.changed_in_batches = replace(job.plan, token_budget=1), True
    while True:
        job.done, job.tokens = done, tokens.copy()
        failed: type[Exception] = UnalignedTokensError
        try:
            with job.autocast.off():
                return _run_batches(
                    job, blocks, alone=UnalignedTokensError in tried, narrow=NotTokenwiseError not in tried
                )
        except NotTokenwiseError:
            failed = NotTokenwiseError
        except UnalignedTokensError as error:
            if failed in tried:
                raise
            if isinstance(error, ChangedInBatchError):
                _changed_in_batches.add(job.model)
                job.changed_in_batches = True
        except torch.OutOfMemoryError:
            failed = torch.OutOfMemoryError
        # out here the failed pass is let go of
        turn_back(job.model, turns)
        if failed is NotTokenwiseError:  # the same again, with all tokens
            tried.add(failed)
            continue
        batches = job.batches(job.plan.token_budget)
        largest = max(batch.input_ids.numel() for batch in batches)
        if failed is torch.OutOfMemoryError:
            if len(batches) == len(job.responses) or failed in tried:
                raise GradvarError(
                    f"{job.device} ran out of memory in batches of {largest} tokens: free some of it, or give a lower "
                    "--memory-budget, with which activations and gradients take less"
                )
            if job.device.type == "cuda":
                torch.cuda.empty_cache()
        tried.add(failed)
        job.plan = replace(job.plan, token_budget=1 if failed is UnalignedTokensError else max(1, largest // 2))


def _run_batches(job: Job, blocks: Sequence[Block], *, alone: bool, narrow: bool) -> list[tuple[Block, GradientStore]]:
    batches = job.batches(job.plan.token_budget)
    needed = job.plan.work_bytes + job.plan.trunk_bytes
    job.resident.make_room(needed)
    witness = make_witness(job, blocks, batches)
    tokens = max(job.lengths) if alone else int(STRETCH_SHARE * sum(job.lengths))
    looks = [witness, check_stretch(job, blocks, batches, tokens), look_at_longest(job, batches, witness)]
    job.resident.make_room(needed)
    host = HostMemory(pinned=job.device.type == "cuda", budget=job.plan.host_memory_budget or None)
    stores = [(block, new_store(job, block, len(job.responses), host)) for block in blocks]
    norms = job.extra.empty(block.target.key for block in blocks)
    first_pass = job.tokens.logprobs[0] is None
    with job.autocast.on(), torch.no_grad():
        forward = (lambda batch: last_hidden(job.head.base, batch)) if alone else choose_forward(
            job.model, job.head.base, job.prompt, job.responses, _lowest_layer(job, blocks),
            measured=[job.model.get_submodule(block.target.module) for block in blocks],
            batches=batches, spare_bytes=job.plan.spare_bytes, between_bytes=needed // 2, probe=job.probe,
        )  # fmt: skip
    chosen = ChosenKeys(job)
    modules = {path: job.model.get_submodule(path) for path in job.tapped_paths(blocks)}
    parameters = job.direct_parameters(blocks)
    for name, parameter in parameters.items():
        if has_gradient_hooks(parameter):
            raise GradvarError(
                f"{name} has hooks of its own on its gradient (an optimizer in backward?), which measuring would run: "
                "take them off, or choose other targets"
            )
    with (
        Taps(modules) as taps,
        ParameterTaps(parameters) as direct,
        _noting_runs(job, parameters) as ran,
        # alone the states are not looked at again
        Narrowed(witness.tokenwise if narrow and not alone else None) as narrowed,
    ):
        for batch in batches:
            narrowed.listen(placed(predicting(job, batch), batch.input_ids.device), tuple(batch.input_ids.shape))
            taps.listen(witness.watching(batch, collector(job, batch, batch.members, stores)))
            direct.listen(direct_collector(batch.members, stores))
            job.resident.make_room(needed)
            with job.autocast.on():
                beginning = chosen.beginning(batch) if first_pass else None
                hidden = forward(batch)
                if isinstance(forward, Trunk) and not _real_states_finite(batch, hidden):
                    # rows of a mask without a single key have made NaN (Gemma 2, eager, float64)
                    hidden = last_hidden(job.head.base, batch)
            job.resident.make_room(needed)
            chosen.compare(batch, beginning, hidden)
            for one in looks:
                if one is not None and not alone:  # then they are what they are
                    one.compare_states(batch, hidden)
            seen = predictions(job, batch, hidden)
            job.resident.make_room(needed)
            if first_pass:
                _keep_tokens(job, batch, seen)
            _backward(seen, taps, batch.members, stores, keep_graph=job.extra.count > 0)
            for block, store in stores:
                names = [job.ids[i] for i in batch.members]
                require_finite(names, store.finite(batch.members), f"the gradient over {block.target.key}")
            host.forget()
            _add_reweighted(job, batch, blocks, taps, direct, seen, norms)
            job.done += len(batch.members)
            job.report(job.done // len(job.plan.passes))
            del hidden, seen
        _check_silent(direct, ran)
    job.extra.add(norms)
    return stores


def _real_states_finite(batch: Batch, hidden: Tensor) -> bool:
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    return bool((flat if batch.real is None else flat[batch.real]).isfinite().all())


@contextmanager
def _noting_runs(job: Job, names: Iterable[str]) -> Iterator[set[str]]:
    """Note which modules of single experts run, by the full names of their parameters."""
    ran: set[str] = set()
    paths = {name.rpartition(".")[0] for name in names if is_one_expert(name)}
    hooks = [
        job.model.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: ran.add(path))
        for path in paths
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _check_silent(direct: ParameterTaps, ran: set[str]) -> None:
    """Refuse parameters that no response's gradient reached, but for experts that no token reached."""
    silent = [name for name in direct.silent() if not is_one_expert(name) or name.rpartition(".")[0] in ran]
    if silent:
        raise GradvarError(
            f"no gradient reached {', '.join(silent)}: the model did not use it for these responses; leave it out of "
            "the targets"
        )


def _lowest_layer(job: Job, blocks: Sequence[Block]) -> int | None:
    """Return the lowest decoder layer that is measured, None where something outside the layers is."""
    layers = [block.target.layer for block in blocks if block.target.kind != "head"]
    outside = None in layers or (job.tied is not None and len(layers) < len(blocks))
    return None if outside else min((layer for layer in layers if layer is not None), default=None)


def _add_reweighted(
    job: Job,
    batch: Batch,
    blocks: Sequence[Block],
    taps: Taps,
    direct: ParameterTaps,
    seen: Predictions,
    norms: dict[str, Tensor],
) -> None:
    """Add the squared norms of the batch's reweighted scores, one more backward pass of its graph for each."""
    rows = range(len(batch.members))
    head = () if job.head.module is None else tuple(job.head.module.modules())
    inside_head = any(job.model.get_submodule(path) in head for path in job.tapped_paths(blocks))
    for index in range(job.extra.count):
        stores = [(block, new_store(job, block, len(rows), None)) for block in blocks]
        taps.listen(collector(job, batch, rows, stores))
        direct.listen(direct_collector(rows, stores))
        factor = job.extra.column(index, batch.members, seen.weights)
        other = seen.again(job, factor) if inside_head else seen.reweighted(factor)
        _backward(other, taps, rows, stores, keep_graph=index + 1 < job.extra.count)
        for block, store in stores:
            bias = job.extra.include_bias and block.target.has_bias
            norms[block.target.key][index, list(batch.members)] += store.squared_norms(bias, job.plan.tile_bytes)


def _backward(
    seen: Predictions,
    taps: Taps,
    rows: Sequence[int],
    stores: Sequence[tuple[Block, GradientStore]],
    *,
    keep_graph: bool,
) -> None:
    """Send the gradient at the last hidden states down; it reaches the stores, in which `rows` are the batch's."""
    seen.fill_heads(rows, stores)
    if seen.hidden.requires_grad:
        gradient = torch.zeros_like(seen.hidden).reshape(-1, seen.hidden.shape[-1])
        gradient[seen.where] = seen.scores.hidden_gradient.to(gradient.dtype)
        torch.autograd.backward(seen.hidden, gradient.view_as(seen.hidden), retain_graph=keep_graph)
    taps.finish()


def _keep_tokens(job: Job, batch: Batch, seen: Predictions) -> None:
    scores = seen.scores
    columns = [x.double().cpu().numpy() for x in (scores.logprobs, scores.entropy, scores.collision)]
    names = [job.ids[i] for i in batch.members]
    require_finite(names, [bool(np.isfinite(columns[0][span]).all()) for span in seen.spans], "a log-probability")
    for i, span in zip(batch.members, seen.spans, strict=True):
        job.tokens.logprobs[i] = columns[0][span].copy()
        job.tokens.entropy[i] = columns[1][span].copy()
        job.tokens.collision[i] = columns[2][span].copy()


def whole(values: Sequence[NDArray[np.float64] | None]) -> TokenValues:
    """Return the values of all responses, once every one has come in.

    Raises:
        RuntimeError: One did not.
    """
    missing = sum(value is None for value in values)
    if missing:
        raise RuntimeError(f"{missing} of {len(values)} responses have no log-probabilities: expected them of all")
    return [value for value in values if value is not None]


class NonFiniteError(GradvarError):
    """Something of these responses is not finite."""

    def __init__(self, what: str, rollout_ids: Sequence[int]) -> None:
        names = [str(i) for i in rollout_ids]
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        super().__init__(
            f"{what} is not finite for response {shown}: leave these out, or measure in float32 with eager attention"
        )
        self.what = what
        self.rollout_ids = tuple(rollout_ids)


def require_finite(ids: Sequence[int], finite: Sequence[bool], what: str) -> None:
    """Raise an error that names the responses whose value is not finite."""
    bad = [i for i, good in zip(ids, finite, strict=True) if not good]
    if bad:
        raise NonFiniteError(what, bad)
