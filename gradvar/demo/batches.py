"""Training batches: search traces as token ids, gathered by length so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gradvar.demo.countdown import CountdownProblem
from gradvar.demo.prompts import format_prompt
from gradvar.demo.traces import TraceSettings, search_trace

IGNORED_LABEL = -100
"""Label of a token that carries no loss: prompt and padding."""

_TRACES_PER_POOL = 4096


@dataclass(frozen=True)
class Batch:
    """Traces of similar length, padded on the right (where causal attention needs no mask)."""

    token_ids: torch.Tensor
    """Prompt, response and end token (B, T), int64."""
    labels: torch.Tensor
    """The same ids (B, T), with `IGNORED_LABEL` where no loss is taken."""


def trace_batches(
    problems: Sequence[CountdownProblem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    settings: TraceSettings,
    tokens_per_batch: int,
    rng: np.random.Generator,
) -> Iterator[Batch]:
    """Yields batches of fresh traces of the given problems, without end.

    Args:
        problems: Problems to search, each drawn with the same probability, numbers in a random order.
        tokenizer: Turns text into ids.
        template: The prompt's template.
        settings: How the traces search.
        tokens_per_batch: Most tokens in a batch, padding included.
        rng: Source of all randomness; it alone decides what is yielded.

    Yields:
        Batches, in random order within pools of some thousand traces.
    """
    while True:
        pool = []
        for index in rng.integers(len(problems), size=_TRACES_PER_POOL):
            problem = problems[index]
            nums = tuple(problem.nums[i] for i in rng.permutation(len(problem.nums)))
            shuffled = CountdownProblem(nums, problem.target)
            prompt_ids = tokenizer.encode(format_prompt(template, shuffled))
            trace_ids = tokenizer.encode(search_trace(shuffled, settings=settings, rng=rng))
            pool.append((prompt_ids, [*trace_ids, tokenizer.eos_token_id]))
        pool.sort(key=lambda ids: len(ids[0]) + len(ids[1]))
        groups = _group_by_tokens([len(p) + len(r) for p, r in pool], tokens_per_batch)
        for k in rng.permutation(len(groups)):
            yield _pad(pool[groups[k]], tokenizer.pad_token_id)


def _group_by_tokens(lengths: Sequence[int], limit: int) -> list[slice]:
    """Cuts ascending lengths into runs whose padded size is at most `limit` tokens (or a single trace)."""
    groups, start = [], 0
    for i, length in enumerate(lengths):
        if i > start and (i + 1 - start) * length > limit:
            groups.append(slice(start, i))
            start = i
    groups.append(slice(start, len(lengths)))
    return groups


def _pad(traces: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> Batch:
    width = max(len(prompt) + len(response) for prompt, response in traces)
    token_ids = torch.full((len(traces), width), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(traces), width), IGNORED_LABEL, dtype=torch.int64)
    for row, (prompt, response) in enumerate(traces):
        end = len(prompt) + len(response)
        token_ids[row, :end] = torch.tensor([*prompt, *response])
        labels[row, len(prompt) : end] = torch.tensor(response)
    return Batch(token_ids, labels)
