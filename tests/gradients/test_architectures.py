"""Every measurable projection of every architecture against plain autograd, in float64."""

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.gradients import list_targets, measure_scores, resolve_targets
from tests.gradients import references
from tests.gradients.models import CONFIGS, FLOAT32_INSIDE, make_model, make_prompt_and_responses

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TOLERANCE = {name: 2e-5 if name in FLOAT32_INSIDE else 1e-10 for name in CONFIGS}
MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "ernie4_5_moe",
    "minimax",
    "phimoe",
    "llama4",
)
CURVED_HEADS = {
    "gemma2": "linear, soft-capped at 3",
    "cohere": "linear, scaled by 0.3",
    "granite": "linear, scaled by 0.333333",
    "nanochat": "linear, soft-capped at 15",
}
SPLIT = {
    "gpt2": ({"q", "k", "v"}, 16),
    "phi3": ({"q", "k", "v", "gate", "up"}, 8),
    "falcon_multi_query": ({"q", "k", "v"}, 4),
    "gpt_bigcode": ({"q", "k", "v"}, 4),
    "glm4": ({"gate", "up"}, None),
    "mpt": ({"q", "k", "v"}, 16),
}
"""Roles whose rows are contiguous, and the height of the k block; the other fused matrices are interleaved."""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_projection_equals_plain_autograd(name):
    model = make_model(name)
    prompt, responses = make_prompt_and_responses()
    targets = [t for t in list_targets(model) if t.kind != "head"]
    assert targets
    keys = [t.key for t in targets]
    measured = measure_scores(model, prompt, responses, keys, temperature=0.7, token_budget=60)
    expected = references.flat_scores(model, targets, prompt, responses, temperature=0.7)
    assert set(measured.grams) == set(keys)
    for target in targets:
        assert target.parameter_count() == expected[target.key].shape[1]
        gap = references.error(measured.grams[target.key].gram(), references.gram_of(expected[target.key]))
        assert gap < TOLERANCE[name], f"{target.key} ({target.kind}, {target.shape}) is off by {gap:.1e}"
    model.eval()
    for i, response in enumerate(responses):
        log_probs = references.token_log_probs(model, prompt, response, 0.7).detach().numpy()
        np.testing.assert_allclose(measured.logprobs[i], log_probs, rtol=0, atol=TOLERANCE[name])
    assert measured.head == CURVED_HEADS.get(name, "linear")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_with_the_embedding_tied_to_it(name):
    model = make_model(name)
    (head,) = [t for t in list_targets(model) if t.kind == "head"]
    prompt, responses = make_prompt_and_responses()
    gram = measure_scores(model, prompt, responses, head.key, temperature=0.7, token_budget=60).grams[head.key].gram()
    expected = references.flat_scores(model, [head], prompt, responses, temperature=0.7)[head.key]
    assert references.error(gram, references.gram_of(expected)) < TOLERANCE[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_matrices_are_cut_exactly_where_their_rows_are_contiguous(name):
    roles, height = SPLIT.get(name, (set(), None))
    blocks = [t for t in list_targets(make_model(name)) if t.rows is not None]
    assert {t.kind for t in blocks} == roles
    assert {t.out_features for t in blocks if t.kind == "k"} == ({height} if height else set())


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "mamba2"])
def test_presets_find_attention_and_mlp_in_the_last_layer(name):
    model = make_model(name)
    kinds = {t.kind for t in resolve_targets(model, "last:attn")}
    assert "o" in kinds
    assert kinds & {"q", "qkv"}
    kinds = {t.kind for t in resolve_targets(model, "last:mlp")}
    assert {"gate_up", "down"} <= kinds if name in MIXTURES else {"up", "down"} <= kinds


def test_rows_of_a_fused_matrix_are_the_roles_they_are_named_for():
    """v alone decides what the first token's attention gives out; a wrong cut would mix q and k into it."""
    model = make_model("phi3")
    blocks = {t.kind: t.rows for t in list_targets(model) if t.layer == 1 and t.rows is not None}
    assert blocks == {"q": (0, 16), "k": (16, 24), "v": (24, 32), "gate": (0, 24), "up": (24, 48)}


@pytest.mark.parametrize("preset", ["attn", "mlp"])
def test_a_model_without_attention_says_what_it_has(preset):
    with pytest.raises(GradvarError, match=r"matches nothing: these layers have other.*measurable: .*mixer\.in_proj"):
        resolve_targets(make_model("mamba2"), f"last:{preset}")
    assert {t.kind for t in resolve_targets(make_model("mamba2"), "last:all")} == {"other"}


def test_latent_attention_counts_every_projection_to_queries_keys_and_values():
    """DeepSeek makes q of q_a and q_b, k and v of kv_a (with the shared rotary key) and kv_b."""
    names = [t.key.rpartition(".")[2] for t in resolve_targets(make_model("deepseek_v3"), "last:qkv")]
    assert names == ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]


@pytest.mark.parametrize("name", ["gpt2", "phi", "gemma2", "falcon_interleaved", "gpt_oss", "qwen2_moe", "minimax"])
def test_masks_inside_the_response_temperature_and_no_bias_together(name):
    model = make_model(name)
    prompt, responses = make_prompt_and_responses()
    masks = [None, *[[int(t % 5 not in (1, 2)) for t in range(len(r))] for r in responses[1:]]]  # tool output between
    targets = resolve_targets(model, "last:attn,mlp")
    options = {"include_bias": False, "temperature": 1.7}
    measured = measure_scores(
        model, prompt, responses, "last:attn,mlp", loss_masks=masks, token_budget=60, **options
    )  # fmt: skip
    expected = references.flat_scores(model, targets, prompt, responses, masks=masks, **options)
    for target in targets:
        assert expected[target.key].shape[1] == target.parameter_count(include_bias=False)
        gap = references.error(measured.grams[target.key].gram(), references.gram_of(expected[target.key]))
        assert gap < TOLERANCE[name], target.key
