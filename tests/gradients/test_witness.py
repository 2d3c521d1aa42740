"""What shows in real responses only: found before a pass or in it, and mended by measuring each alone, or refused."""

import accelerate
import numpy as np
import pytest
import torch
from torch import nn

from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, resolve_targets
from gradvar.gradients.passes import whole
from gradvar.gradients.witness import same_in_batch
from tests.gradients import references
from tests.gradients.models import CONFIGS, make_model, make_prompt_and_responses

PROMPT, RESPONSES = make_prompt_and_responses()


def checked(model, specs, **options):
    """The measurement, its Grams and log-probabilities as the literal definition has them."""
    targets = resolve_targets(model, specs)
    measured = measure_scores(model, PROMPT, RESPONSES, specs, **options)
    expected = references.flat_scores(model, targets, PROMPT, RESPONSES)
    for target in targets:
        gap = references.error(measured.grams[target.key].gram(), references.gram_of(expected[target.key]))
        assert gap < 1e-10, target.key
    model.eval()
    for own, response in zip(measured.logprobs, RESPONSES, strict=True):
        exact = references.token_log_probs(model, PROMPT, response).detach().numpy()
        np.testing.assert_allclose(own, exact, rtol=0, atol=1e-10)
    return measured


class Around(nn.Module):
    """A module with another forward around it."""

    def __init__(self, inner, forward):
        super().__init__()
        self.inner = inner
        self.act = forward

    def forward(self, x):
        return self.act(self.inner, x)


def around(name, layer, act):
    model = make_model(name)
    model.model.layers[layer].mlp = Around(model.model.layers[layer].mlp, act)
    return model


# -- batches


def rows_mix_when_long(mlp, x):
    y = mlp(x)
    return y + 0.3 * y.mean(0, keepdim=True) if x.shape[1] > 20 else y


def capacity_of_48_tokens(mlp, x):
    kept = torch.arange(x.shape[0] * x.shape[1]) < 48
    return mlp(x) * kept.view(*x.shape[:2], 1)


@pytest.mark.parametrize("act", [rows_mix_when_long, capacity_of_48_tokens])
def test_a_batch_that_changes_its_members_beyond_a_probe_is_measured_one_by_one(act):
    measured = checked(around("qwen2", 0, act), ["last:q"], token_budget=200)
    assert measured.plan.token_budget == 1


def test_the_fullest_batch_is_looked_at():
    """The longest responses make a smaller batch than many short ones."""

    def capacity(mlp, x):
        kept = torch.arange(x.shape[0] * x.shape[1]) < 52
        return mlp(x) * kept.view(*x.shape[:2], 1)

    model = around("qwen2", 0, capacity)
    prompt, responses = make_prompt_and_responses((21, 21, 8, 8, 8, 8, 8))
    (target,) = resolve_targets(model, "0:q")
    found = measure_scores(model, prompt, responses, "0:q", token_budget=60).grams[target.key].gram()
    flat = references.flat_scores(model, [target], prompt, responses)[target.key]
    assert references.error(found, references.gram_of(flat)) < 1e-10


class Mixture(nn.Module):
    """Two experts under a name of their own, every token in both: as many vectors as tokens, in another order."""

    def __init__(self, width=16):
        super().__init__()
        self.choose = nn.Linear(width, 2, bias=False, dtype=torch.float64)
        self.local = nn.ModuleList([nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(2)])

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = self.choose(flat).softmax(-1).topk(2, -1)
        mask = nn.functional.one_hot(chosen, 2).permute(2, 1, 0)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.local):
            rank, token = torch.where(mask[i])
            out.index_add_(0, token, expert(flat[token]) * weight[token, rank, None])
        return out.view_as(x)


def test_rows_longer_than_in_the_fullest_batch_are_looked_at():
    """Among few responses: a batch of (170, 130), of which the longer decides for both, and a fuller one of short rows.

    As rotary angles do in code of its own that goes by a row's length under no known name.
    """
    model = around("llama", 1, lambda mlp, x: mlp(x) * (1.5 if x.shape[1] > 150 else 1.0))
    model.config.max_position_embeddings = 512
    prompt, responses = make_prompt_and_responses((170, 130, 67, 67, 67, 66, 66))
    (target,) = resolve_targets(model, "last:q")
    measured = measure_scores(model, prompt, responses, "last:q", token_budget=360)
    flat = references.flat_scores(model, [target], prompt, responses)[target.key]
    assert references.error(measured.grams[target.key].gram(), references.gram_of(flat)) < 1e-10
    assert measured.changed_in_batches


def test_tokens_in_another_order_are_measured_one_by_one():
    torch.manual_seed(0)
    model = make_model("llama")
    model.model.layers[1].mlp = Mixture()
    assert checked(model, ["*.1.mlp.local.*"], token_budget=60).plan.token_budget == 1


def test_log_probabilities_are_whole_when_each_goes_alone_at_last():
    time_first = around("llama", 1, lambda mlp, x: mlp(x.transpose(0, 1)).transpose(0, 1))
    measured = checked(time_first, "last:mlp", token_budget=70)
    assert [len(x) for x in measured.logprobs] == [len(x) for x in RESPONSES]
    with pytest.raises(RuntimeError, match="1 of 2 responses have no log-probabilities"):
        whole([np.zeros(1), None])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.script, in GPTBigCode
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "mamba2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ordinary_models_are_neither_refused_nor_measured_one_by_one(name, dtype):
    model = make_model(name, dtype)
    assert measure_scores(model, PROMPT, RESPONSES, "all:attn", token_budget=60).plan.token_budget == 60


def test_what_a_batch_may_move():
    alone = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert same_in_batch(alone + 1e-7, alone)
    assert not same_in_batch(alone + 1e-3, alone)
    assert not same_in_batch(alone[:-1], alone)
    half = alone.bfloat16()
    assert same_in_batch((alone * (1 + 0.02 * alone.cos())).bfloat16(), half)
    assert not same_in_batch(half.flip(0), half)
    assert not same_in_batch((alone + 0.3 * alone.mean(0) + 0.3 * alone.flip(0)).bfloat16(), half)


# -- weights and heads


def used_again(mlp, x):
    return nn.functional.linear(torch.relu(mlp.up_proj(x)), mlp.up_proj.weight.T)


class Late(nn.Linear):
    """Another map from the fifth token on."""

    def forward(self, x):
        later = (torch.arange(x.shape[-2]) >= 4).to(x.dtype)[:, None]
        return super().forward(x) * (1 + 0.5 * later)


def late():
    model = make_model("llama")
    model.model.layers[1].self_attn.v_proj.__class__ = Late
    return model


def head_in_a_layer():
    model = make_model("qwen2")
    held = [model.lm_head]  # a list hides it from named_modules

    def act(mlp, x):
        return mlp(x) + 0.1 * torch.tanh(x @ held[0].weight.T) @ held[0].weight

    model.model.layers[1].mlp = Around(model.model.layers[1].mlp, act)
    return model


@pytest.mark.parametrize(
    ("make", "spec", "key"),
    [
        (lambda: around("llama", 1, used_again), "*.1.mlp.inner.up_proj", "up_proj"),
        (late, "last:v", "v_proj"),
        (head_in_a_layer, "lm_head", "lm_head"),
    ],
    ids=["weight used again", "another map later", "head's weight in a layer"],
)
def test_a_gradient_that_is_not_captured_whole_is_refused_by_name(make, spec, key):
    with pytest.raises(GradvarError, match=rf"{key} .*from autograd's.*used outside its module's call"):
        measure_scores(make(), PROMPT, RESPONSES, spec)


def test_a_bias_of_two_modules_is_refused_where_biases_count():
    model = make_model("qwen2")
    model.model.layers[1].self_attn.k_proj.bias = model.model.layers[0].self_attn.k_proj.bias
    with pytest.raises(GradvarError, match=r"1\.self_attn\.k_proj shares its bias with .*0\.self_attn\.k_proj"):
        measure_scores(model, PROMPT, RESPONSES, "last:k")
    target = resolve_targets(model, "last:k")
    gram = measure_scores(model, PROMPT, RESPONSES, "last:k", include_bias=False).grams[target[0].key].gram()
    expected = references.flat_scores(model, target, PROMPT, RESPONSES, include_bias=False)[target[0].key]
    assert references.error(gram, references.gram_of(expected)) < 1e-10


def test_a_tied_embedding_called_twice():
    model = make_model("qwen2_tied")
    base, seen = model.model, []

    def keep(module, args, kwargs):
        seen[:] = [kwargs["input_ids"] if "input_ids" in kwargs else args[0]]

    def again(module, args, kwargs):
        moved = (args[0] if args else kwargs["hidden_states"]) + 0.3 * base.embed_tokens(seen[0])
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

    base.register_forward_pre_hook(keep, with_kwargs=True)
    base.layers[1].register_forward_pre_hook(again, with_kwargs=True)
    checked(model, ["lm_head"], token_budget=60)


@pytest.mark.parametrize("name", ["qwen2_tied", "gemma"])
def test_a_tied_embedding_whose_first_rows_are_zero(name):
    model = make_model(name)
    with torch.no_grad():
        model.model.embed_tokens.weight[:8] = 0
    checked(model, ["lm_head"], token_budget=60)


@pytest.mark.parametrize("prompt", [[5], [5] * 9])
def test_logits_that_depend_on_the_token_fed_are_found_whatever_the_prompt(prompt):
    model = make_model("llama")
    own = type(model).forward

    def copying(input_ids=None, **options):
        output = own(model, input_ids=input_ids, **options)
        output.logits = output.logits + 3.0 * nn.functional.one_hot(input_ids, 37).to(output.logits.dtype)
        return output

    model.forward = copying
    with pytest.raises(GradvarError, match="no inner model was found whose last hidden state gives the model's logits"):
        measure_scores(model, prompt, RESPONSES, "last:q")


def test_a_hook_that_changes_the_last_hidden_states_is_named():
    model = make_model("llama")

    def doubled(module, args, output):
        return type(output)(**{**output, "last_hidden_state": output.last_hidden_state * 2})

    model.model.register_forward_hook(doubled)
    with pytest.raises(GradvarError, match=r"forward hook: .*doubled on LlamaModel"):
        measure_scores(model, PROMPT, RESPONSES, "last:q")


def test_float64_targets_beside_a_float32_embedding_are_measured_in_float64():
    model = make_model("qwen2")
    model.model.embed_tokens.float()
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.double())
    assert checked(model, "last:q").grams["model.layers.1.self_attn.q_proj"].dtype == "float64"


def test_every_gram_tells_its_own_weights_dtype():
    model = make_model("qwen2", torch.bfloat16)
    layer = model.model.layers[1]
    layer.mlp.down_proj.float()
    layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    layer.mlp.register_forward_hook(lambda module, args, output: output.bfloat16())
    grams = measure_scores(model, PROMPT, RESPONSES, ["last:up,down"]).grams
    assert {key.rpartition(".")[2]: gram.dtype for key, gram in grams.items()} == {
        "up_proj": "bfloat16",
        "down_proj": "float32",
    }


def test_token_ids_beyond_the_head():
    model = make_model("qwen2")
    model.lm_head = nn.Linear(16, 30, bias=False, dtype=torch.float64)
    with pytest.raises(
        GradvarError, match="response 0 holds token id 35: the model's output embedding has ids 0 to 29"
    ):
        measure_scores(model, PROMPT, [[35, 3], [4, 5]], "last:q")


def test_attention_that_leaves_out_a_soft_cap_is_refused():
    model = make_model("gemma2")
    model.config._attn_implementation = "sdpa"  # since transformers 5.20 it refuses this itself
    with pytest.raises(GradvarError, match=r"leaves out the soft cap .*=2\).*attn_implementation=\"eager\""):
        measure_scores(model, PROMPT, RESPONSES, "last:q")


# -- offloaded


def test_experts_that_are_offloaded_are_refused_not_zero():
    model = make_model("llama")
    model.model.layers[1].mlp = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(16, 16).double()])})
    model.model.layers[1].mlp.forward = lambda x: model.model.layers[1].mlp["experts"][0](x)
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(GradvarError, match=r"experts\.0 is offloaded.*choose other targets"):
        measure_scores(offloaded, PROMPT, RESPONSES, "*.1.mlp.experts.0")


def test_an_expert_that_ran_and_has_no_gradient_is_no_zero():
    model = make_model("llama")
    experts = nn.ModuleList([nn.Linear(16, 16).double() for _ in range(2)])
    model.model.layers[1].mlp = Around(nn.ModuleDict({"experts": experts}), None)
    model.model.layers[1].mlp.act = lambda inner, x: inner["experts"][0](x) + inner["experts"][1](x).detach()
    with pytest.raises(GradvarError, match=r"no gradient reached .*experts\.1\.weight"):
        measure_scores(model, PROMPT, RESPONSES, "*.experts.*")


@pytest.mark.parametrize("kind", ["off", "reentrant", "non_reentrant"])
def test_offloaded_weights_are_gone_again_whatever_the_checkpointing(kind):
    model = accelerate.cpu_offload(make_model("qwen2"), execution_device="cpu")
    measure_scores(model, PROMPT, RESPONSES, "0:q", checkpointing=kind)
    assert all(parameter.is_meta for parameter in model.parameters())


# -- what the witness must leave alone, and must not refuse


@pytest.mark.parametrize("targets", ["last:q", "*.experts.*"])
def test_an_optimizer_in_backward_does_not_step(targets):
    model = make_model("qwen2")
    if targets != "last:q":
        inner = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(16, 16).double()])})
        model.model.layers[1].mlp = Around(inner, lambda inner, x: inner["experts"][0](x))
    (name, weight) = next(
        (n, p) for n, p in model.named_parameters() if "1.self_attn.q_proj.weight" in n or "experts" in n
    )
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.register_post_accumulate_grad_hook(lambda parameter: optimizer.step())
    before = weight.detach().clone()
    if targets == "last:q":
        measure_scores(model, PROMPT, RESPONSES, targets)
    elif "experts" in name:
        with pytest.raises(GradvarError, match="hooks of its own on its gradient"):
            measure_scores(model, PROMPT, RESPONSES, targets)
    assert torch.equal(weight, before)


def test_float32_adapters_on_a_half_precision_model_stay_in_batches():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        make_model("llama", torch.bfloat16), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    rows = []
    model.base_model.model.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    measure_scores(model, *make_prompt_and_responses(), "*lora*", token_budget=10_000)
    assert rows[-1] > 2, "the last pass ran response by response"


def test_sure_tokens_in_half_precision_are_measured():
    model = make_model("qwen2", torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight *= 1000
    prompt, _ = make_prompt_and_responses()
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    sure = int(logits.argmax())
    measured = measure_scores(model, prompt, [[sure], [sure]], ["last:q", "lm_head"])
    assert measured.logprobs[0][0] > -1e-2


@pytest.mark.parametrize("kind", ["off", "reentrant", "non_reentrant"])
def test_a_module_shared_by_two_layers(kind):
    model = make_model("qwen2")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    prompt, responses = make_prompt_and_responses()
    targets = resolve_targets(model, "*.0.mlp.up_proj")
    found = measure_scores(model, prompt, responses, "*.0.mlp.up_proj", checkpointing=kind).grams
    flat = references.flat_scores(model, targets, prompt, responses)
    for target in targets:
        assert references.error(found[target.key].gram(), references.gram_of(flat[target.key])) < 1e-10
