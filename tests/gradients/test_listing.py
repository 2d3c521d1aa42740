"""The listing of targets, from shapes alone: complete, foldable back into keys, and honest about what is refused."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from gradvar.errors import GradvarError
from gradvar.gradients import list_targets, resolve_targets, survey_targets
from tests.gradients.models import CONFIGS, make_model

NAMES = [name for name in CONFIGS if name in ("qwen2", "gpt2", "opt", "phi3", "gpt_neox", "qwen3_moe", "mixtral")]


def skeleton(name):
    kind, settings = CONFIGS[name]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_alone_list_what_the_weights_do(name):
    model = make_model(name)
    listing = survey_targets(skeleton(name))
    whole = {target.key: target for target in list_targets(model) if target.rows is None}
    assert {target.key for target in listing.targets} == set(whole)
    for target in listing.targets:
        twin = whole[target.key]
        assert (target.shape, target.has_bias, target.kind) == (twin.shape, twin.has_bias, twin.kind)
    assert listing.layers == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_a_glob_that_finds_its_targets(name):
    model = make_model(name)
    for group in survey_targets(skeleton(name)).groups:
        found = resolve_targets(model, group.pattern)
        assert {target.key for target in group.targets} <= {target.key for target in found}
        assert {target.shape for target in group.targets} == {group.first.shape}
        assert group.parameters == sum(target.parameter_count() for target in group.targets)


def test_presets_pick_what_measuring_would():
    model = make_model("qwen2")
    listing = survey_targets(skeleton("qwen2"))
    for name, patterns in listing.presets.items():
        picked = {target.module for target in resolve_targets(model, f"all:{name}")}
        assert picked == {t.module for group in listing.groups if group.pattern in patterns for t in group.targets}
    assert "router" not in listing.presets


def test_specs_narrow_the_list():
    listing = survey_targets(skeleton("qwen2"), ["last:v", "lm_head"])
    assert [target.key for target in listing.targets] == ["model.layers.1.self_attn.v_proj", "lm_head"]
    with pytest.raises(GradvarError, match="matches nothing"):
        survey_targets(skeleton("qwen2"), ["*.q_porj"])


def test_what_is_refused_is_said():
    model = make_model("qwen2")
    inner = model.model.layers[1].mlp
    inner.up_proj.weight = torch.nn.Parameter(inner.up_proj.weight.to(torch.float8_e4m3fn))
    model.config.quantization_config = {"quant_method": "fp8"}
    listing = survey_targets(model)
    assert listing.refused == {"model.layers.*.mlp.up_proj": "has quantised weights (float8_e4m3fn, Linear)"}
    assert [group.layers for group in listing.groups if group.kind == "up"] == [(0,)]
    assert listing.quantised == "fp8"
    assert listing.others["Embedding"] == 1
