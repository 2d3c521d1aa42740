"""How many positions a model has, and rotary angles that depend on the length of the sequence."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV32Config, DogeConfig

from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, plan_measurement, resolve_targets
from gradvar.gradients.batches import make_batches
from gradvar.gradients.chosen import ChosenKeys
from gradvar.gradients.positions import must_go_alone, position_limit, turns_with_length
from tests.gradients import references
from tests.gradients.models import CONFIGS, make_model, make_prompt_and_responses

ORIGINAL = {"original_max_position_embeddings": 16}
SCALED = {
    "longrope": {"short_factor": [1.0, 1.0], "long_factor": [2.0, 5.0], "factor": 4.0, **ORIGINAL},
    "yarn": {"factor": 4.0, **ORIGINAL},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
}


def scaled(kind, positions=64):
    rotary = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    return make_model("llama", max_position_embeddings=positions, rope_parameters=rotary)


@pytest.mark.parametrize("kind", SCALED)
def test_angles_are_those_of_each_sequence_alone(kind):
    model = scaled(kind)
    prompt, responses = make_prompt_and_responses()  # shorter and longer than the original positions
    targets = resolve_targets(model, "all:qkv,mlp")
    grams = measure_scores(model, prompt, responses, "all:qkv,mlp", token_budget=200).grams
    for key, scores in references.flat_scores(model, targets, prompt, responses).items():
        assert references.error(grams[key].gram(), references.gram_of(scores)) < 1e-10


def test_only_what_changes_goes_alone():
    assert turns_with_length(scaled("longrope"))
    assert not turns_with_length(scaled("yarn"))
    assert must_go_alone(scaled("longrope"), 17)
    assert not must_go_alone(scaled("longrope"), 16)
    assert not must_go_alone(scaled("yarn"), 64)


def test_angles_that_depend_on_what_was_seen_before_are_refused():
    model = scaled("dynamic", positions=16)
    prompt, responses = make_prompt_and_responses((4, 14))
    measure_scores(model, prompt, [responses[0]], "last:q")
    with pytest.raises(GradvarError, match="feeds 18 tokens: beyond 16 this model's rotary"):
        measure_scores(model, prompt, responses, "last:q")


def moved(model, dtype=torch.float64):
    """The model in a dtype, with larger weights."""
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.to(dtype)


def choosing(keys, heads, dtype=torch.float64, seed=0):
    """DeepSeek V3.2, whose indexer chooses so many keys; with few heads many keys are alike to it."""
    config = {**CONFIGS["deepseek_v3"][1], "index_topk": keys, "index_n_heads": heads, "index_head_dim": 8}
    config = DeepseekV32Config(**config)
    torch.manual_seed(seed)
    return moved(AutoModelForCausalLM.from_config(config, experts_implementation="eager"), dtype)


def doge(keys, dtype=torch.float64):
    """Doge, which chooses so many keys among later ones too."""
    torch.manual_seed(0)
    return moved(AutoModelForCausalLM.from_config(DogeConfig(**CONFIGS["llama"][1], keep_window_size=keys)), dtype)


def assert_exact(model, spec, budget, gap):
    prompt, responses = make_prompt_and_responses()
    measured = measure_scores(model, prompt, responses, spec, token_budget=200)
    assert measured.plan.token_budget == budget
    targets = resolve_targets(model, spec)
    for key, scores in references.flat_scores(model, targets, prompt, responses).items():
        assert references.error(measured.grams[key].gram(), references.gram_of(scores)) < gap


@pytest.mark.parametrize("spec", ["all:o,q", "last:o"])
@pytest.mark.parametrize(("keys", "budget"), [(6, 1), (34, 200)])
def test_chosen_keys_are_those_of_each_response_alone(keys, budget, spec):
    """In a batch a response saw others of equal keys (0.6 of a Gram); where all are taken it goes in batches."""
    assert_exact(choosing(keys, heads=32), spec, budget, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keys_chosen_by_what_follows_are_refused(dtype):
    model = choosing(4, heads=2, dtype=dtype)
    prompt, responses = make_prompt_and_responses()
    with pytest.raises(GradvarError, match="not causal beyond 4 tokens: its attention chooses so many keys"):
        measure_scores(model, prompt, responses, "last:o")
    plan_measurement(model, prompt, responses, "last:o")  # which feeds no response


def test_keys_chosen_in_half_precision():
    """There roundings are larger than what other dtypes may differ by."""
    measured = measure_scores(choosing(6, heads=32, dtype=torch.bfloat16), *make_prompt_and_responses(), "last:o")
    assert measured.plan.token_budget == 1


def test_keys_are_looked_at_in_every_response():
    """Some models' choice holds in the longest response (34 tokens are fed) and not in a shorter one."""
    prompt, responses = make_prompt_and_responses()
    model = choosing(6, heads=6, seed=8)
    with pytest.raises(GradvarError, match="no log-probability of response 3; leave longer ones out"):
        measure_scores(model, prompt, responses, "last:o")


@pytest.mark.parametrize(("fed", "kept"), [(12, 0), (13, 8), (14, 9), (34, 27)])
def test_where_a_response_is_cut(fed, kept):
    """Beyond 12 keys; what the last token fed chooses has nothing behind it. Kept from the prompt's last token on."""
    prompt, (response,) = make_prompt_and_responses((fed - 4,))
    model = choosing(12, heads=2)
    job = SimpleNamespace(model=model, head=SimpleNamespace(base=model.model), prompt=prompt)
    (batch,) = make_batches(prompt, [response], 1, torch.device("cpu"))
    beginning = ChosenKeys(job).beginning(batch)
    assert (0 if beginning is None else len(beginning)) == kept


def test_windows_that_choose_among_later_keys():
    prompt, responses = make_prompt_and_responses()
    with pytest.raises(GradvarError, match=r"not causal beyond 32 tokens: .*response 4; leave"):
        measure_scores(doge(32), prompt, responses, "last:o")
    # the last of the 34 tokens that are fed sees 33 of its keys, with nothing behind it
    alone = measure_scores(doge(33), prompt, responses, "last:o", token_budget=200)
    assert alone.plan.token_budget == 1
    assert_exact(doge(34), "last:o", 200, 1e-10)


@pytest.mark.parametrize(
    ("kind", "positions", "limit"),
    [("yarn", 16, 64), ("yarn", 64, 64), ("llama3", 256, 256), ("linear", 64, 128), ("longrope", 64, 64)],
)
def test_scaled_positions_are_counted_once(kind, positions, limit):
    assert position_limit(scaled(kind, positions)) == limit


def test_ids_and_masks_of_any_kind_of_sequence():
    model = make_model("llama")
    prompt, responses = make_prompt_and_responses((3, 5))
    expected = measure_scores(model, prompt, responses, "last:q").grams
    tensors = [torch.tensor(response) for response in responses]
    masks = [torch.ones(3), [True] * 5]
    found = measure_scores(model, torch.tensor(prompt), tensors, "last:q", loss_masks=masks, probes=1, seed=0).grams
    for key, gram in expected.items():
        assert (found[key].gram() == gram.gram()).all()
    with pytest.raises(GradvarError, match="response 0: its loss mask may hold only 0 and 1"):
        measure_scores(model, prompt, responses, "last:q", loss_masks=[[0.5, 1, 1], None])
    with pytest.raises(GradvarError, match="response 0: expected token ids, whole numbers"):
        measure_scores(model, prompt, [[3.5, 4]], "last:q")


def test_a_model_made_without_gradients_is_refused():
    with torch.inference_mode():
        model = make_model("llama")
    with pytest.raises(GradvarError, match="has no gradients: load it outside"):
        measure_scores(model, *make_prompt_and_responses(), "last:q")


def test_a_model_that_gives_tuples_is_refused():
    model = make_model("llama")
    model.config.return_dict = False
    with pytest.raises(GradvarError, match=r"set model\.config\.return_dict = True"):
        measure_scores(model, *make_prompt_and_responses(), "last:q")
