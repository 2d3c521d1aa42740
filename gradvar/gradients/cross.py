"""The exact Gram of several prompts' responses together: every inner product between any two of them.

The gradients of all prompts are kept at one time, so what fits a prompt's budget may take more passes here; the
matrices grow with the square of the number of responses. Where that is too much a sketch (`gradvar.gradients.sketch`)
estimates the same products.
Shape letters: K prompts, N responses of all prompts together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradvar.errors import GradvarError
from gradvar.gradients.devices import input_device
from gradvar.gradients.gram import GradientStore
from gradvar.gradients.job import Job, TokenColumns
from gradvar.gradients.passes import run_pass
from gradvar.gradients.plan import free_memory
from gradvar.gradients.prepare import prepared
from gradvar.gradients.request import check_request
from gradvar.gradients.reweighted import Reweightings
from gradvar.gradients.specs import resolve_targets

MATRICES_SHARE = 0.5
"""Share of the memory budget that the Grams themselves may take."""


class _Joined(GradientStore):
    """The same rows of several prompts' gradients, one prompt after another."""

    def __init__(self, stores: Sequence[GradientStore]) -> None:
        first = stores[0]
        super().__init__(sum(s.responses for s in stores), first.rows, first.columns, first.dtype, first.device)
        self._places = [(store, row) for store in stores for row in range(store.responses)]
        self._bias = torch.stack([store.bias_gradient(row) for store, row in self._places])

    def _keep(self, response: int, a: Tensor, delta: Tensor) -> None:
        raise TypeError("gradients are added to each prompt's own store")

    def fill(self, response: int, start: int, stop: int, out: Tensor) -> None:
        """Write rows [start, stop) of a response's gradient to `out`."""
        store, row = self._places[response]
        store.fill(row, start, stop, out)


def cross_grams(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    targets: str | Sequence[str],
    *,
    loss_masks: Sequence[Sequence[Sequence[int] | None] | None] | None = None,
    temperature: float = 1.0,
    include_bias: bool = True,
    token_budget: int | None = None,
    memory_budget: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    checkpointing: str | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Measure the exact inner products of all responses to several prompts.

    Args:
        model: A transformers causal language model.
        prompts: K prompts' token ids.
        responses: Their responses' token ids.
        targets: What `resolve_targets` understands.
        loss_masks: By prompt and response, 1 on the tokens that count; None means every token.
        temperature: The logits are divided by it.
        include_bias: Whether a target's bias is part of its parameters.
        token_budget: Padded tokens of a batch; None chooses.
        memory_budget: Bytes that measuring may take; None takes most of what is free.
        on_progress: Called after every batch with the number of responses done so far, of N.
        checkpointing: As in `measure_scores`.

    Returns:
        By target key, the (N, N) float64 Gram, prompts in order; the blocks on its diagonal are the prompts' Grams.

    Raises:
        GradvarError: The request does not fit the model or the budget, or a gradient is not finite.
    """
    if not prompts or len(prompts) != len(responses):
        raise GradvarError(f"expected responses for each of {len(prompts)} prompts, received {len(responses)}")
    masks_of = [None] * len(prompts) if loss_masks is None else list(loss_masks)
    everything = [response for of_prompt in responses for response in of_prompt]
    count = len(everything)
    _check_matrices(model, count, targets, memory_budget)
    longest = max(range(len(prompts)), key=lambda k: len(prompts[k]))
    flat_masks = [
        mask
        for of_prompt, masks in zip(responses, masks_of, strict=True)
        for mask in (masks if masks is not None else [None] * len(of_prompt))
    ]
    jobs: list[Job] = []

    def report(of_prompt: int) -> None:  # each prompt counts its own
        if on_progress is not None:
            on_progress(sum(job.done for job in jobs) // len(jobs[0].plan.passes))

    # planned as if all responses had the longest prompt, which is at most too careful
    with prepared(
        model,
        prompts[longest],
        everything,
        targets,
        loss_masks=flat_masks,
        temperature=temperature,
        include_bias=include_bias,
        token_budget=token_budget,
        memory_budget=memory_budget,
        host_memory_budget=0,  # all prompts' gradients are in use together, in low tiles
        checkpointing=checkpointing,
    ) as whole:
        jobs += [
            _job_of(whole, prompt, of_prompt, masks, report)
            for prompt, of_prompt, masks in zip(prompts, responses, masks_of, strict=True)
        ]
        sums = {target.key: torch.zeros((count, count), dtype=torch.float64) for target in whole.targets}
        for blocks in whole.plan.passes:
            stores = [run_pass(job, blocks) for job in jobs]
            for place, block in enumerate(blocks):
                whole.resident.make_room(whole.plan.tile_bytes)
                with whole.autocast.off():
                    joined = _Joined([of_prompt[place][1] for of_prompt in stores])
                    bias = include_bias and block.target.has_bias
                    sums[block.target.key] += joined.gram(bias, whole.plan.tile_bytes)
    return {key: total.numpy() for key, total in sums.items()}


def _job_of(
    whole: Job,
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int] | None] | None,
    report: Callable[[int], None],
) -> Job:
    n = len(responses)
    ids = tuple(range(n))
    return replace(
        whole,
        prompt=list(prompt),
        responses=[list(response) for response in responses],
        masks=check_request(whole.model, prompt, responses, masks, whole.temperature, ids),
        ids=ids,
        tokens=TokenColumns(logprobs=[None] * n, entropy=[None] * n, collision=[None] * n),
        extra=Reweightings(weights=[], include_bias=True),
        report=report,
        done=0,
    )


def _check_matrices(model: nn.Module, count: int, targets: str | Sequence[str], memory_budget: int | None) -> None:
    """Refuse matrices that take too much of the budget, in one line that says what would do."""
    chosen = resolve_targets(model, targets)
    budget = memory_budget if memory_budget is not None else free_memory(input_device(model))
    needed = 8 * count**2 * (len(chosen) + 2)  # the sums, a product, its transpose
    if needed > MATRICES_SHARE * budget:
        raise GradvarError(
            f"exact products of {count} responses over {len(chosen)} targets take {needed / 2**30:.2g} GiB for their "
            f"matrices alone, more than {MATRICES_SHARE:.0%} of the {budget / 2**30:.2g} GiB there are: choose fewer "
            "targets, give more memory, or use a sketch"
        )
