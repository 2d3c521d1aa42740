"""Mixtures of experts: fused tensors, single experts and routers against plain autograd."""

import numpy as np
import pytest
import torch
from torch import nn

from gradvar.errors import GradvarError
from gradvar.gradients import list_targets, measure_scores, plan_measurement, resolve_targets
from gradvar.gradients.capture import ParameterTaps
from gradvar.models import find_model, load_model
from tests.gradients import references
from tests.gradients.models import least_budget, make_model, make_prompt_and_responses, state

PROMPT, RESPONSES = make_prompt_and_responses()
MOE = "model.layers.1.mlp"


def gaps(model, specs, responses=RESPONSES, include_bias=True, masks=None, **options):
    """Error of each target's Gram against plain autograd, relative."""
    targets = resolve_targets(model, specs)
    measured = measure_scores(
        model, PROMPT, responses, [t.key for t in targets], include_bias=include_bias, loss_masks=masks, **options
    )
    expected = references.flat_scores(
        model, targets, PROMPT, responses, include_bias=include_bias, masks=masks,
        temperature=options.get("temperature", 1.0),
    )  # fmt: skip
    return {
        key: references.error(gram.gram(), references.gram_of(expected[key])) for key, gram in measured.grams.items()
    }


@pytest.fixture(scope="module")
def qwen():
    return make_model("qwen2_moe")


@pytest.fixture(scope="module")
def gpt_oss():
    return make_model("gpt_oss")


@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("eager", torch.float64, 1e-10), ("batched_mm", torch.float64, 1e-10), ("grouped_mm", torch.float32, 2e-5)],
)
def test_any_implementation_of_the_experts(implementation, dtype, tolerance):
    """torch's grouped product takes no float64."""
    model = make_model("qwen2_moe", dtype)
    model.set_experts_implementation(implementation)
    assert max(gaps(model, "all:mlp,router").values()) < tolerance


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_grouped_experts_in_float64_are_refused_by_name(name):
    """The way that transformers chooses by itself."""
    model = make_model(name)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(GradvarError, match=r"experts by grouped_mm, .*no float64.*experts_implementation=\"eager\""):
        measure_scores(model, PROMPT, RESPONSES, "last:q")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_loaded_mixture_runs_its_experts_in_a_way_that_its_dtype_has(dtype, tmp_path):
    """So there is no option for it: every way gives the same."""
    make_model("qwen2_moe", torch.float32).save_pretrained(tmp_path)
    model = load_model(find_model(str(tmp_path)), dtype=dtype, device="cpu")
    assert max(gaps(model, "last:qkv,mlp").values()) < (1e-10 if dtype == "float64" else 2e-5)


def test_presets_on_a_mixture(qwen):
    keys = [t.key.removeprefix(f"{MOE}.") for t in resolve_targets(qwen, "last:mlp")]
    shared = [f"shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    assert sorted(keys) == sorted(["experts.gate_up_proj", "experts.down_proj", *shared])
    assert [t.key for t in resolve_targets(qwen, "last:router")] == [f"{MOE}.gate", f"{MOE}.shared_expert_gate"]
    everything = {t.key for t in resolve_targets(qwen, "last:all")}
    assert everything == {t.key for t in resolve_targets(qwen, ["last:attn", "last:mlp", "last:router"])}


def test_single_experts_add_up_to_the_tensor(gpt_oss):
    """gpt_oss keeps its tensors as (experts, inputs, outputs), with biases."""
    grams = measure_scores(gpt_oss, PROMPT, RESPONSES, ["*.1.mlp.experts.*", "*.1.mlp.experts.*:*"]).grams
    assert len(grams) == 2 * (1 + 3)
    for name, shape in (("gate_up_proj", (48, 16)), ("down_proj", (16, 24))):
        key = f"{MOE}.experts.{name}"
        (target,) = resolve_targets(gpt_oss, f"{key}:2")
        assert (target.shape, target.rows) == (shape, (2 * shape[0], 3 * shape[0]))
        parts = sum(grams[f"{key}:{i}"].gram() for i in range(3))
        np.testing.assert_allclose(parts, grams[key].gram(), rtol=1e-12)


@pytest.mark.parametrize("include_bias", [True, False])
def test_biases_of_experts_and_router(gpt_oss, include_bias):
    assert max(gaps(gpt_oss, ["last:all", "*experts.gate_up_proj:1"], include_bias=include_bias).values()) < 1e-10


def test_masks_temperature_and_blocks_of_rows(gpt_oss):
    masks = [[1, *([0, 1, 1] * len(r))][: len(r)] for r in RESPONSES]
    least = int(1.05 * least_budget(gpt_oss, PROMPT, RESPONSES, "last:mlp,router,qkv"))
    options = {"masks": masks, "temperature": 0.6, "memory_budget": least}
    assert max(gaps(gpt_oss, "last:mlp,router,qkv", **options).values()) < 1e-10
    plan = plan_measurement(gpt_oss, PROMPT, RESPONSES, "last:mlp,router,qkv", memory_budget=least)
    assert len(plan.passes) > 1
    assert plan.cost.batches == len(RESPONSES)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_checkpointing(qwen, checkpointing):
    assert max(gaps(qwen, "0:mlp,router", checkpointing=checkpointing).values()) < 1e-10


def test_probes_and_prefixes(qwen):
    targets = resolve_targets(qwen, f"{MOE}.experts.down_proj")
    key = targets[0].key
    measured = measure_scores(qwen, PROMPT, RESPONSES, key, probes=2, seed=0, prefixes=2)
    lengths = measured.prefixes[key].lengths[:, 0]
    masks = [[int(t < length) for t in range(len(r))] for length, r in zip(lengths, RESPONSES, strict=True)]
    expected = references.flat_scores(qwen, targets, PROMPT, RESPONSES, masks=masks)[key]
    np.testing.assert_allclose(measured.prefixes[key].value[:, 0], (expected**2).sum(1), rtol=1e-10)
    assert len(RESPONSES[0]) == 1  # whose only token has the whole gradient, whatever its sign
    np.testing.assert_allclose(measured.taus[key].value[0], measured.grams[key].gram()[0, 0], rtol=1e-12)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(16, 8)
        self.down_proj = nn.Linear(8, 16)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.up_proj(x)))


class Mixture(nn.Module):
    """Experts in modules of their own, as models outside transformers have them; the third is never chosen."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 3, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(3)])

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = self.gate(flat)[:, :2].softmax(-1)
        weight, chosen = logits.max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            (at,) = torch.where(chosen == i)
            if at.numel():
                out = out.index_add(0, at, weight[at, None] * expert(flat[at]))
        return out.view_as(hidden)


def test_experts_in_modules_of_their_own():
    model = make_model("llama")
    torch.manual_seed(3)
    model.model.layers[1].mlp = Mixture().double()
    targets = [t for t in list_targets(model) if t.layer == 1 and not t.key.startswith(f"{MOE}.experts.2")]
    assert len(targets) == 4 + 1 + 4
    assert max(gaps(model, [t.key for t in targets]).values()) < 1e-10
    unused = measure_scores(model, PROMPT, RESPONSES, f"{MOE}.experts.2.up_proj").grams
    assert not unused[f"{MOE}.experts.2.up_proj"].gram().any()


def test_the_model_is_left_as_it_was(qwen):
    tensor = qwen.get_parameter(f"{MOE}.experts.down_proj")
    tensor.grad = kept = torch.ones_like(tensor)
    before = state(qwen)
    measure_scores(qwen, PROMPT, RESPONSES[:2], "last:mlp,router")
    assert state(qwen) == before
    assert tensor.grad is kept
    assert bool((kept == 1).all())
    tensor.grad = None


def test_a_gradient_that_overflows_names_its_response(qwen):
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    before = state(qwen)
    hook = qwen.get_submodule(f"{MOE}.experts").register_forward_hook(lambda m, a, out: Overflow.apply(out))
    with pytest.raises(GradvarError, match=r"the gradient over .*experts.* is not finite for response 7"):
        measure_scores(qwen, PROMPT, RESPONSES[:1], "last:mlp", rollout_ids=[7])
    hook.remove()
    hooks = [len(m._forward_hooks) for m in qwen.modules()]
    assert sum(hooks) == 0
    assert state(qwen) == before


def test_parameter_taps_hand_over_and_restore():
    weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    seen = []
    with ParameterTaps({"w": weight, "unused": nn.Parameter(torch.ones(1))}) as taps:
        taps.listen(lambda name, gradient: seen.append((name, gradient)))
        (2 * weight).sum().backward()
        assert taps.silent() == ["unused"]
    assert not weight.requires_grad
    assert weight.grad is None
    assert [name for name, _ in seen] == ["w"]
    assert bool((seen[0][1] == 2).all())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("last:up", r"experts.gate_up_proj holds the experts' gate and up rows in one: choose mlp"),
        (f"{MOE}.experts.down_proj:9", "rows of .*down_proj that can be measured alone are 0, 1, 2"),
    ],
)
def test_what_cannot_be_had_is_refused(qwen, spec, message):
    with pytest.raises(GradvarError, match=message):
        resolve_targets(qwen, spec)


def test_quantised_experts_are_refused_by_name():
    model = make_model("qwen2_moe")
    experts = model.get_submodule(f"{MOE}.experts")
    experts.gate_up_proj = nn.Parameter(torch.zeros(3, 16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(GradvarError, match=r"experts.gate_up_proj has quantised weights \(int8, Qwen2MoeExperts\)"):
        resolve_targets(model, "last:mlp")
    assert [t.kind for t in resolve_targets(model, "last:q")] == ["q"]
