"""The models and response sets that are measured: Qwen2's architecture with random weights, random tokens.

Weights and tokens do not change the arithmetic. The vocabularies are what models of these sizes are given (16,384 and
32,768 entries, input and output embedding tied); Qwen2's own 151,936 would make the 27 M model nearly all embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

MODELS: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "27M": {
        "vocab_size": 16384,
        "hidden_size": 384,
        "intermediate_size": 1408,
        "num_hidden_layers": 10,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "150M": {
        "vocab_size": 32768,
        "hidden_size": 768,
        "intermediate_size": 2688,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
}
SETS = {
    "tiny": "3 to 9 tokens",
    "short": "20 to 100 tokens, uniform",
    "mixed": "50 to 800 tokens, lognormal (median 160, sigma 0.8)",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row block of the table: a model, a response set, the targets."""

    model: str
    """A name in MODELS."""
    responses: str
    """A name in SETS."""
    targets: tuple[str, ...]
    """As `gradvar.score_grams` takes them."""
    count: int = 32
    """N, how many responses."""
    prompt: int = 100
    """Tokens of the prompt that all responses share (a word problem with its template takes 80 to 200)."""

    @property
    def name(self) -> str:
        """A line for people."""
        return f"{self.model}, {self.responses}, {' + '.join(self.targets)}, prompt {self.prompt}, N = {self.count}"


def build_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the model with random weights, the same in every process."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**MODELS[name], tie_word_embeddings=True, max_position_embeddings=4096, use_cache=False)
    model: nn.Module = Qwen2ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():  # transformers starts biases at zero
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.02)
    return model


def parameter_count(name: str) -> int:
    """Return how many parameters the model has, the tied embedding once."""
    with torch.device("meta"):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        model = Qwen2ForCausalLM(Qwen2Config(**MODELS[name], tie_word_embeddings=True))
    return sum(parameter.numel() for parameter in model.parameters())


def draw_lengths(cell: Cell) -> list[int]:
    """Return the N response lengths, the same at every call."""
    rng = np.random.default_rng(1)
    if cell.responses == "tiny":
        return [int(x) for x in rng.integers(3, 10, cell.count)]
    if cell.responses == "short":
        return [int(x) for x in rng.integers(20, 101, cell.count)]
    found: list[int] = []
    while len(found) < cell.count:
        length = round(160 * float(np.exp(rng.normal(0.0, 0.8))))
        if 50 <= length <= 800:
            found.append(length)
    return found


def draw_tokens(cell: Cell) -> tuple[list[int], list[list[int]]]:
    """Return the prompt and the N responses, the same at every call."""
    rng = np.random.default_rng(2)
    vocabulary = MODELS[cell.model]["vocab_size"]
    prompt = [int(x) for x in rng.integers(0, vocabulary, cell.prompt)]
    return prompt, [[int(x) for x in rng.integers(0, vocabulary, length)] for length in draw_lengths(cell)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What every rival is given."""

    model: Any
    prompt: list[int]
    responses: list[list[int]]
    targets: tuple[str, ...]
    modules: tuple[str, ...]
    """Paths of the Linear modules that the targets name."""

    def part(self, members: Sequence[int]) -> Work:
        """Return the same work on some of the responses."""
        return Work(
            model=self.model,
            prompt=self.prompt,
            responses=[self.responses[i] for i in members],
            targets=self.targets,
            modules=self.modules,
        )


def make_work(cell: Cell) -> Work:
    """Build the model and draw the tokens of a cell."""
    from gradvar.gradients import resolve_targets

    model = build_model(cell.model)
    prompt, responses = draw_tokens(cell)
    return Work(
        model=model,
        prompt=prompt,
        responses=responses,
        targets=cell.targets,
        modules=tuple(target.module for target in resolve_targets(model, list(cell.targets))),
    )
