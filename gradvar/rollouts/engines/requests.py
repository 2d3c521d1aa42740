"""What every sampling engine takes and gives: settings, requests, seeds, end tokens, finished rollouts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradvar.errors import GradvarError
from gradvar.runs.records import Prompt, Rollout

if TYPE_CHECKING:
    from gradvar.models import ModelFolder

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How to sample, the same for every prompt of a run."""

    model: ModelFolder
    """The policy, with its tokenizer."""
    temperature: float = 1.0
    """Softmax temperature; the distribution is changed by nothing else."""
    max_tokens: int = 3072
    """Longest response [tokens], the end token included."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "cpu"
    """Torch device of the transformers engine; vLLM takes the device its build is for."""
    trust_remote_code: bool = False
    """Run code that the model's repository ships."""
    batch_size: int = 128
    """transformers: responses in one batch [responses]. Part of what a seed means."""
    attn_implementation: str | None = None
    """transformers: name of the attention; None leaves the choice to it."""
    tensor_parallel_size: int = 1
    """vLLM: GPUs over which the model is split."""
    gpu_memory_utilization: float = 0.9
    """vLLM: share of the GPU's memory it may take."""
    enforce_eager: bool = False
    """vLLM: leave out compilation and CUDA graphs (always so on the CPU)."""
    log_file: Path | None = None
    """vLLM: where its process writes its log; None keeps only the end of it, for the message should it die."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise GradvarError(f"--temperature: expected a number above 0, received {self.temperature}")
        if self.dtype not in DTYPES:
            raise GradvarError(f"--dtype: expected one of {', '.join(DTYPES)}, received {self.dtype!r}")
        for option, value in (
            ("--max-tokens", self.max_tokens),
            ("--batch-size", self.batch_size),
            ("--tensor-parallel-size", self.tensor_parallel_size),
        ):
            if value < 1:
                raise GradvarError(f"{option}: expected at least 1, received {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise GradvarError(
                f"--gpu-memory-utilization: expected a share above 0 and at most 1, "
                f"received {self.gpu_memory_utilization}"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """One prompt's responses to sample."""

    prompt: Prompt
    """What the model is fed."""
    count: int
    """Responses to sample."""
    first_rollout_id: int = 0
    """Id of the first of them; the others follow."""
    seed: int
    """Seed of this prompt's own generator; `prompt_seed` makes it."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise GradvarError(f"prompt {self.prompt.prompt_id}: expected at least 1 rollout, received {self.count}")


OnPrompt = Callable[[SamplingRequest, list[Rollout]], None]
"""Called once a request, as soon as all its rollouts are there."""
OnProgress = Callable[[int], None]
"""Called with the number of responses finished since the last call."""
SamplingEngine = Callable[[SamplingSettings, Sequence[SamplingRequest], OnPrompt, OnProgress], None]
"""Samples every request, in whatever order, and hands each over whole."""


def prompt_seed(seed: int, prompt_index: int, first_rollout_id: int = 0) -> int:
    """Returns the seed of one prompt's generator, in [0, 2^62).

    It is drawn from SeedSequence((seed, prompt_index)), so that seeds of neighbouring prompts lie far apart: vLLM
    seeds the i-th of n responses with seed + i, and prompts whose seeds lie close would share noise.

    Args:
        seed: The run's seed, not negative.
        prompt_index: The prompt's place in its file.
        first_rollout_id: First rollout to be sampled; when above 0 (a run that grows) it is part of the entropy, so
            that the new rollouts are not the old ones again.
    """
    if seed < 0 or prompt_index < 0 or first_rollout_id < 0:
        raise GradvarError(f"--seed: expected 0 or more, received {min(seed, prompt_index, first_rollout_id)}")
    entropy = (seed, prompt_index) if first_rollout_id == 0 else (seed, prompt_index, first_rollout_id)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(2))


def end_token_ids(model_path: Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns every token id that ends a response, ascending.

    Those are the tokenizer's end token and the `eos_token_id` of generation_config.json (of config.json where the
    model has no generation_config.json, as transformers does).
    """
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (model_path / name).is_file():
            content = json.loads((model_path / name).read_text(encoding="utf-8"))
            listed = content.get("eos_token_id", (content.get("text_config") or {}).get("eos_token_id"))
            found |= set(listed) if isinstance(listed, list) else {listed}
            break
    return tuple(sorted(token for token in found if isinstance(token, int) and token >= 0))


def make_rollout(
    rollout_id: int, token_ids: Sequence[int], logprobs: Sequence[float], end_ids: Collection[int], tokenizer: Any
) -> Rollout:
    """Returns one finished response as a record; its text leaves special tokens out, as verl's does."""
    return Rollout(
        rollout_id=rollout_id,
        token_ids=tuple(token_ids),
        text=tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False),
        finish_reason="stop" if token_ids[-1] in end_ids else "length",
        sampler_logprobs=tuple(logprobs),
    )
