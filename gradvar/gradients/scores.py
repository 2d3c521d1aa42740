"""From responses to score Grams: the model's passes, then small matrices.

    s_i = grad sum_t m_it log pi(o_it | q, o_i,<t) over a target's parameters, m the loss mask;  S_ij = <s_i, s_j>

Shape letters: N responses, L response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gradvar.gradients.gram import GradientStore
from gradvar.gradients.job import Job, TokenValues
from gradvar.gradients.passes import require_finite, run_pass, whole
from gradvar.gradients.plan import Block, Plan
from gradvar.gradients.prepare import prepared
from gradvar.gradients.reweighted import prefix_norms, tau_estimate
from gradvar.gradients.sketch import REPEATS, Sketch, SketchPlan
from gradvar.runs.measures import PrefixNorms, TauEstimate
from gradvar.runs.records import ScoreGram
from gradvar.runs.sketches import GradientSketch


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
    """How logits were made: "linear", with the scale or soft cap found, or "the model's own head"."""
    plan: Plan
    """How the work was split; no result depends on it."""
    taus: dict[str, TauEstimate] = field(default_factory=dict)
    """By target key, sum_t ||grad log pi_t||^2 of each response by random signs; empty without probes."""
    prefixes: dict[str, PrefixNorms] = field(default_factory=dict)
    """By target key, ||s_i^(1..l)||^2 along each response; empty where not asked for."""
    sketches: dict[str, GradientSketch] = field(default_factory=dict)
    """By target key, for products with other prompts' responses; empty where not asked for."""
    changed_in_batches: bool = False
    """Whether a batch was seen to change what a response gives: each was then measured alone. What was measured of this
    model in batches before may be off."""
    unheld: dict[str, str] = field(default_factory=dict)
    """By target key, why its gradient was not held against autograd's own on a response alone; mostly empty."""


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
    host_memory_budget: int | None = None,
    rollout_ids: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
    probes: int = 0,
    seed: int | None = None,
    prefixes: int = 0,
    sketch: SketchPlan | None = None,
    padding_side: str = "right",
    packing: bool | None = None,
    checkpointing: str | None = None,
) -> ScoreMeasurement:
    """Measure the score Grams of one prompt's responses, exactly, and their per-token log-probabilities.

    The model is measured in eval mode (no dropout) and left as it was found.

    Args:
        model: A transformers causal language model; modules that hold no others (norms) may be compiled.
        prompt_ids: Token ids of the prompt.
        responses: N lists of token ids as sampled, end token included.
        targets: What `resolve_targets` understands, for example "last:qkv".
        loss_masks: Per response 1 on the tokens whose log-probability counts, else 0; None means every token.
        temperature: The logits are divided by it.
        include_bias: Whether a target's bias is part of its parameters.
        token_budget: Padded tokens of a batch; None chooses. Changes speed, not results.
        memory_budget: Bytes for everything beside the model, at most (factors, gradients, tiles, activations, logits);
            None takes most of what is free. Changes speed, not results.
        host_memory_budget: Bytes of the host's memory for gradients that the device has no room for, before more passes
            are made; None takes half of what is free beside a CUDA device, else none.
        rollout_ids: Names of the responses, 0 to N - 1 if None.
        on_progress: Called after every batch with the number of responses done so far, of N.
        probes: K random-sign probes for `taus`, one more truncated backward pass for each.
        seed: Of the signs, required with probes. A response's signs depend on it, the prompt and the rollout id alone.
        prefixes: k lengths for `prefixes`, evenly spaced along each response's loss tokens, the last the whole
            response: k - 1 more truncated backward passes.
        sketch: Which `sketches` to make of every gradient, from the same passes.
        padding_side: "right" or "left". Changes nothing in the results; refused where it would.
        packing: Responses one after another in one row, without padding. None does so where the attention
            implementation takes sequences of several lengths (flash attention on CUDA). Changes nothing in the
            results; refused for a model that lets packed sequences see each other.
        checkpointing: "off", "reentrant" or "non_reentrant": above the lowest target a layer's activations are made
            again at backward instead of kept. None honours what is switched on in the model, and switches it on where
            the memory budget asks for it. Changes memory and speed, not results.

    Raises:
        GradvarError: The request does not fit the model or the budget, or a response's gradient is not finite.
    """
    with prepared(
        model,
        prompt_ids,
        responses,
        targets,
        loss_masks=loss_masks,
        temperature=temperature,
        include_bias=include_bias,
        token_budget=token_budget,
        memory_budget=memory_budget,
        host_memory_budget=host_memory_budget,
        rollout_ids=rollout_ids,
        on_progress=on_progress,
        probes=probes,
        seed=seed,
        prefixes=prefixes,
        padding_side=padding_side,
        packing=packing,
        checkpointing=checkpointing,
        sketch=sketch,
    ) as job:
        n, ids = len(responses), job.ids
        sums = {target.key: torch.zeros((n, n), dtype=torch.float64) for target in job.targets}
        sketches = {
            target.key: Sketch(sketch, target.key, (target.out_features, target.in_features), n)
            for target in (job.targets if sketch is not None else [])
            if sketch is not None
        }
        for blocks in job.plan.passes:
            stores = run_pass(job, blocks)
            stores.sort(key=lambda pair: pair[0].home == "device")  # its own first: then there is room for taller tiles
            while stores:  # each is let go before the next pass fills memory again
                block, store = stores.pop()
                tile = job.plan.tile_bytes if block.home == "device" else job.plan.host_tile_bytes
                job.resident.make_room(tile)
                with job.autocast.off():
                    bias = include_bias and block.target.has_bias
                    sums[block.target.key] += _gram(block, store, bias, tile, sketches.get(block.target.key))
                del store
    for key, total in sums.items():
        require_finite(ids, [bool(x) for x in total.diagonal().isfinite()], f"the gradient over {key}")
    extra = _extra_norms(job)
    name = _dtype_name(job, job.dtype)
    names = {target.key: _dtype_name(job, job.dtype_of(target)) for target in job.targets}
    grams = {
        key: ScoreGram(
            target=key,
            matrix=total.numpy(),
            rollout_ids=ids,
            dtype=names[key],
            include_bias=include_bias,
            temperature=float(temperature),
        )
        for key, total in sums.items()
    }
    return ScoreMeasurement(
        grams=grams,
        logprobs=whole(job.tokens.logprobs),
        entropy=whole(job.tokens.entropy),
        collision=whole(job.tokens.collision),
        dtype=name,
        attention=str(getattr(getattr(model, "config", None), "_attn_implementation", "unknown")),
        head=job.head.description,
        plan=job.plan,
        taus={key: tau_estimate(key, norms[:probes], seed or 0) for key, norms in extra.items()} if probes else {},
        prefixes={
            key: prefix_norms(key, norms[probes:], grams[key].gram().diagonal(), job.masks)
            for key, norms in extra.items()
        }
        if prefixes
        else {},
        sketches={
            key: GradientSketch(
                target=key,
                matrix=one.values(),
                rollout_ids=ids,
                seed=one.plan.seed,
                parts=REPEATS,
                include_bias=include_bias,
            )
            for key, one in sketches.items()
        },
        changed_in_batches=job.changed_in_batches,
        unheld=job.unheld,
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
        memory_budget: Bytes for everything beside the model, at most; None takes most of what is free.

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


def _dtype_name(job: Job, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if job.autocast.dtype is None else f"{name} autocast {str(job.autocast.dtype).removeprefix('torch.')}"


def _gram(block: Block, store: GradientStore, bias: bool, tile_bytes: int, sketch: Sketch | None) -> torch.Tensor:
    """Return the Gram of a block; its tiles and biases go into the sketch, where one is made."""
    if sketch is None:
        return store.gram(bias, tile_bytes)
    if bias:
        sketch.add_bias(block.start, store.bias_gradients())
    return store.gram(bias, tile_bytes, lambda start, tile: sketch.add_rows(block.start + start, tile))


def _extra_norms(job: Job) -> dict[str, NDArray[np.float64]]:
    """Return the (K, N) squared norms of the reweighted scores, by target key."""
    shape = (job.extra.count, len(job.responses))
    found = {}
    for target in job.targets:
        norms = job.extra.norms[target.key].numpy() if job.extra.count else np.zeros(shape)
        what = f"the gradient of a probe or prefix over {target.key}"
        require_finite(job.ids, [bool(np.isfinite(column).all()) for column in norms.T], what)
        found[target.key] = norms
    return found
