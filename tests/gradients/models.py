"""Tiny random models of many architectures, built from their transformers configs."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, plan_measurement
from tests.gradients import references

VOCABULARY = 37
SPECS = ["all:qkv", "last:o,mlp"]
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_GROUPS = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SPECIAL}


def _common(**changes):
    return {**_COMMON, **changes}


CONFIGS: dict[str, tuple[str, dict]] = {
    "qwen2": ("Qwen2Config", _common()),
    "qwen2_tied": ("Qwen2Config", _common(tie_word_embeddings=True)),
    "llama": ("LlamaConfig", _common()),
    "llama_biases": ("LlamaConfig", _common(attention_bias=True, mlp_bias=True)),
    "gpt2": ("GPT2Config", _GPT2),
    "qwen3": ("Qwen3Config", _common(head_dim=8)),
    "mistral": ("MistralConfig", _common(sliding_window=6)),
    "gemma": ("GemmaConfig", _common(head_dim=4)),
    "gemma2": (
        "Gemma2Config",
        _common(
            head_dim=4,
            final_logit_softcapping=3.0,
            attn_logit_softcapping=2.0,
            sliding_window=6,
            query_pre_attn_scalar=4,
        ),
    ),
    "gemma3": ("Gemma3TextConfig", _common(head_dim=4, sliding_window=6, query_pre_attn_scalar=4)),
    "phi3": ("Phi3Config", _common()),
    "phi": ("PhiConfig", _common()),
    "gpt_neox": ("GPTNeoXConfig", _NO_GROUPS),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 8,
            **_SPECIAL,
        },
    ),
    "falcon_multi_query": (
        "FalconConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, **_SPECIAL},
    ),
    "falcon_interleaved": (
        "FalconConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": True,
            **_SPECIAL,
        },
    ),
    "stablelm": ("StableLmConfig", _common(use_qkv_bias=True)),
    "olmo2": ("Olmo2Config", _common()),
    "cohere": ("CohereConfig", _common(logit_scale=0.3)),
    "granite": (
        "GraniteConfig",
        _common(logits_scaling=3.0, attention_multiplier=0.4, residual_multiplier=0.7, embedding_multiplier=2.0),
    ),
    "starcoder2": ("Starcoder2Config", _common()),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT2),
    "persimmon": ("PersimmonConfig", _NO_GROUPS),
    "glm4": ("Glm4Config", _common(head_dim=8)),
    "nemotron": ("NemotronConfig", _common()),
    "nanochat": ("NanoChatConfig", _common()),
    "lfm2": ("Lfm2Config", _common(layer_types=["conv", "full_attention"])),
    "mixtral": ("MixtralConfig", _common(num_local_experts=3)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _common(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=12),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        _common(
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
            first_k_dense_replace=1,
            num_key_value_heads=4,
        ),
    ),
    "gpt_oss": (
        "GptOssConfig",
        _common(num_local_experts=3, num_experts_per_tok=2, head_dim=4, sliding_window=6),
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _common(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=4)),
    "olmo3": ("Olmo3Config", _common(sliding_window=6)),
    "smollm3": ("SmolLM3Config", _common()),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        _common(moe_num_experts=3, moe_k=2, moe_intermediate_size=8, moe_layer_start_index=1),
    ),
    "hunyuan": ("HunYuanDenseV1Config", _common(head_dim=4)),
    "minimax": ("MiniMaxConfig", _common(num_local_experts=3, head_dim=4, block_size=8)),
    "qwen3_next": (
        "Qwen3NextConfig",
        _common(
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=12,
            head_dim=4,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "phimoe": ("PhimoeConfig", _common(num_local_experts=3)),
    "llama4": (
        "Llama4TextConfig",
        _common(
            num_local_experts=3,
            intermediate_size_mlp=24,
            head_dim=4,
            attention_chunk_size=8,
            interleave_moe_layer_step=2,
        ),
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        _common(
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
            first_k_dense_replace=1,
            num_key_value_heads=4,
        ),
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 8,
            "state_size": 4,
            "n_groups": 1,
            "chunk_size": 8,
            **_SPECIAL,
        },
    ),
    # these compute rotary angles, alibi or the attention's softmax in float32 whatever the model's dtype
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": 64,
            **_SPECIAL,
        },
    ),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 2}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4, **_SPECIAL}),
    "mpt": ("MptConfig", {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
}
FLOAT32_INSIDE = (
    "deepseek_v2",
    "deepseek_v3",
    "llama4",
    "qwen3_next",
    "mamba2",
    "gpt_neo",
    "gptj",
    "bloom",
    "mpt",
    "ernie4_5_moe",  # its router
    "gemma2",  # eager attention's softmax
)


def make_model(name: str, dtype: torch.dtype = torch.float64, **changes):
    """A model with all weights (norms and biases too) moved off their initial values, in training mode as it comes."""
    config_name, values = CONFIGS[name]
    config = getattr(transformers, config_name)(**{**values, **changes})
    torch.manual_seed(0)
    options = {"attn_implementation": "eager"} if name == "gemma2" else {}  # sdpa leaves out its soft cap
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", **options).to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.to(dtype)


def make_prompt_and_responses(lengths=(1, 2, 17, 9, 30, 4), prompt=5, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    return tokens(prompt), [tokens(length) for length in lengths]


def state(model):
    """Everything about a model that a measurement must leave as it was."""
    return (
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        [m.__dict__.get("forward") for m in model.modules()],
        [p.dtype for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.is_grad_enabled(),
    )


def uneven(name="qwen2"):
    """A model in a state of its own: part frozen, part in training mode."""
    model = make_model(name, attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


def least_budget(model, prompt, responses, targets, **options):
    """The smallest memory budget that the planner takes, as it names it."""
    with pytest.raises(GradvarError, match=r"expected at least \d+ bytes") as caught:
        plan_measurement(model, prompt, responses, targets, memory_budget=1, **options)
    return int(str(caught.value).split("at least ")[1].split()[0])


def grams(model, prompt, responses, specs=SPECS, **options):
    """Gram matrices by target key."""
    return {key: g.gram() for key, g in measure_scores(model, prompt, responses, specs, **options).grams.items()}


def largest_gap(one, other):
    """The largest relative gap of two measurements' Grams."""
    assert one.keys() == other.keys()
    return max(references.error(one[key], other[key]) for key in one)
