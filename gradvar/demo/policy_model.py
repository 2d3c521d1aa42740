"""The bundled policy's architecture: a small Qwen2, untrained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

MAX_POSITIONS = 2048
"""Longest prompt and response together [tokens]."""

_PERIODS = (2, 3, 4, 5, 7, 10, 20, 33, 50, 100, 150, 200)


@dataclass(frozen=True, kw_only=True)
class PolicySize:
    """The sizes of the policy; vLLM's attention on a CPU wants heads of 32, 64, 80, 96, 112, 128, ... values."""

    hidden: int = 128
    """Width of the residual stream."""
    feed_forward: int = 384
    """Width inside the feed-forward block."""
    layers: int = 4
    """Decoder layers."""
    heads: int = 4
    """Query heads."""
    key_value_heads: int = 2
    """Key and value heads, shared by the query heads."""
    head_dim: int = 32
    """Width of a head."""


def build_policy(size: PolicySize, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Qwen2ForCausalLM:
    """Builds the untrained policy.

    The embeddings of number tokens start as cosines and sines of the number at several periods, which makes sums and
    products easier to find; everything else starts as transformers starts it.

    Args:
        size: Its sizes.
        tokenizer: Gives the vocabulary and the end and padding tokens.
        seed: Seed of the initial weights; torch's generator is put back afterwards.

    Returns:
        The model, in float32 and on the CPU, with a generation configuration that changes no probability.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    _structure_numbers(model, tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _structure_numbers(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings = model.get_input_embeddings().weight
    for token, index in tokenizer.get_vocab().items():
        if token.isascii() and token.isdigit():
            angles = [2 * math.pi * int(token) / period for period in _PERIODS]
            waves = torch.tensor([wave(angle) for angle in angles for wave in (math.cos, math.sin)])
            with torch.no_grad():
                embeddings[index, : len(waves)] = 0.04 * waves
