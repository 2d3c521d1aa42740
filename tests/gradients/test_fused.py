"""The rows of fused projections at widths that people use, whatever the dtype and the attention kernel."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

from gradvar.gradients import list_targets
from tests.gradients.models import make_model

GPT2_SMALL = GPT2Config(vocab_size=100, n_layer=1)
PHI3 = Phi3Config(
    vocab_size=100, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=4, pad_token_id=0,
)  # fmt: skip


def blocks(model):
    return {t.kind: t.rows for t in list_targets(model) if t.rows is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", [0, 1])
def test_real_widths_are_cut_whatever_the_weights(dtype, attention, seed):
    torch.manual_seed(seed)
    gpt2 = AutoModelForCausalLM.from_config(GPT2_SMALL, attn_implementation=attention).to(dtype)
    assert blocks(gpt2) == {"q": (0, 768), "k": (768, 1536), "v": (1536, 2304)}
    phi3 = AutoModelForCausalLM.from_config(PHI3, attn_implementation=attention).to(dtype)
    attended = {"q": (0, 512), "k": (512, 768), "v": (768, 1024)}
    assert blocks(phi3) == {**attended, "gate": (0, 1024), "up": (1024, 2048)}


def test_layers_of_one_class_and_height_with_other_heads_are_cut_each_as_it_is():
    model = make_model("phi3")
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config.num_attention_heads, attention.config.num_key_value_heads = 6, 1
    attention.num_key_value_heads, attention.num_key_value_groups = 1, 6
    attention.o_proj = nn.Linear(24, 16, bias=False, dtype=torch.float64)
    rows = {(t.layer, t.kind): t.rows for t in list_targets(model) if t.kind in "qkv" and t.rows}
    assert [rows[0, kind] for kind in "qkv"] == [(0, 16), (16, 24), (24, 32)]
    assert [rows[1, kind] for kind in "qkv"] == [(0, 24), (24, 28), (28, 32)]
