"""Adapters made by peft itself, against plain autograd."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, plan_measurement, resolve_targets
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses, state

PROMPT, RESPONSES = make_prompt_and_responses()
LAYER = "base_model.model.model.layers.1"


def adapted(*more, **changes):
    """Qwen2 with adapters on q, v and down, and `more` adapters by name and modules."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.3}
    model = get_peft_model(make_model("qwen2"), LoraConfig(**{**settings, **changes}, task_type="CAUSAL_LM"))
    for name, modules in more:
        model.add_adapter(name, LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.train()


def keys(model, spec):
    return [t.key.removeprefix(f"{LAYER}.") for t in resolve_targets(model, spec)]


def pairs(*modules, adapter="default"):
    return [f"{module}.lora_{side}.{adapter}" for module in modules for side in "AB"]


def largest_gap(model, spec):
    targets = resolve_targets(model, spec)
    before = state(model)
    measured = measure_scores(model, PROMPT, RESPONSES, spec, token_budget=60)
    assert state(model) == before
    expected = references.flat_scores(model, targets, PROMPT, RESPONSES)
    return max(
        references.error(measured.grams[t.key].gram(), references.gram_of(expected[t.key])) for t in targets
    )  # fmt: skip


@pytest.fixture(scope="module")
def lora():
    return adapted()


def test_presets_choose_what_is_trained(lora):
    assert keys(lora, "last:qkv") == pairs("self_attn.q_proj", "self_attn.v_proj")
    assert keys(lora, "last:mlp") == pairs("mlp.down_proj")
    assert [t.shape for t in resolve_targets(lora, "last:q")] == [(3, 16), (16, 3)]
    with pytest.raises(GradvarError, match="these layers have down, q, v"):
        resolve_targets(lora, "last:k")


@pytest.mark.parametrize("spec", ["all:all", "*.1.self_attn.k_proj", "*.1.self_attn.q_proj.base_layer"])
def test_adapters_and_frozen_weights(lora, spec):
    """Dropout of the adapters is off while measuring, though the model is in training mode."""
    assert largest_gap(lora, spec) < 1e-10


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}])
def test_other_kinds_of_adapters(changes):
    model = adapted(**changes)
    assert keys(model, "last:qkv") == pairs("self_attn.q_proj", "self_attn.v_proj")
    assert largest_gap(model, "last:all") < 1e-10


def test_the_active_one_of_two_adapters():
    model = adapted(("other", ["q_proj", "k_proj"]))
    assert keys(model, "last:qkv") == pairs("self_attn.q_proj", "self_attn.v_proj")
    assert largest_gap(model, "last:all") < 1e-10
    model.set_adapter("other")
    assert keys(model, "last:all") == pairs("self_attn.q_proj", "self_attn.k_proj", adapter="other")
    assert largest_gap(model, "last:all") < 1e-10
    model.base_model.set_adapter(["default", "other"])
    assert len(keys(model, "last:qkv")) == 8
    assert largest_gap(model, "last:all") < 1e-10


def test_without_its_adapters_the_model_is_its_base(lora):
    plain = measure_scores(make_model("qwen2"), PROMPT, RESPONSES, "last:q").grams
    with lora.disable_adapter():
        assert keys(lora, "last:q") == ["self_attn.q_proj.base_layer"]
        assert largest_gap(lora, "last:all") < 1e-10
        (gram,) = measure_scores(lora, PROMPT, RESPONSES, "last:q").grams.values()
    assert references.error(gram.gram(), next(iter(plain.values())).gram()) < 1e-10
    with lora.disable_adapter(), pytest.raises(GradvarError, match=r"no gradient reached .*lora_A"):
        measure_scores(lora, PROMPT, RESPONSES, "*.1.self_attn.q_proj.lora_A.*")


def test_merged_adapters():
    model = adapted()
    model.merge_adapter()
    assert keys(model, "last:qkv")[0] == "self_attn.q_proj.base_layer"
    assert largest_gap(model, "last:all") < 1e-10
    whole = measure_scores(model, PROMPT, RESPONSES, "last:v").grams[f"{LAYER}.self_attn.v_proj.base_layer"].gram()
    model.unmerge_adapter()
    unloaded = model.merge_and_unload()
    again = measure_scores(unloaded, PROMPT, RESPONSES, "last:v").grams["model.layers.1.self_attn.v_proj"].gram()
    assert references.error(whole, again) < 1e-10


def test_whole_copies_that_are_trained_beside_the_adapters():
    model = adapted(modules_to_save=["o_proj", "lm_head"])
    assert keys(model, "last:o") == ["self_attn.o_proj.modules_to_save.default"]
    assert largest_gap(model, "last:all") < 1e-10
    with pytest.raises(GradvarError, match=r"no gradient reached .*o_proj\.original_module"):
        measure_scores(model, PROMPT, RESPONSES, "*.1.self_attn.o_proj.original_module")


def test_factors_of_adapters_wider_than_the_model_are_planned_as_wide():
    def planned(wide):
        model = make_model("qwen2", torch.bfloat16, hidden_size=64)
        config = LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, config, autocast_adapter_dtype=wide)  # float32 adapters, as peft has them
        prompt, responses = make_prompt_and_responses((1, 2), prompt=2)
        return [block for blocks in plan_measurement(model, prompt, responses, "all:qkv").passes for block in blocks]

    narrow, wide = planned(False), planned(True)
    assert {block.keep for block in narrow + wide} == {"factors"}
    assert len(narrow) == len(wide) == 8
    bookkeeping = 8 * 2  # bytes a row: each response's bias gradient
    for one, other in zip(narrow, wide, strict=True):
        rows = one.stop - one.start
        assert other.bytes - rows * bookkeeping == 2 * (one.bytes - rows * bookkeeping)


def test_adapters_of_the_head_with_probes_and_prefixes():
    """The head's own code runs once for each reweighting, so what is measured inside it is captured each time."""
    model = adapted(target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    specs = ["*lm_head.lora_*", "last:q"]
    assert largest_gap(model, specs) < 1e-10
    targets = resolve_targets(model, specs)
    measured = measure_scores(model, PROMPT, RESPONSES, specs, token_budget=60, prefixes=3, probes=1, seed=0)
    for target in targets:
        norms = measured.prefixes[target.key]
        for i, response in enumerate(RESPONSES):
            for length, norm in zip(norms.lengths[i], norms.value[i], strict=True):
                mask = [int(t < length) for t in range(len(response))]
                (exact,) = references.flat_scores(model, [target], PROMPT, [response], masks=[mask])[target.key]
                assert norm == pytest.approx(exact @ exact, rel=1e-8)
