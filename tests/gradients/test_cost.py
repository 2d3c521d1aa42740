"""What plan_measurement foretells, against what a measurement does."""

import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, plan_measurement
from gradvar.gradients.cost import _counter, _Growth
from tests.gradients.models import make_model, make_prompt_and_responses, state, uneven

KINDS = ["off", "reentrant", "non_reentrant"]
LENGTHS = (150, 90, 120, 60)


@pytest.fixture(scope="module")
def long_models():
    return {
        name: make_model(name, num_hidden_layers=4, max_position_embeddings=512)
        for name in ("qwen2", "qwen2_tied", "gemma2", "mixtral")
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("qwen2", "1:qkv,mlp", {}),
        ("qwen2", "last:q", {"token_budget": 1}),
        ("qwen2", "0:q", {"probes": 2, "prefixes": 2}),
        ("qwen2", "all:mlp", {"memory_budget": 100_000}),
        ("qwen2_tied", ["lm_head", "last:qkv"], {"probes": 1}),
        ("gemma2", "2:qkv", {}),
        ("mixtral", "1:qkv", {}),
    ],
)
def test_flop_are_those_of_the_measurement(long_models, name, targets, options, kind):
    """Counted operator by operator; a tenth is left for the probes of a few tokens that a measurement runs first."""
    model = long_models[name]
    prompt, responses = make_prompt_and_responses(LENGTHS)
    plan = plan_measurement(model, prompt, responses, targets, checkpointing=kind, **options)
    with _counter() as counted:
        measured = measure_scores(
            model, prompt, responses, targets, checkpointing=kind, seed=0 if "probes" in options else None, **options
        )
    assert (len(plan.passes) > 1) == ("memory_budget" in options)
    assert len(measured.plan.passes) == len(plan.passes)
    assert plan.cost.flop == pytest.approx(counted.get_total_flops(), rel=0.1)
    assert measured.plan.cost is None


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "mixtral"])
@pytest.mark.parametrize("targets", ["0:qkv", "last:o", "2:mlp,qkv"])
def test_activations_are_those_that_the_graph_keeps(long_models, name, targets):
    if name == "mixtral" and "mlp" in targets:
        targets = "2:attn"
    model = long_models[name]
    prompt, responses = make_prompt_and_responses(LENGTHS)
    plan = plan_measurement(model, prompt, responses, targets, token_budget=400)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, largest = {}, 0

    def pack(value):
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    def batch_done(done):
        nonlocal largest
        largest = max(largest, sum(value.untyped_storage().nbytes() for value in kept.values()))
        kept.clear()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        measure_scores(model, prompt, responses, targets, token_budget=400, on_progress=batch_done)
    own_head = plan.cost.logits_bytes if name == "gemma2" else 0  # its chunk of logits has a graph of its own
    # the inputs of tapped modules are kept beside the graph
    assert 0.9 * (largest - own_head) < plan.cost.activation_bytes < 1.4 * largest


@pytest.mark.parametrize("kind", KINDS[1:])
def test_checkpointing_is_foretold_to_take_less_memory_and_more_work(long_models, kind):
    prompt, responses = make_prompt_and_responses(LENGTHS)
    off = plan_measurement(long_models["qwen2"], prompt, responses, "0:q").cost
    on = plan_measurement(long_models["qwen2"], prompt, responses, "0:q", checkpointing=kind).cost
    assert on.activation_bytes < 0.75 * off.activation_bytes
    assert on.flop > 1.2 * off.flop


def test_the_plan_is_that_of_the_measurement(long_models):
    model = long_models["qwen2"]
    prompt, responses = make_prompt_and_responses(LENGTHS)
    options = {"token_budget": 300, "memory_budget": 500_000, "checkpointing": "reentrant"}
    plan = plan_measurement(model, prompt, responses, "all:qkv", **options)
    done = measure_scores(model, prompt, responses, "all:qkv", **options).plan
    assert (plan.passes, plan.tile_bytes, plan.token_budget) == (done.passes, done.tile_bytes, done.token_budget)
    assert plan.checkpointing == done.checkpointing == "reentrant"
    cost = plan.cost
    assert cost.tokens == sum(LENGTHS) + 4 * (len(prompt) - 1)
    assert cost.tokens <= cost.padded_tokens <= 300 * cost.batches
    assert cost.kept_bytes + cost.tile_bytes <= 500_000
    assert cost.flop == cost.forward_flop + cost.backward_flop + cost.gram_flop
    assert cost.peak_bytes >= cost.kept_bytes + cost.activation_bytes


def test_nothing_is_measured_and_the_model_is_left_as_it_was():
    model = uneven("gemma2")
    before = state(model)
    fed = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    before = state(model)
    plan_measurement(model, *make_prompt_and_responses((60, 50)), "last:qkv", checkpointing="reentrant")
    assert state(model) == before
    assert max(fed) <= 32
    with pytest.raises(GradvarError, match="too small for one row"):
        plan_measurement(model, *make_prompt_and_responses((60, 50)), "last:qkv", memory_budget=100)
    assert state(model) == before


def test_a_single_short_response_can_be_planned():
    cost = plan_measurement(make_model("llama"), [3], [[4]], "last:qkv").cost
    assert cost.tokens == cost.padded_tokens == 1
    assert cost.flop > 0


def test_growth_goes_through_its_points():
    growth = _Growth.through([(16, 3 * 16 + 0.5 * 16**2), (32, 3 * 32 + 0.5 * 32**2)])
    assert growth.at(1000) == pytest.approx(3 * 1000 + 0.5 * 1000**2)
