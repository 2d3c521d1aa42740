"""What a policy does on held-out problems: reward, lengths and truncation at temperature 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradvar.demo.countdown import CountdownProblem, check_answer
from gradvar.demo.prompts import format_prompt
from gradvar.rollouts.engines.transformers_engine import decode_batch


@dataclass(frozen=True, kw_only=True)
class PromptRegime:
    """One problem's responses in numbers."""

    nums: list[int]
    """The problem's numbers."""
    target: int
    """The problem's target."""
    responses: int
    """Responses sampled."""
    mean_reward: float
    """Share of right responses."""
    answered: float
    """Share of responses with an answer, right or wrong."""
    length_mean: float
    """Mean length [tokens, end token included]."""
    length_shortest: int
    """Shortest response [tokens]."""
    length_longest: int
    """Longest response [tokens]."""
    truncated: float
    """Share of responses cut off at the limit."""

    @property
    def mixed(self) -> bool:
        """Whether some responses are right and some wrong."""
        return 0 < self.mean_reward < 1


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    count: int,
    max_tokens: int,
    seed: int,
) -> list[list[int]]:
    """Samples responses at temperature 1 from the whole vocabulary.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompt: The prompt's text.
        count: Responses to sample.
        max_tokens: Longest response [tokens].
        seed: Seed of the responses.

    Returns:
        Token ids of every response, up to and with the end token.
    """
    responses = decode_batch(
        model,
        tokenizer.encode(prompt),
        count,
        temperature=1.0,
        max_tokens=max_tokens,
        end_ids=[tokenizer.eos_token_id],
        generator=torch.Generator().manual_seed(seed),
        on_progress=lambda _: None,
    )
    return [token_ids for token_ids, _ in responses]


def measure_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: CountdownProblem,
    *,
    template: str,
    count: int,
    max_tokens: int,
    seed: int,
) -> PromptRegime:
    """Samples responses to one problem (see `sample_responses` for the arguments) and puts them into numbers."""
    prompt = format_prompt(template, problem)
    responses = sample_responses(model, tokenizer, prompt, count=count, max_tokens=max_tokens, seed=seed)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    lengths = np.array([len(response) for response in responses])
    ended = np.array([response[-1] == tokenizer.eos_token_id for response in responses])
    return PromptRegime(
        nums=list(problem.nums),
        target=problem.target,
        responses=count,
        mean_reward=float(np.mean([check_answer(text, problem.nums, problem.target) for text in texts])),
        answered=float(np.mean(["</answer>" in text for text in texts])),
        length_mean=float(lengths.mean()),
        length_shortest=int(lengths.min()),
        length_longest=int(lengths.max()),
        truncated=float(1 - ended.mean()),
    )


def summarise(prompts: Sequence[PromptRegime]) -> dict[str, Any]:
    """Gathers the prompts' numbers, each prompt with the same weight, and lists the prompts themselves."""
    return {
        "prompts": len(prompts),
        "responses_per_prompt": prompts[0].responses,
        "mean_reward": float(np.mean([prompt.mean_reward for prompt in prompts])),
        "mean_reward_lowest": min(prompt.mean_reward for prompt in prompts),
        "mean_reward_highest": max(prompt.mean_reward for prompt in prompts),
        "mixed_prompts": sum(prompt.mixed for prompt in prompts),
        "length_mean": float(np.mean([prompt.length_mean for prompt in prompts])),
        "length_shortest": min(prompt.length_shortest for prompt in prompts),
        "length_longest": max(prompt.length_longest for prompt in prompts),
        "truncated": float(np.mean([prompt.truncated for prompt in prompts])),
        "by_prompt": [{**asdict(prompt), "mixed": prompt.mixed} for prompt in prompts],
    }
