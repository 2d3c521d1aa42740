"""How far rounding moves the gradients: chosen responses again in float32, alone, with plain attention.

Shape letters: N responses, L response tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradvar.errors import GradvarError
from gradvar.gradients.fit import default_budget
from gradvar.gradients.gram import GradientStore
from gradvar.gradients.job import Job, TokenValues
from gradvar.gradients.passes import run_pass, whole
from gradvar.gradients.prepare import prepared


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """One response over one target: as the model is, in batches, against float32 alone."""

    target: str
    rollout_id: int
    cosine: float
    """Cosine of the two score gradients; NaN where one is zero."""
    gradient_error: float
    """||s - s_ref|| / ||s_ref||."""
    norm_error: float
    """||s|| / ||s_ref|| - 1."""
    deviation_error: float
    """D / D_ref - 1, D = ||s_i - mean s||^2 over the responses checked; NaN for a single response."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionCheck:
    """What `check_precision` found."""

    rows: list[PrecisionRow]
    logprobs: TokenValues
    """Per response, (L,) log pi as the model is, in nats."""
    reference_logprobs: TokenValues
    """The same in float32, alone."""


def float32_reference(model: nn.Module) -> nn.Module:
    """Return a copy of the model in float32 (float64 stays) with plain ("eager") attention."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise GradvarError("part of the model is offloaded, so no float32 copy of it can be made: pass the reference")
    reference = copy.deepcopy(model)
    if next(p.dtype for p in reference.parameters() if p.is_floating_point()) != torch.float64:
        reference = reference.float()
    setter = getattr(reference, "set_attn_implementation", None)
    if setter is not None:
        setter("eager")
    return reference


def check_precision(
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
    reference: nn.Module | None = None,
) -> PrecisionCheck:
    """Measure responses twice, as the run does and in float32 one at a time, and compare gradient with gradient.

    Args:
        model: The causal language model as the run has it.
        prompt_ids: Token ids of the prompt.
        responses: The responses to check; a few are enough.
        targets: What `resolve_targets` understands.
        loss_masks: As in `measure_scores`.
        temperature: As in `measure_scores`.
        include_bias: As in `measure_scores`.
        token_budget: Padded tokens of a batch of the first measurement; None chooses.
        memory_budget: As in `measure_scores`.
        rollout_ids: Names of the responses, 0 to N - 1 if None.
        reference: The model to trust; None makes a float32 copy with plain attention, beside the model in memory.

    Raises:
        GradvarError: As in `measure_scores`, or the reference has other targets than the model.
    """
    trusted = float32_reference(model) if reference is None else reference
    # both keep their gradients at one time, the reference perhaps in twice as many bytes
    third = (default_budget(model) if memory_budget is None else memory_budget) // 3
    options = {
        "loss_masks": loss_masks,
        "temperature": temperature,
        "memory_budget": third,
        "host_memory_budget": 0,
        "rollout_ids": rollout_ids,
    }
    n = len(responses)
    sums: dict[str, list[Tensor]] = {}
    with (
        prepared(model, prompt_ids, responses, targets, token_budget=token_budget, **options) as job,
        prepared(trusted, prompt_ids, responses, targets, token_budget=1, **options) as other,
    ):
        if [t.key for t in job.targets] != [t.key for t in other.targets]:
            raise GradvarError("the reference model has other targets than the model: expected a copy of it")
        for blocks in job.plan.passes:
            for (block, store), (_, twin) in zip(run_pass(job, blocks), run_pass(other, blocks), strict=True):
                bias = include_bias and block.target.has_bias
                parts = sums.setdefault(block.target.key, [torch.zeros((n, n), dtype=torch.float64) for _ in range(3)])
                tile = job.plan.tile_bytes
                parts[0] += store.gram(bias, tile)
                parts[1] += twin.gram(bias, tile)
                parts[2] += _differences(store, twin, bias)
    rows = [
        row for key, (own, exact, difference) in sums.items()
        for row in _compare(key, job, own.numpy(), exact.numpy(), difference.numpy())
    ]  # fmt: skip
    return PrecisionCheck(
        rows=rows, logprobs=whole(job.tokens.logprobs), reference_logprobs=whole(other.tokens.logprobs)
    )


def _differences(store: GradientStore, twin: GradientStore, include_bias: bool) -> Tensor:
    """Return diag(||s - s_ref||^2), (N, N) with zeros elsewhere: differences are taken before squaring."""
    height = max(1, min(store.rows, (1 << 22) // store.columns))
    total = torch.zeros(store.responses, dtype=torch.float64)
    for response in range(store.responses):
        for start in range(0, store.rows, height):
            stop = min(start + height, store.rows)
            one = torch.empty((stop - start, store.columns), dtype=store.dtype, device=store.device)
            two = torch.empty((stop - start, twin.columns), dtype=twin.dtype, device=twin.device)
            store.fill(response, start, stop, one)
            twin.fill(response, start, stop, two)
            total[response] += float((one.cpu().double() - two.cpu().double()).square().sum())
        if include_bias:
            gap = store.bias_gradient(response).cpu() - twin.bias_gradient(response).cpu()
            total[response] += float(gap.square().sum())
    return torch.diag(total)


def _compare(
    key: str,
    job: Job,
    own: NDArray[np.float64],
    exact: NDArray[np.float64],
    difference: NDArray[np.float64],
) -> list[PrecisionRow]:
    a, b = np.sqrt(np.diag(own)), np.sqrt(np.diag(exact))
    gap = np.diag(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (a**2 + b**2 - gap) / (2 * a * b)
        deviation = _deviations(own) / _deviations(exact) - 1 if len(a) > 1 else np.full(1, np.nan)
        error, norm = np.sqrt(gap) / b, a / b - 1
    return [
        PrecisionRow(
            target=key,
            rollout_id=name,
            cosine=float(cosine[i]),
            gradient_error=float(error[i]),
            norm_error=float(norm[i]),
            deviation_error=float(deviation[i]),
        )
        for i, name in enumerate(job.ids)
    ]


def _deviations(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.diag(gram) - 2 * gram.mean(1) + gram.mean()
    return values
