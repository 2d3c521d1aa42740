"""Passes of the model over all responses: forward, truncated backward, gradients sorted into stores by response.

    s_i = grad sum_t m_it log pi(o_it | q, o_i,<t) over a target's parameters, m the loss mask

Shape letters: N responses, L response tokens, T tokens of a batch row, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradvar.errors import GradvarError
from gradvar.gradients.batches import Batch, UnalignedTokensError
from gradvar.gradients.capture import ParameterTaps, Taps
from gradvar.gradients.devices import execution_device, placed
from gradvar.gradients.experts import is_one_expert
from gradvar.gradients.gram import FactorStore, GradientStore, HeadStore, MatrixStore
from gradvar.gradients.job import Job, TokenColumns, TokenValues
from gradvar.gradients.logprobs import TokenScores, compute_dtype
from gradvar.gradients.plan import Block
from gradvar.gradients.spill import HostFactorStore, HostMatrixStore, HostMemory
from gradvar.gradients.trunk import choose_forward


def run_pass(job: Job, blocks: Sequence[Block]) -> list[tuple[Block, GradientStore]]:
    """Run all responses through the model once and keep the gradients of the pass's blocks.

    Where a target's tokens cannot be told apart by response in a batch, each response goes alone. Where the device runs
    out of memory (another process may have taken it since the plan), the pass is run again once, in batches half as
    large; what it had kept is dropped.

    Raises:
        GradvarError: The device runs out of memory again.
    """
    done, fresh = job.done, job.tokens.logprobs[0] is None
    tried: set[type[Exception]] = set()
    while True:
        failed: type[Exception] = UnalignedTokensError
        try:
            with job.autocast.off():
                return _run_batches(job, blocks)
        except UnalignedTokensError:
            if failed in tried:
                raise
        except torch.OutOfMemoryError:
            failed = torch.OutOfMemoryError
        # out here the failed pass is let go of
        largest = max(batch.input_ids.numel() for batch in job.batches(job.plan.token_budget))
        if failed is torch.OutOfMemoryError:
            alone = len(job.batches(job.plan.token_budget)) == len(job.responses)
            if alone or failed in tried:
                raise GradvarError(
                    f"{job.device} ran out of memory in batches of {largest} tokens: free some of it, or give a lower "
                    "--memory-budget, with which activations and gradients take less"
                )
            if job.device.type == "cuda":
                torch.cuda.empty_cache()
        tried.add(failed)
        job.done = done
        if fresh:
            n = len(job.responses)
            job.tokens = TokenColumns(logprobs=[None] * n, entropy=[None] * n, collision=[None] * n)
        job.plan = replace(job.plan, token_budget=1 if failed is UnalignedTokensError else max(1, largest // 2))


def _run_batches(job: Job, blocks: Sequence[Block]) -> list[tuple[Block, GradientStore]]:
    host = HostMemory(pinned=job.device.type == "cuda", budget=job.plan.host_memory_budget or None)
    stores = [(block, _new_store(job, block, len(job.responses), host)) for block in blocks]
    norms = job.extra.empty(block.target.key for block in blocks)
    first_pass = job.tokens.logprobs[0] is None
    batches = job.batches(job.plan.token_budget)
    needed = job.plan.work_bytes + job.plan.trunk_bytes
    with job.autocast.on(), torch.no_grad():
        forward = choose_forward(
            job.model, job.head.base, job.prompt, job.responses, _lowest_layer(job, blocks),
            tokens=max(batch.input_ids.numel() for batch in batches), spare_bytes=job.plan.spare_bytes,
        )  # fmt: skip
    modules = {path: job.model.get_submodule(path) for path in job.tapped_paths(blocks)}
    with Taps(modules) as taps, ParameterTaps(job.direct_parameters(blocks)) as direct:
        for batch in batches:
            taps.listen(_collector(job, batch, batch.members, stores))
            direct.listen(_direct_collector(batch.members, stores))
            job.resident.make_room(needed)
            with job.autocast.on():
                hidden = forward(batch)
            job.resident.make_room(needed)
            seen = _predictions(job, batch, hidden)
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
        _check_silent(direct)
    job.extra.add(norms)
    return stores


def _check_silent(direct: ParameterTaps) -> None:
    """Refuse parameters that no response's gradient reached; tokens may well leave out one expert's own module."""
    silent = [name for name in direct.silent() if not is_one_expert(name)]
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
    seen: _Predictions,
    norms: dict[str, Tensor],
) -> None:
    """Add the squared norms of the batch's reweighted scores, one more backward pass of its graph for each."""
    rows = range(len(batch.members))
    for index in range(job.extra.count):
        stores = [(block, _new_store(job, block, len(rows), None)) for block in blocks]
        taps.listen(_collector(job, batch, rows, stores))
        direct.listen(_direct_collector(rows, stores))
        other = seen.reweighted(job.extra.column(index, batch.members, seen.weights))
        _backward(other, taps, rows, stores, keep_graph=index + 1 < job.extra.count)
        for block, store in stores:
            bias = job.extra.include_bias and block.target.has_bias
            norms[block.target.key][index, list(batch.members)] += store.squared_norms(bias, job.plan.tile_bytes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Predictions:
    """A batch's last hidden states where they predict response tokens; R such positions."""

    hidden: Tensor
    """(B, T, D) with its graph."""
    flat: Tensor
    """(R, D) the predicting ones, detached."""
    where: Tensor
    """(R,) their flat positions."""
    tokens: Tensor
    """(R,) the tokens that they predict."""
    weights: Tensor
    """(R,) weight of each token's log-probability."""
    spans: list[slice]
    """Each row's positions among the R."""
    scores: TokenScores

    def reweighted(self, factor: Tensor) -> _Predictions:
        """Return the same positions with weights (and the gradients they make) times the factor (R,)."""
        gradient = self.scores.hidden_gradient
        scores = replace(self.scores, hidden_gradient=gradient * factor.to(gradient.device, gradient.dtype)[:, None])
        return replace(self, weights=self.weights * factor, scores=scores)


def _backward(
    seen: _Predictions,
    taps: Taps,
    rows: Sequence[int],
    stores: Sequence[tuple[Block, GradientStore]],
    *,
    keep_graph: bool,
) -> None:
    """Send the gradient at the last hidden states down; it reaches the stores, in which `rows` are the batch's."""
    for _, store in stores:
        if isinstance(store, HeadStore):
            for i, span in zip(rows, seen.spans, strict=True):
                store.add_output(
                    i, seen.flat[span], seen.tokens[span], seen.weights[span], seen.scores.normaliser[span]
                )
    if seen.hidden.requires_grad:
        gradient = torch.zeros_like(seen.hidden).reshape(-1, seen.hidden.shape[-1])
        gradient[seen.where] = seen.scores.hidden_gradient.to(gradient.dtype)
        torch.autograd.backward(seen.hidden, gradient.view_as(seen.hidden), retain_graph=keep_graph)
    taps.finish()


def _new_store(job: Job, block: Block, count: int, host: HostMemory | None) -> GradientStore:
    """Return a store for so many responses: as the plan has it, or (without `host`) of a batch's factors alone."""
    rows = block.stop - block.start
    kind = compute_dtype(job.dtype)
    if block.target.kind == "head":
        head = job.head
        if head.weight is None:
            raise GradvarError(
                f"{block.target.key}: this model does more to its logits than a matrix product, a scale or a soft cap, "
                "so the head cannot be measured; choose other targets"
            )
        return HeadStore(count, block.start, rows, head.weight, head.bias, head.curve, job.temperature, kind)
    device = execution_device(job.model.get_submodule(block.target.module))
    size = (count, rows, block.target.in_features, kind, device)
    factors = (host is None or block.keep == "factors") and block.target.direct is None
    if host is not None and block.home == "host":
        return HostFactorStore(*size, host) if factors else HostMatrixStore(*size, host)
    return FactorStore(*size) if factors else MatrixStore(*size)


def _collector(
    job: Job, batch: Batch, rows: Sequence[int], stores: Sequence[tuple[Block, GradientStore]]
) -> Callable[[str, Tensor, Tensor], None]:
    """Return the sink that sorts a batch's factors into the stores' `rows`, response by response."""
    shared: dict[int, tuple[Tensor, list[Tensor]]] = {}  # q, k and v get the same tensor: it is packed and kept once

    def sink(path: str, a: Tensor, delta: Tensor) -> None:
        outputs = batch.split(delta, path)
        if path == job.tied:
            ids = batch.split(a[..., None], path)
            for _, store in stores:
                if isinstance(store, HeadStore):
                    for i, ids_i, delta_i in zip(rows, ids, outputs, strict=True):
                        store.add_input(i, ids_i[:, 0], _embedding_gradient(job, ids_i[:, 0], delta_i))
            return
        if id(a) not in shared:
            shared[id(a)] = (a, batch.split(a.detach().to(delta.device), path))  # a hook may bring it after ours saw it
        for block, store in stores:
            if block.target.module == path:
                for i, a_i, delta_i in zip(rows, shared[id(a)][1], outputs, strict=True):
                    store.add(i, a_i, delta_i[:, block.start : block.stop])

    return sink


def _direct_collector(
    rows: Sequence[int], stores: Sequence[tuple[Block, GradientStore]]
) -> Callable[[str, Tensor], None]:
    """Return the sink that gives autograd's own gradients to the one response of a batch.

    Raises:
        UnalignedTokensError: There are several.
    """

    def sink(name: str, gradient: Tensor) -> None:
        if len(rows) > 1:
            raise UnalignedTokensError(f"{name}: its gradient cannot be told apart by response in a batch")
        for block, store in stores:
            direct, module = block.target.direct, block.target.module
            if direct is not None and isinstance(store, MatrixStore):
                span = slice(block.start, block.stop)
                if name == f"{module}.{direct.weight}":
                    store.add_gradient(rows[0], direct.rows(gradient)[span], None)
                elif name == f"{module}.{direct.bias}":
                    store.add_gradient(rows[0], None, gradient.flatten()[span])

    return sink


def _embedding_gradient(job: Job, ids: Tensor, outputs: Tensor) -> Tensor:
    """Return (T, D) gradients of the rows that the tokens fed take from the input embedding."""
    embedding = job.model.get_submodule(job.tied or "")
    gradient = outputs.to(compute_dtype(job.dtype)) * job.tied_scale
    skip = getattr(embedding, "padding_idx", None)  # torch gives that row no gradient
    return gradient if skip is None else gradient * (ids != skip)[:, None]


def _predictions(job: Job, batch: Batch, hidden: Tensor) -> _Predictions:
    """Return where the batch's last hidden states predict response tokens, and what they say of them."""
    length = batch.input_ids.shape[1]
    where: list[int] = []
    tokens: list[int] = []
    weights: list[int] = []
    spans = []
    for row, i in enumerate(batch.members):
        spans.append(slice(len(where), len(where) + len(job.responses[i])))
        start = (0 if batch.packed else row * length) + batch.firsts[row] + len(job.prompt) - 1
        where += range(start, start + len(job.responses[i]))
        tokens += job.responses[i]
        weights += job.masks[i]
    device = batch.input_ids.device
    at = placed(where, hidden.device)
    flat = hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, at)
    chosen = placed(tokens, device)
    weight = placed(weights, device, compute_dtype(job.dtype))
    return _Predictions(
        hidden=hidden,
        flat=flat,
        where=at,
        tokens=chosen,
        weights=weight,
        spans=spans,
        scores=job.head.token_scores(flat, chosen, weight, job.temperature, job.plan.chunk_bytes),
    )


def _keep_tokens(job: Job, batch: Batch, seen: _Predictions) -> None:
    scores = seen.scores
    columns = [x.double().cpu().numpy() for x in (scores.logprobs, scores.entropy, scores.collision)]
    names = [job.ids[i] for i in batch.members]
    require_finite(names, [bool(np.isfinite(columns[0][span]).all()) for span in seen.spans], "a log-probability")
    for i, span in zip(batch.members, seen.spans, strict=True):
        job.tokens.logprobs[i] = columns[0][span].copy()
        job.tokens.entropy[i] = columns[1][span].copy()
        job.tokens.collision[i] = columns[2][span].copy()


def whole(values: Sequence[NDArray[np.float64] | None]) -> TokenValues:
    """Return the values of all responses, once every one has come in."""
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
