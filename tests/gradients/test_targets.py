"""Names to targets: selectors, presets, globs, and what is said when nothing fits."""

import pytest
import torch
from torch import nn

from gradvar.errors import GradvarError
from gradvar.gradients import list_targets, resolve_targets
from tests.gradients.models import make_model


@pytest.fixture(scope="module")
def llama():
    return make_model("llama", num_hidden_layers=5)


@pytest.fixture(scope="module")
def gpt2():
    return make_model("gpt2")


def names(model, specs):
    return [t.key.removeprefix("model.layers.").removeprefix("transformer.h.") for t in resolve_targets(model, specs)]


def layers(model, specs):
    return sorted({t.layer for t in resolve_targets(model, specs)})


def test_last_qkv(llama):
    assert names(llama, "last:qkv") == ["4.self_attn.q_proj", "4.self_attn.k_proj", "4.self_attn.v_proj"]


def test_kinds_may_be_joined(llama):
    assert names(llama, "3:q,mlp") == ["3.self_attn.q_proj", "3.mlp.gate_proj", "3.mlp.up_proj", "3.mlp.down_proj"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("first:v", [0]),
        ("middle:v", [2]),
        ("last:v", [4]),
        ("1:v", [1]),
        ("1-3:v", [1, 2, 3]),
        ("0,3-4:v", [0, 3, 4]),
        ("all:v", [0, 1, 2, 3, 4]),
        ("v", [0, 1, 2, 3, 4]),
        (["0:v", "last:v"], [0, 4]),
    ],
)
def test_layer_selectors(llama, spec, expected):
    assert layers(llama, spec) == expected


def test_attn_is_qkv_and_output(llama):
    assert [t.kind for t in resolve_targets(llama, "last:attn")] == ["q", "k", "v", "o"]


def test_all_of_a_layer(llama):
    assert [t.kind for t in resolve_targets(llama, "last:all")] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert names(llama, "last") == names(llama, "last:all")


def test_globs(llama):
    assert names(llama, "*.3.*_proj")[:2] == ["3.self_attn.q_proj", "3.self_attn.k_proj"]
    assert names(llama, "lm_head") == ["lm_head"]


def test_targets_come_once_and_in_the_models_order(llama):
    assert names(llama, ["last:o", "*.4.self_attn.*", "0:q"]) == [
        "0.self_attn.q_proj", "4.self_attn.q_proj", "4.self_attn.k_proj", "4.self_attn.v_proj", "4.self_attn.o_proj"
    ]  # fmt: skip


def test_rows_of_a_fused_matrix(gpt2):
    assert names(gpt2, "last:qkv") == ["1.attn.c_attn:q", "1.attn.c_attn:k", "1.attn.c_attn:v"]
    assert [t.rows for t in resolve_targets(gpt2, "last:qkv")] == [(0, 16), (16, 32), (32, 48)]
    assert names(gpt2, "last:k") == ["1.attn.c_attn:k"]
    assert names(gpt2, "*.0.*c_attn:v") == ["0.attn.c_attn:v"]
    assert names(gpt2, "*.0.*c_attn") == ["0.attn.c_attn"]
    keys = [t.key for t in list_targets(gpt2)]
    assert "transformer.h.0.attn.c_attn" in keys
    assert "transformer.h.0.attn.c_attn:q" in keys


def test_target_facts(gpt2):
    (target,) = resolve_targets(gpt2, "0:down")
    assert (target.shape, target.has_bias, target.kind, target.layer) == ((16, 64), True, "down", 0)
    assert target.parameter_count() == 16 * 65
    assert target.parameter_count(include_bias=False) == 16 * 64


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("last:qkw", "'qkw' is not a kind.*did you mean qkv"),
        ("9:qkv", "layers 0 to 4, received 9"),
        ("3-1:qkv", "layers 0 to 4, received 3-1"),
        ("last:router", "matches nothing: these layers have down, gate, k, o, q, up, v"),
        ("model.layers.3.self_atn.q_proj", "matches nothing: nearest are model.layers.3.self_attn.q_proj"),
        ("*.q_proj:q", r"q_proj is one matrix and has no parts: name it as \*\.q_proj"),
        ("LAST:QKV", r"matches nothing: did you mean last:qkv\?"),
        ("nonsense", r"measurable: model.layers.\*.self_attn.q_proj"),
        ("model.norm", "is a LlamaRMSNorm, not a Linear"),
        ("", "empty"),
    ],
)
def test_what_is_said_when_nothing_fits(llama, spec, message):
    with pytest.raises(GradvarError, match=message) as caught:
        resolve_targets(llama, spec)
    assert "\n" not in str(caught.value)
    assert "input_layernorm" not in str(caught.value)


def test_spaces_around_colons_and_commas(llama):
    assert names(llama, "last : q , v") == names(llama, "last:q,v")


def test_parts_that_are_not_contiguous_are_said_to_be():
    with pytest.raises(GradvarError, match=r"can be measured alone are none \(not contiguous\)"):
        resolve_targets(make_model("gpt_neox"), "*.query_key_value:q")


@pytest.mark.parametrize("spec", ["all:qkv", "all:q", "*.q_proj"])
def test_the_rest_of_a_partly_quantised_model_is_not_measured_unsaid(spec):
    model = make_model("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight.data.to(torch.int8)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(GradvarError, match=r"0\.self_attn\.q_proj has quantised weights .* and is not measured"):
        resolve_targets(model, spec)
    assert names(model, "all:v") == ["0.self_attn.v_proj", "1.self_attn.v_proj"]
    assert names(model, "last:qkv") == [f"1.self_attn.{x}_proj" for x in "qkv"]


def test_quantised_weights_are_refused_by_name(llama):
    model = make_model("llama")
    module = model.model.layers[1].self_attn.v_proj
    module.weight = nn.Parameter(torch.zeros(8, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(GradvarError, match=r"v_proj has quantised weights \(int8, Linear\)"):
        resolve_targets(model, "last:v")
    assert [t.kind for t in resolve_targets(model, "last:q")] == ["q"]


def test_weights_quantised_in_a_tensor_of_their_own_kind_are_refused_by_name():
    """torchao's tensors say that they are float32."""

    class Packed(torch.Tensor):
        pass

    model = make_model("llama")
    module = model.model.layers[1].self_attn.v_proj
    module.weight = nn.Parameter(module.weight.data.as_subclass(Packed), requires_grad=False)
    with pytest.raises(GradvarError, match=r"v_proj has quantised or sharded weights \(Packed, Linear\)"):
        resolve_targets(model, "last:v")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_a_model_of_which_every_linear_is_quantised():
    model = torch.ao.quantization.quantize_dynamic(make_model("llama", torch.float32), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(GradvarError, match=r"layers.0.self_attn.q_proj has quantised weights \(Linear\)"):
        resolve_targets(model, "last:qkv")


def test_parametrised_weights_are_refused_by_name():
    model = make_model("llama")
    nn.utils.parametrizations.weight_norm(model.model.layers[1].self_attn.v_proj)
    with pytest.raises(GradvarError, match="v_proj has a weight that is computed from other parameters"):
        resolve_targets(model, "model.layers.1.self_attn.v_proj")


def test_a_model_without_layers():
    with pytest.raises(GradvarError, match="no decoder layers found in Linear"):
        resolve_targets(nn.Linear(2, 2), "last:qkv")
