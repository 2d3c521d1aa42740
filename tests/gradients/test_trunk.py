"""The prompt shared by the layers below the lowest target: the same Gram as whole sequences give, in float64."""

import numpy as np
import pytest
import torch
import transformers

from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, plan_measurement, resolve_targets, trunk
from gradvar.gradients.usage import LiveBytes
from tests.gradients import references
from tests.gradients.models import CONFIGS, FLOAT32_INSIDE, least_budget, make_model, make_prompt_and_responses, state

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

WHOLE = ("lfm2", "minimax", "qwen3_next", "gpt_neo", "gptj", "bloom", "mpt")
"""Models whose layers hand on attention weights beside their states, or keep more than keys and values."""
LENGTHS = (1, 2, 17, 9, 30, 4)


@pytest.fixture
def calls(monkeypatch):
    """How often a batch went through a trunk and not through all layers."""
    seen = []
    own = trunk.Trunk.__call__

    def counted(self, batch):
        seen.append(self._length)
        return own(self, batch)

    monkeypatch.setattr(trunk.Trunk, "__call__", counted)
    return seen


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "mamba2"])
def test_sharing_the_prompt_gives_plain_autograds_gram(name, calls):
    model = make_model(name)
    prompt, responses = make_prompt_and_responses(LENGTHS, prompt=20)  # beyond the sliding windows of 6
    targets = resolve_targets(model, "last:attn")
    before = state(model)
    measured = measure_scores(model, prompt, responses, "last:attn", temperature=0.7, token_budget=90)
    assert state(model) == before
    assert (20 in calls) == (name not in WHOLE), f"{name}: the prompt is shared where it was not, or no longer"
    expected = references.flat_scores(model, targets, prompt, responses, temperature=0.7)
    for target in targets:
        gap = references.error(measured.grams[target.key].gram(), references.gram_of(expected[target.key]))
        assert gap < (2e-5 if name in FLOAT32_INSIDE else 1e-10), f"{target.key} is off by {gap:.1e}"


@pytest.mark.parametrize("options", [{}, {"probes": 2, "seed": 0, "prefixes": 3}, {"checkpointing": "non_reentrant"}])
def test_sharing_changes_nothing(options, calls, monkeypatch):
    model = make_model("qwen2", num_hidden_layers=4)
    prompt, responses = make_prompt_and_responses(LENGTHS, prompt=20)
    specs = ["2:qkv", "last:mlp"]
    shared = measure_scores(model, prompt, responses, specs, token_budget=90, **options)
    assert calls
    monkeypatch.setattr(trunk, "LEAST_SAVING", 2.0)
    count = len(calls)
    whole = measure_scores(model, prompt, responses, specs, token_budget=90, **options)
    assert len(calls) == count
    for key, gram in whole.grams.items():
        assert references.error(shared.grams[key].gram(), gram.gram()) < 1e-12
        if "probes" in options:
            np.testing.assert_allclose(shared.taus[key].value, whole.taus[key].value, rtol=1e-10)
            np.testing.assert_allclose(shared.prefixes[key].value, whole.prefixes[key].value, rtol=1e-9, atol=1e-18)
    for one, other in zip(shared.logprobs, whole.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharing_in_lower_precision_is_within_its_roundings(dtype, calls, monkeypatch):
    model = make_model("qwen2", dtype, num_hidden_layers=4)
    prompt, responses = make_prompt_and_responses(LENGTHS, prompt=20)
    shared = measure_scores(model, prompt, responses, "last:qkv").grams
    assert 20 in calls
    monkeypatch.setattr(trunk, "LEAST_SAVING", 2.0)
    whole = measure_scores(model, prompt, responses, "last:qkv").grams
    for key, gram in whole.items():
        assert references.error(shared[key].gram(), gram.gram()) < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("specs", "responses", "changes"),
    [
        ("0:qkv", 6, {}),  # nothing lies below
        (["lm_head", "last:qkv"], 6, {"tie_word_embeddings": True}),  # the embedding is measured too
        ("last:qkv", 1, {}),  # one response has nobody to share with
        ("last:qkv", 6, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    ],
)
def test_whole_sequences_where_sharing_would_be_wrong_or_useless(specs, responses, changes, calls):
    model = make_model("qwen2", **changes)
    prompt, drawn = make_prompt_and_responses(LENGTHS[:responses], prompt=20)
    measure_scores(model, prompt, drawn, specs)
    assert not calls


def test_a_budget_that_asks_for_passes_leaves_room_for_the_trunk(calls):
    model = make_model("qwen2", num_hidden_layers=4)
    prompt, responses = make_prompt_and_responses(LENGTHS * 4, prompt=20)
    least = least_budget(model, prompt, responses, "last:mlp", checkpointing="off")
    options = {"memory_budget": int(1.5 * least), "checkpointing": "off"}
    plan = plan_measurement(model, prompt, responses, "last:mlp", **options)
    assert len(plan.passes) > 1
    assert plan.trunk_bytes > 0
    calls.clear()
    with LiveBytes() as live:
        measure_scores(model, prompt, responses, "last:mlp", **options)
    assert calls.count(20) == len(plan.passes) * plan.cost.batches
    assert live.peak <= plan.cost.peak_bytes <= options["memory_budget"]


def test_a_model_whose_layers_hand_on_more_than_states_runs_whole(calls):
    model = make_model("qwen2")
    own = model.model.layers[1].forward
    first = model.model.layers[0]
    kept = []

    def remembers(hidden_states, **kwargs):
        kept.append(hidden_states)
        return type(first).forward(first, hidden_states, **kwargs)

    first.forward = remembers
    model.model.layers[1].forward = lambda hidden_states, **kwargs: own(hidden_states + kept[-1], **kwargs)
    prompt, responses = make_prompt_and_responses(LENGTHS, prompt=20)
    measured = measure_scores(model, prompt, responses, "last:qkv")
    assert 20 not in calls
    targets = resolve_targets(model, "last:qkv")
    expected = references.flat_scores(model, targets, prompt, responses)
    for target in targets:
        gram = measured.grams[target.key].gram()
        assert references.error(gram, references.gram_of(expected[target.key])) < 1e-10


def test_an_error_inside_leaves_the_layers_as_they_were():
    model = make_model("qwen2", torch.float32)
    prompt, responses = make_prompt_and_responses(LENGTHS, prompt=20)
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    before = state(model)
    with pytest.raises(GradvarError, match="not finite"):
        measure_scores(model, prompt, responses, "last:qkv")
    assert state(model) == before


def test_prompts_with_padding_tokens_where_positions_skip_them(calls):
    """RoBERTa's way: behind kept keys it counts what it skips; the prompt's end alone does not show it."""
    config = transformers.RobertaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, is_decoder=True, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RobertaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
    prompt, responses = make_prompt_and_responses((6, 9, 12), prompt=26)
    prompt = [1] * 4 + prompt
    targets = resolve_targets(model, "last:q")
    flat = references.flat_scores(model, targets, prompt, responses)
    for budget in (1, 10_000):
        found = measure_scores(model, prompt, responses, "last:q", token_budget=budget).grams
        for key, expected in flat.items():
            assert references.error(found[key].gram(), references.gram_of(expected)) < 1e-10
    assert calls, "the trunk was not tried"


def test_a_measured_module_that_runs_below_too_is_not_lost(calls):
    """In a layer below, and on what the input embedding gives."""
    prompt, responses = make_prompt_and_responses((5, 9, 9), prompt=20)
    for place in ("layers.0.mlp", "embed_tokens"):
        model = make_model("llama", num_hidden_layers=3)
        shared = model.model.layers[1].self_attn.q_proj
        model.model.get_submodule(place).register_forward_hook(
            lambda module, args, output, shared=shared: output + torch.tanh(shared(output))
        )
        (target,) = resolve_targets(model, "1:q")
        flat = references.flat_scores(model, [target], prompt, responses)[target.key]
        found = measure_scores(model, prompt, responses, "1:q").grams[target.key].gram()
        assert references.error(found, references.gram_of(flat)) < 1e-10
    assert not calls
