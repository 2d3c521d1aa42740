"""From responses to score Grams: one forward and one truncated backward pass over batches, then small matrices.

    s_i = grad sum_t m_it log pi(o_it | q, o_i,<t) over a target's parameters, m the loss mask;  S_ij = <s_i, s_j>

Shape letters: N responses, L response tokens, T tokens of a batch row, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradvar.errors import GradvarError
from gradvar.gradients.batches import Batch, UnalignedTokensError, make_batches
from gradvar.gradients.capture import Taps
from gradvar.gradients.gram import FactorStore, GradientStore, HeadStore, MatrixStore
from gradvar.gradients.logprobs import Head, TokenScores, compute_dtype
from gradvar.gradients.plan import Block, Plan, make_plan
from gradvar.gradients.request import check_request, check_sharing
from gradvar.gradients.specs import resolve_targets
from gradvar.gradients.states import Autocast, frozen, full_precision
from gradvar.gradients.targets import Target
from gradvar.runs.records import ScoreGram

TokenValues = list[NDArray[np.float64]]
_PROBE_TOKENS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreMeasurement:
    """Score Grams of one prompt's responses and the per-token numbers of the same pass."""

    grams: dict[str, ScoreGram]
    """By target key."""
    logprobs: TokenValues
    """Per response, (L,) log pi of every response token in nats at the temperature, masked tokens too."""
    entropy: TokenValues
    """Per response, (L,) entropy in nats of the distribution each token was drawn from."""
    collision: TokenValues
    """Per response, (L,) sum over the vocabulary of pi^2."""
    dtype: str
    """The model's dtype in the backward pass."""
    attention: str
    """Attention implementation of the model."""
    head: str
    """How logits were made: "linear" or "the model's own head"."""
    plan: Plan
    """How the work was split; no result depends on it."""


@dataclass(kw_only=True, eq=False)
class _Tokens:
    """Per-token results as they come in, by response."""

    logprobs: list[NDArray[np.float64] | None]
    entropy: list[NDArray[np.float64] | None]
    collision: list[NDArray[np.float64] | None]


@dataclass(kw_only=True, eq=False)
class Job:
    """One checked request on a model held ready."""

    model: nn.Module
    targets: list[Target]
    prompt: list[int]
    responses: list[list[int]]
    masks: list[list[int]]
    ids: tuple[int, ...]
    temperature: float
    head: Head
    autocast: Autocast
    plan: Plan
    dtype: torch.dtype
    tied: str | None
    """Path of the input embedding where it shares the chosen head's weight."""
    tied_scale: float
    """Its output is this times the weight's rows."""
    tokens: _Tokens
    report: Callable[[int], None]
    done: int = field(default=0)


def measure_scores(
    model: nn.Module,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    targets: str | Sequence[str],
    *,
    loss_masks: Sequence[Sequence[int] | None] | None = None,
    temperature: float = 1.0,
    include_bias: bool = True,
    token_budget: int | None = None,
    memory_budget: int | None = None,
    rollout_ids: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ScoreMeasurement:
    """Measure the score Grams of one prompt's responses, exactly, and their per-token log-probabilities.

    The model is measured in eval mode (no dropout) and left as it was found.

    Args:
        model: A transformers causal language model.
        prompt_ids: Token ids of the prompt.
        responses: N lists of token ids as sampled, end token included.
        targets: What `resolve_targets` understands, for example "last:qkv".
        loss_masks: Per response 1 on the tokens whose log-probability counts, else 0; None means every token.
        temperature: The logits are divided by it.
        include_bias: Whether a target's bias is part of its parameters.
        token_budget: Padded tokens of a batch; None chooses. Changes speed, not results.
        memory_budget: Bytes for gradients and tiles; None takes most of what is free. Changes speed, not results.
        rollout_ids: Names of the responses, 0 to N - 1 if None.
        on_progress: Called after every batch with the number of responses done so far, of N.

    Raises:
        GradvarError: The request does not fit the model, or a response's gradient is not finite.
    """
    with prepared(
        model,
        prompt_ids,
        responses,
        targets,
        loss_masks=loss_masks,
        temperature=temperature,
        token_budget=token_budget,
        memory_budget=memory_budget,
        rollout_ids=rollout_ids,
        on_progress=on_progress,
    ) as job:
        n, ids, tile = len(responses), job.ids, job.plan.tile_bytes
        sums = {target.key: torch.zeros((n, n), dtype=torch.float64) for target in job.targets}
        for blocks in job.plan.passes:
            stores = run_pass(job, blocks)
            while stores:  # each is let go before the next pass fills memory again
                block, store = stores.pop()
                with job.autocast.off():
                    sums[block.target.key] += store.gram(include_bias and block.target.has_bias, tile)
                del store
    for key, total in sums.items():
        _require_finite(ids, [bool(x) for x in total.diagonal().isfinite()], f"the gradient over {key}")
    name = str(job.dtype).removeprefix("torch.")
    if job.autocast.dtype is not None:
        name += f" autocast {str(job.autocast.dtype).removeprefix('torch.')}"
    grams = {
        key: ScoreGram(
            target=key,
            matrix=total.numpy(),
            rollout_ids=ids,
            dtype=name,
            include_bias=include_bias,
            temperature=float(temperature),
        )
        for key, total in sums.items()
    }
    return ScoreMeasurement(
        grams=grams,
        logprobs=_whole(job.tokens.logprobs),
        entropy=_whole(job.tokens.entropy),
        collision=_whole(job.tokens.collision),
        dtype=name,
        attention=str(getattr(getattr(model, "config", None), "_attn_implementation", "unknown")),
        head=job.head.description,
        plan=job.plan,
    )


def score_grams(
    model: nn.Module,
    prompt_ids: list[int],
    responses: list[list[int]],
    targets: str | list[str],
    *,
    loss_masks: Sequence[Sequence[int] | None] | None = None,
    temperature: float = 1.0,
    include_bias: bool = True,
    token_budget: int | None = None,
    memory_budget: int | None = None,
) -> dict[str, ScoreGram]:
    """Return the score Gram of each target, by its key: `measure_scores` without the per-token numbers.

    Args:
        model: A transformers causal language model.
        prompt_ids: Token ids of the prompt.
        responses: N lists of token ids as sampled, end token included.
        targets: What `resolve_targets` understands, for example "last:qkv".
        loss_masks: Per response 1 on the tokens whose log-probability counts, else 0; None means every token.
        temperature: The logits are divided by it.
        include_bias: Whether a target's bias is part of its parameters.
        token_budget: Padded tokens of a batch; None chooses.
        memory_budget: Bytes for gradients and tiles; None takes most of what is free.

    Raises:
        GradvarError: The request does not fit the model, or a response's gradient is not finite.
    """
    return measure_scores(
        model,
        prompt_ids,
        responses,
        targets,
        loss_masks=loss_masks,
        temperature=temperature,
        include_bias=include_bias,
        token_budget=token_budget,
        memory_budget=memory_budget,
    ).grams


@contextmanager
def prepared(
    model: nn.Module,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    targets: str | Sequence[str],
    *,
    loss_masks: Sequence[Sequence[int] | None] | None = None,
    temperature: float = 1.0,
    token_budget: int | None = None,
    memory_budget: int | None = None,
    rollout_ids: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Job]:
    """Check a request and hold the model ready for `run_pass`; arguments as in `measure_scores`.

    Inside, the model is in eval mode with its parameters frozen, gradients are on, float32 products are float32
    products and autocast is as the caller set it; all is as before on leaving.
    """
    ids = tuple(range(len(responses))) if rollout_ids is None else tuple(rollout_ids)
    masks = check_request(model, prompt_ids, responses, loss_masks, temperature, ids)
    chosen = resolve_targets(model, targets)
    with torch.inference_mode(False), torch.enable_grad(), frozen(model), full_precision():
        head = Head(model, list(prompt_ids)[-_PROBE_TOKENS:])
        tied, tied_scale = check_sharing(model, chosen, head)
        dtype = _model_dtype(model)
        n = len(responses)
        yield Job(
            model=model,
            targets=chosen,
            prompt=list(prompt_ids),
            responses=[list(response) for response in responses],
            masks=masks,
            ids=ids,
            temperature=temperature,
            head=head,
            autocast=Autocast.current(next(model.parameters()).device),
            plan=make_plan(
                chosen,
                [len(prompt_ids) + len(response) - 1 for response in responses],
                dtype=dtype,
                device=next(model.parameters()).device,
                token_budget=token_budget,
                memory_budget=memory_budget,
            ),
            dtype=dtype,
            tied=tied,
            tied_scale=tied_scale,
            tokens=_Tokens(logprobs=[None] * n, entropy=[None] * n, collision=[None] * n),
            report=on_progress or (lambda done: None),
        )


def run_pass(job: Job, blocks: Sequence[Block]) -> list[tuple[Block, GradientStore]]:
    """Run all responses through the model once and keep the gradients of the pass's blocks.

    Where a target's tokens cannot be told apart by response in a batch, each response goes alone.
    """
    done = job.done
    try:
        with job.autocast.off():
            return _run_batches(job, blocks)
    except UnalignedTokensError:
        job.done = done
        job.plan = replace(job.plan, token_budget=1)
        with job.autocast.off():
            return _run_batches(job, blocks)


def _run_batches(job: Job, blocks: Sequence[Block]) -> list[tuple[Block, GradientStore]]:
    device = next(job.model.parameters()).device
    stores = [(block, _new_store(job, block)) for block in blocks]
    heads = [store for _, store in stores if isinstance(store, HeadStore)]
    paths = {block.target.module for block in blocks if block.target.kind != "head"}
    if heads and job.tied is not None:
        paths.add(job.tied)
    first_pass = job.tokens.logprobs[0] is None
    batches = make_batches(job.prompt, job.responses, job.plan.token_budget, device)
    with Taps({path: job.model.get_submodule(path) for path in sorted(paths)}) as taps:
        for batch in batches:
            taps.listen(_collector(job, batch, stores))
            mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
            with job.autocast.on():
                hidden: Tensor = job.head.base(input_ids=batch.input_ids, use_cache=False, **mask).last_hidden_state
            where, tokens, weights, spans = _predictions(job, batch)
            flat = hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, where.to(hidden.device))
            scores = job.head.token_scores(flat, tokens, weights, job.temperature)
            if first_pass:
                _keep_tokens(job, batch, scores, spans)
            for head in heads:
                for i, span in zip(batch.members, spans, strict=True):
                    head.add_output(i, flat[span], tokens[span], weights[span], scores.normaliser[span])
            if paths:
                gradient = torch.zeros_like(hidden).reshape(-1, hidden.shape[-1])
                gradient[where.to(hidden.device)] = scores.hidden_gradient.to(hidden.dtype)
                if hidden.requires_grad:
                    torch.autograd.backward(hidden, gradient.view_as(hidden))
            taps.finish()
            for block, store in stores:
                finite = [store.is_finite(i) for i in batch.members]
                names = [job.ids[i] for i in batch.members]
                _require_finite(names, finite, f"the gradient over {block.target.key}")
            job.done += len(batch.members)
            job.report(job.done // len(job.plan.passes))
    return stores


def _new_store(job: Job, block: Block) -> GradientStore:
    rows, n = block.stop - block.start, len(job.responses)
    kind = compute_dtype(job.dtype)
    if block.target.kind == "head":
        if job.head.weight is None:
            raise GradvarError(
                f"{block.target.key}: this model does more to its logits than this matrix product (soft-capping, "
                "scaling), so the head cannot be measured; choose other targets"
            )
        return HeadStore(n, block.start, rows, job.head.weight, job.head.bias, job.temperature, kind)
    device = next(job.model.get_submodule(block.target.module).parameters()).device
    store = FactorStore if block.keep == "factors" else MatrixStore
    return store(n, rows, block.target.in_features, kind, device)


def _collector(
    job: Job, batch: Batch, stores: Sequence[tuple[Block, GradientStore]]
) -> Callable[[str, Tensor, Tensor], None]:
    """Return the sink that sorts a batch's factors into the stores, response by response."""
    shared: dict[int, tuple[Tensor, list[Tensor]]] = {}  # q, k and v get the same tensor: it is packed and kept once

    def sink(path: str, a: Tensor, delta: Tensor) -> None:
        outputs = batch.split(delta, path)
        if path == job.tied:
            ids = batch.split(a[..., None], path)
            for _, store in stores:
                if isinstance(store, HeadStore):
                    for i, ids_i, delta_i in zip(batch.members, ids, outputs, strict=True):
                        store.add_input(i, ids_i[:, 0], _embedding_gradient(job, ids_i[:, 0], delta_i))
            return
        if id(a) not in shared:
            shared[id(a)] = (a, batch.split(a.detach(), path))
        for block, store in stores:
            if block.target.module == path:
                for i, a_i, delta_i in zip(batch.members, shared[id(a)][1], outputs, strict=True):
                    store.add(i, a_i, delta_i[:, block.start : block.stop])

    return sink


def _embedding_gradient(job: Job, ids: Tensor, outputs: Tensor) -> Tensor:
    """Return (T, D) gradients of the rows that the tokens fed take from the input embedding."""
    embedding = job.model.get_submodule(job.tied or "")
    gradient = outputs.to(compute_dtype(job.dtype)) * job.tied_scale
    skip = getattr(embedding, "padding_idx", None)  # torch gives that row no gradient
    return gradient if skip is None else gradient * (ids != skip)[:, None]


def _predictions(job: Job, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[slice]]:
    """Return flat positions that predict response tokens, those tokens, their weights, and each response's span."""
    length = batch.input_ids.shape[1]
    first = len(job.prompt) - 1
    where: list[int] = []
    tokens: list[int] = []
    weights: list[int] = []
    spans = []
    for row, i in enumerate(batch.members):
        spans.append(slice(len(where), len(where) + len(job.responses[i])))
        where += range(row * length + first, row * length + first + len(job.responses[i]))
        tokens += job.responses[i]
        weights += job.masks[i]
    device = batch.input_ids.device
    kind = compute_dtype(job.dtype)
    return (
        torch.tensor(where, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(weights, dtype=kind, device=device),
        spans,
    )


def _keep_tokens(job: Job, batch: Batch, scores: TokenScores, spans: Sequence[slice]) -> None:
    columns = [x.double().cpu().numpy() for x in (scores.logprobs, scores.entropy, scores.collision)]
    names = [job.ids[i] for i in batch.members]
    _require_finite(names, [bool(np.isfinite(columns[0][span]).all()) for span in spans], "a log-probability")
    for i, span in zip(batch.members, spans, strict=True):
        job.tokens.logprobs[i] = columns[0][span].copy()
        job.tokens.entropy[i] = columns[1][span].copy()
        job.tokens.collision[i] = columns[2][span].copy()


def _whole(values: Sequence[NDArray[np.float64] | None]) -> TokenValues:
    return [value for value in values if value is not None]


def _require_finite(ids: Sequence[int], finite: Sequence[bool], what: str) -> None:
    bad = [str(i) for i, good in zip(ids, finite, strict=True) if not good]
    if bad:
        shown = ", ".join(bad[:10]) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise GradvarError(
            f"{what} is not finite for response {shown}: leave these out, or measure in float32 with eager attention"
        )


def _model_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
