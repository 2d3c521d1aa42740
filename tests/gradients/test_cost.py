"""What plan_measurement foretells, against what a measurement does."""

import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, plan_measurement
from gradvar.gradients.cost import token_flop
from gradvar.gradients.prepare import planned
from gradvar.gradients.usage import Growth, LiveBytes, counter
from tests.gradients.models import CONFIGS, least_budget, make_model, make_prompt_and_responses, state, uneven

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
        ("qwen2", "last:mlp", {"memory_budget": 1.05}),
        ("qwen2_tied", ["lm_head", "last:qkv"], {"probes": 1}),
        ("gemma2", "2:qkv", {}),
        ("mixtral", "1:qkv", {}),
    ],
)
def test_flop_are_those_of_the_measurement(long_models, name, targets, options, kind):
    """Counted operator by operator; a tenth is left for the probes of a few tokens that a measurement runs first."""
    model = long_models[name]
    prompt, responses = make_prompt_and_responses(LENGTHS)
    if "memory_budget" in options:
        least = least_budget(model, prompt, responses, targets, checkpointing=kind)
        options = {"memory_budget": int(options["memory_budget"] * least)}
    plan = plan_measurement(model, prompt, responses, targets, checkpointing=kind, **options)
    with counter() as counted:
        measured = measure_scores(
            model, prompt, responses, targets, checkpointing=kind, seed=0 if "probes" in options else None, **options
        )
    assert (len(plan.passes) > 1) == ("memory_budget" in options)
    assert len(measured.plan.passes) == len(plan.passes)
    assert plan.cost.flop == pytest.approx(counted.get_total_flops(), rel=0.1)
    assert measured.plan.cost is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("qwen2", "0:qkv", {}),
        ("qwen2", "1:attn", {"token_budget": 400}),
        ("qwen2", "last:mlp", {"memory_budget": 1.5}),
        ("qwen2_tied", ["lm_head", "last:qkv"], {"memory_budget": 1.5}),
        ("gemma2", "last:attn", {"memory_budget": 1.5}),
        ("qwen2", "last:attn", {"memory_budget": 1.5, "probes": 2, "seed": 0, "prefixes": 2}),
        ("mixtral", "last:attn", {"memory_budget": 1.2}),
    ],
)
def test_bytes_alive_stay_within_the_plan(long_models, name, targets, options, kind):
    """Every tensor of a measurement counted, from the first to the last; and the plan is not wildly too large."""
    model = long_models[name]
    prompt, responses = make_prompt_and_responses(LENGTHS)
    options = {**options, "checkpointing": kind}
    asked = {key: value for key, value in options.items() if key not in ("memory_budget", "seed")}
    if "memory_budget" in options:
        least = least_budget(model, prompt, responses, targets, **asked)
        asked["memory_budget"] = options["memory_budget"] = int(options["memory_budget"] * least)
    plan = plan_measurement(model, prompt, responses, targets, **asked)
    assert plan.cost.peak_bytes <= plan.memory_budget
    with LiveBytes() as live:
        measure_scores(model, prompt, responses, targets, **options)
    assert live.peak <= plan.cost.peak_bytes
    assert plan.cost.peak_bytes <= options.get("memory_budget", 3 * live.peak)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "mamba2"])  # it has no attention
def test_bytes_alive_stay_within_the_plan_on_every_architecture(name):
    model = make_model(name)
    prompt, responses = make_prompt_and_responses()
    budget = 2 * least_budget(model, prompt, responses, "last:attn")
    with LiveBytes() as live:
        measure_scores(model, prompt, responses, "last:attn", memory_budget=budget)
    assert live.peak <= budget


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "targets"), [("gpt2", "0:qkv"), ("qwen2", "all:qkv,mlp"), ("mixtral", "last:attn")])
def test_attention_that_keeps_its_squares_is_foretold_from_short_probes(name, targets, kind):
    """In a probe of 32 tokens the peak lies elsewhere than at 400, where it was foretold up to 38% too low."""
    model = make_model(name, **{"n_positions" if name == "gpt2" else "max_position_embeddings": 512})
    model.set_attn_implementation("eager")
    prompt, responses = make_prompt_and_responses((400, 380, 300))
    options = {"token_budget": 1 if name == "mixtral" else 1000, "checkpointing": kind}
    plan = plan_measurement(model, prompt, responses, targets, **options)
    with LiveBytes() as live:
        measure_scores(model, prompt, responses, targets, **options)
    assert live.peak <= plan.cost.peak_bytes <= 1.2 * live.peak


@pytest.mark.parametrize(
    ("name", "targets", "changes"),
    [
        ("mamba2", "*.0.mixer.*_proj", {"chunk_size": 64}),
        ("mamba2", "*.0.mixer.*_proj", {"chunk_size": 150}),
        ("gemma3", "0:attn", {"sliding_window": 64}),
        ("gemma3", "0:attn", {"sliding_window": 200}),
        ("qwen3_next", "0:mlp", {}),
    ],
)
def test_chunks_and_windows_are_foretold_too(name, targets, changes):
    """Short probes see one chunk and no window's mask: three times too little at 400 tokens and more."""
    size = {} if name == "mamba2" else {"max_position_embeddings": 1024}
    model = make_model(name, **size, **changes)
    prompt, responses = make_prompt_and_responses((430, 500, 390))
    options = {"token_budget": 1, "checkpointing": "off"}
    plan = plan_measurement(model, prompt, responses, targets, **options)
    with LiveBytes() as live:
        measure_scores(model, prompt, responses, targets, **options)
    assert live.peak <= plan.cost.peak_bytes <= 1.5 * live.peak


def test_bytes_alive_are_counted_once_and_let_go():
    outside = torch.ones(1000)
    with LiveBytes() as live:
        view = outside.view(10, 100)
        one = view + 1
        assert live.now == live.peak == 4000
        two = one.T.reshape(-1)
        del one
        assert (live.now, live.peak) == (4000, 8000)
        del two
    assert (live.now, live.peak) == (0, 8000)


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
    options = {"token_budget": 300, "memory_budget": 4_000_000, "checkpointing": "reentrant"}
    plan = plan_measurement(model, prompt, responses, "all:qkv", **options)
    done = measure_scores(model, prompt, responses, "all:qkv", **options).plan
    assert (plan.passes, plan.tile_bytes, plan.token_budget) == (done.passes, done.tile_bytes, done.token_budget)
    assert plan.checkpointing == done.checkpointing == "reentrant"
    cost = plan.cost
    assert cost.tokens == sum(LENGTHS) + 4 * (len(prompt) - 1)
    assert cost.tokens <= cost.padded_tokens <= 300 * cost.batches
    assert cost.peak_bytes <= 4_000_000
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
    assert max(fed) <= 64, "the longest probe is no longer than the longest response"
    assert sum(length > 32 for length in fed) <= 4, "few are longer than 32 tokens: they test what the others foretell"
    with pytest.raises(GradvarError, match="100 bytes is too small: expected at least"):
        plan_measurement(model, *make_prompt_and_responses((60, 50)), "last:qkv", memory_budget=100)
    assert state(model) == before


def test_a_single_short_response_can_be_planned():
    cost = plan_measurement(make_model("llama"), [3], [[4]], "last:qkv").cost
    assert cost.tokens == cost.padded_tokens == 1
    assert cost.flop > 0


def test_growth_goes_through_its_points():
    def value(tokens, rows=1):
        return 7 + rows * (3 * tokens + 0.5 * tokens**2)

    growth = Growth.through([(t, value(t, rows=2)) for t in (8, 16, 32)], rows=2)
    assert growth.at(1000) == pytest.approx(value(1000))
    assert growth.at(300, rows=5) == pytest.approx(value(300, rows=5))


def test_growth_of_several_moments_is_that_of_the_largest_at_each_length():
    moments = [(t, [100.0 + t, 5.0 + 0.5 * t**2]) for t in (3, 5, 9)]
    growth = Growth.through(moments)
    assert growth.at(9) == pytest.approx(109)
    assert growth.at(100) == pytest.approx(5005)
    assert Growth.through([(t, values[:n]) for n, (t, values) in enumerate(moments, 1)]).at(9) >= 109


@pytest.mark.parametrize("targets", ["0:q", "1:q"])
def test_the_work_of_a_token_is_that_of_the_weights_it_meets(targets):
    """Forward, back to the lowest target, the head twice; of three experts two, and their biases and norms too."""
    for name, share in (("qwen2", 1.0), ("qwen2_moe", 2 / 3)):
        model = make_model(name)
        with planned(model, *make_prompt_and_responses(), targets) as job:
            found = token_flop(job)
        met = [
            sum(p.numel() * (share if ".experts." in name else 1) for name, p in layer.named_parameters())
            for layer in model.model.layers
        ]
        assert found == pytest.approx(2 * sum(met) + 2 * sum(met[int(targets[0]) :]) + 4 * 37 * 16)


def test_what_is_known_of_a_model_is_not_measured_again():
    model = make_model("llama")
    fed = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    prompt, responses = make_prompt_and_responses((60, 50))
    measure_scores(model, prompt, responses, "last:q")
    first = len(fed)
    measure_scores(model, prompt, responses, "last:q")
    # Five probes of what a batch takes, the last of them to hold the fit of the others against.
    assert first - (len(fed) - first) == 5
