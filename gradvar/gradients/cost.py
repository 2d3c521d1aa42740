"""What a planned measurement would take: memory and arithmetic, from the plan and short probes of the model.

Shape letters: N responses, T tokens fed, L response tokens, D hidden width, V vocabulary, R rows and I columns of a
block.
"""

from __future__ import annotations

import torch
from torch import nn

from gradvar.gradients.gram import piece
from gradvar.gradients.job import Job
from gradvar.gradients.lane import IN_FLIGHT
from gradvar.gradients.logprobs import VOCABULARY_TILE, compute_dtype
from gradvar.gradients.plan import Block, Cost, Plan, aligned_rows, aligned_tokens, device_bytes, host_bytes
from gradvar.gradients.sketch import SketchPlan
from gradvar.gradients.targets import Target, decoder_layers
from gradvar.gradients.usage import Growth, flop, peak_bytes


def width(dtype: torch.dtype) -> int:
    """Return the bytes of an entry."""
    return torch.finfo(dtype).bits // 8


def work_bytes(job: Job, peak: Growth, token_budget: int, chunk_bytes: int) -> tuple[int, int]:
    """Return the bytes of the largest batch beside what is kept: of its forward and backward, of its log-probabilities.

    Args:
        job: The request.
        peak: Of a batch's forward and backward.
        token_budget: Padded tokens of a batch.
        chunk_bytes: A chunk of logits.
    """
    own, kept, wide = width(job.dtype), width(job.factor_dtype), width(compute_dtype(job.dtype))
    vocabulary, hidden = job.head.shape()
    states = job.dtype if job.autocast.dtype is None else job.autocast.dtype
    direct = [t.in_features * t.out_features * (own + wide) for t in job.targets if t.direct is not None]
    runs, logits = [], []
    for batch in job.batches(token_budget):
        rows, length = batch.input_ids.shape
        fed = sum(job.lengths[i] for i in batch.members)
        predicted = sum(len(job.responses[i]) for i in batch.members)
        copies = fed * kept * max(_sides(target) for target in job.targets) if batch.real is not None else 0
        copies += _casts(job, max(job.lengths[i] for i in batch.members)) + max(direct, default=0)
        if job.extra.count:  # the factors of the batch, whatever is kept of them otherwise
            copies += fed * kept * sum(_sides(target) for target in job.targets)
            copies += predicted * hidden * wide  # the gradient at the last hidden states, reweighted
        runs.append(peak.at(length, rows) + rows * length * hidden * own + copies)
        chunk = min(max(chunk_bytes, vocabulary * wide), predicted * vocabulary * wide)
        columns = predicted * hidden * (own + 3 * wide)
        logits.append(job.head.alive_bytes(chunk, states) + columns)
    if job.head.is_linear and own != wide and job.device.type == "cpu":
        logits = [each + VOCABULARY_TILE * hidden * wide for each in logits]
    return round(max(runs)), max(logits)


def tile_casts(job: Job) -> int:
    """Return the bytes beside the tile while one response's rows are made."""
    rows = max((target.out_features for target in job.targets if target.kind == "head"), default=0)
    longest = max(job.lengths)
    return _casts(job, longest) + 3 * min(max(piece(job.device), longest), longest * rows) * width(
        compute_dtype(job.dtype)
    )


def staging_bytes(job: Job) -> int:
    """Return the bytes on the device of responses' factors on their way to the host's memory or back."""
    targets = [target for target in job.targets if target.kind != "head"]
    sides = max((_sides(target) for target in targets), default=0)
    product = min(piece(job.device), max((target.in_features * target.out_features for target in targets), default=0))
    at_once = IN_FLIGHT if job.device.type == "cuda" else 1
    return at_once * aligned_tokens(max(job.lengths)) * sides * width(job.factor_dtype) + product * width(
        compute_dtype(job.dtype)
    )


def transfer_bytes(job: Job, plan: Plan) -> int:
    """Return the bytes that a plan copies to the host's memory and back."""
    return sum(_transfer(job, block, plan.host_tile_bytes) for blocks in plan.passes for block in blocks)


def _transfer(job: Job, block: Block, tile_bytes: int) -> int:
    """Return the bytes that are copied to the host and, for each tile of the Gram, back."""
    if block.home == "device":
        return 0
    if block.keep == "matrices":
        return 2 * block.bytes
    rows, row = block.stop - block.start, len(job.lengths) * block.target.in_features * width(compute_dtype(job.dtype))
    tiles = -(-rows // aligned_rows(rows, max(1, tile_bytes // row)))
    inputs = sum(job.lengths) * block.target.in_features * width(job.factor_dtype)
    deltas = sum(map(aligned_tokens, job.lengths)) * rows * width(job.factor_dtype)
    return block.bytes + tiles * inputs + deltas


def token_flop(job: Job) -> float:
    """Return about what a token takes forward and back to the lowest target, from the parameters that it meets."""
    lowest = min((target.layer for target in job.targets if target.layer is not None), default=0)
    met = [_met(job.model, layer) for _, layer in decoder_layers(job.model)]
    vocabulary, hidden = job.head.shape()
    return 2 * (sum(met) + sum(met[lowest:])) + 4 * vocabulary * hidden


def _met(model: nn.Module, layer: nn.Module) -> float:
    """Return how many of a layer's parameters a token meets: of experts those that it is sent to."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    counts = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    all_of_them = max((count for count in counts if isinstance(count, int)), default=0)
    chosen = getattr(config, "num_experts_per_tok", None)
    share = chosen / all_of_them if isinstance(chosen, int) and 0 < chosen < all_of_them else 1.0
    return sum(
        parameter.numel() * (share if ".experts." in f".{name}." else 1.0)
        for name, parameter in layer.named_parameters()
    )


def offloaded_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that accelerate brings to the device for every batch."""
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters() if parameter.is_meta)


def fixed_bytes(job: Job) -> int:
    """Return the bytes of the results: the Grams."""
    return 8 * len(job.responses) ** 2 * (len(job.targets) + 3)


def _sides(target: Target) -> int:
    return target.in_features + target.out_features


def _casts(job: Job, longest: int) -> int:
    """Return the bytes of one response's factors in the compute dtype and of a piece of their product."""
    wide = compute_dtype(job.dtype)
    if job.dtype == wide:
        return 0
    product = min(piece(job.device), max(target.in_features * target.out_features for target in job.targets))
    return (longest * max(_sides(target) for target in job.targets) + product) * width(wide)


def sketch_bytes(job: Job, sketch: SketchPlan | None) -> int:
    """Return the bytes of the targets' sketches and of making them."""
    shapes = [(target.out_features, target.in_features) for target in job.targets]
    return 0 if sketch is None else sketch.bytes(shapes, len(job.responses), job.device)


def cost_of(job: Job, plan: Plan, extra: int, sketches: int = 0) -> Cost:
    """Return what a plan takes.

    Args:
        job: The request.
        plan: How it is split.
        extra: Backward passes beside the first.
        sketches: Bytes of sketches.
    """
    n = len(job.responses)
    how = (plan.checkpointing, plan.token_budget)
    run, logits = work_bytes(job, peak_bytes(job, None, *how), plan.token_budget, plan.chunk_bytes)
    usage = [flop(job, blocks, *how) for blocks in plan.passes]
    batches = job.batches(plan.token_budget)
    shapes = [tuple(batch.input_ids.shape) for batch in batches]
    predicted = sum(len(response) for response in job.responses)
    vocabulary, hidden = job.head.shape()
    forward = sum(one.forward.at(length, rows) for one in usage for rows, length in shapes)
    backward = sum(one.backward.at(length, rows) for one in usage for rows, length in shapes)
    head = len(plan.passes) * 2 * predicted * vocabulary * hidden
    gram = gradients = 0
    tallest = {"device": 0, "host": 0}
    for block in (block for blocks in plan.passes for block in blocks):
        tokens = 2 * predicted if block.target.kind == "head" else sum(job.lengths)  # the head's logits are made again
        area = (block.stop - block.start) * block.target.in_features
        tallest[block.home] = max(tallest[block.home], n * area * width(compute_dtype(job.dtype)))
        gradients += 2 * tokens * area
        gram += 2 * n * n * area
    hosted = [[block for block in blocks if block.home == "host"] for blocks in plan.passes]
    staging = staging_bytes(job) if any(hosted) else 0
    biases = max(device_bytes(blocks, n) for blocks in hosted)
    own = fixed_bytes(job) + sketches
    host_tile = min(plan.host_tile_bytes, tallest["host"]) + tile_casts(job) + staging + biases + own
    return Cost(
        batches=len(batches),
        tokens=sum(job.lengths),
        padded_tokens=sum(rows * length for rows, length in shapes),
        kept_bytes=max(device_bytes(blocks, n) for blocks in plan.passes) + own,
        host_bytes=max(host_bytes(blocks) for blocks in plan.passes),
        transfer_bytes=transfer_bytes(job, plan),
        tile_bytes=min(plan.tile_bytes, tallest["device"]) + tile_casts(job),
        host_tile_bytes=host_tile if any(hosted) else 0,
        activation_bytes=run + plan.trunk_bytes + staging,
        logits_bytes=logits,
        forward_flop=round(forward) + head,
        backward_flop=round((1 + extra) * backward) + head,
        gram_flop=(1 + extra) * gradients + gram,
    )
