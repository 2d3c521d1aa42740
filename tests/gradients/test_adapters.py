"""Low-rank adapters laid out as peft lays them out (peft itself is not needed)."""

import pytest
from torch import nn

from gradvar.gradients import list_targets, measure_scores, resolve_targets
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses


class AdaptedLinear(nn.Module):
    """peft's lora.Linear in short."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base_layer = base
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.3)})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        low = self.lora_A["default"](self.lora_dropout["default"](x))
        return self.base_layer(x) + 2 * self.lora_B["default"](low)


@pytest.fixture(scope="module")
def adapted():
    model = make_model("qwen2")
    for layer in model.model.layers:
        layer.self_attn.q_proj = AdaptedLinear(layer.self_attn.q_proj, 3).double()
        layer.mlp.down_proj = AdaptedLinear(layer.mlp.down_proj, 3).double()
    return model


def test_presets_choose_the_adapters_weights(adapted):
    keys = [t.key for t in resolve_targets(adapted, "last:attn,mlp")]
    assert keys == [
        f"model.layers.1.{place}.lora_{side}.default"
        for place in ("self_attn.q_proj", "mlp.down_proj")
        for side in "AB"
    ]
    assert [t.kind for t in resolve_targets(adapted, "last:q")] == ["q", "q"]


def test_adapters_and_the_frozen_weights_beside_them(adapted):
    prompt, responses = make_prompt_and_responses()
    targets = [t for t in list_targets(adapted) if t.kind != "head"]
    measured = measure_scores(adapted, prompt, responses, [t.key for t in targets], token_budget=60)
    expected = references.flat_scores(adapted, targets, prompt, responses)
    for target in targets:
        gap = references.error(measured.grams[target.key].gram(), references.gram_of(expected[target.key]))
        assert gap < 1e-10, target.key
