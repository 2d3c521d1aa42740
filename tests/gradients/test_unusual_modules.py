"""Modules called twice, shared, changed, in place, under autocast; heads that do more than multiply."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForCausalLM

from gradvar.errors import GradvarError
from gradvar.gradients import list_targets, measure_scores, resolve_targets
from gradvar.gradients.batches import make_batches
from gradvar.gradients.collect import new_store
from gradvar.gradients.gram import FactorStore
from tests.gradients import references
from tests.gradients.models import (
    grams,
    largest_gap,
    least_budget,
    make_model,
    make_prompt_and_responses,
)


def test_a_module_called_twice_sums_over_its_calls():
    """ALBERT's way: both layers are one module."""
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    prompt, responses = make_prompt_and_responses()
    targets = [t for t in list_targets(model) if t.module.startswith("model.layers.0.mlp")]
    assert len(targets) == 3
    measured = measure_scores(model, prompt, responses, "model.layers.0.mlp.*", token_budget=60)
    expected = references.flat_scores(model, targets, prompt, responses)
    for target in targets:
        gap = references.error(measured.grams[target.key].gram(), references.gram_of(expected[target.key]))
        assert gap < 1e-10
    least = least_budget(model, prompt, responses, "model.layers.0.mlp.*")
    small = measure_scores(model, prompt, responses, "model.layers.0.mlp.*", memory_budget=least)
    for key, gram in small.grams.items():
        assert references.error(gram.gram(), measured.grams[key].gram()) < 1e-12


def test_a_weight_that_two_modules_share_is_refused():
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(GradvarError, match=r"shares its weight with model\.layers\.0\.mlp\.up_proj"):
        measure_scores(model, *make_prompt_and_responses(), "last:up")


def test_a_module_that_computes_something_else_is_refused():
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: 1.01 * output)
    with pytest.raises(GradvarError, match="does not compute x W'"):
        measure_scores(model, *make_prompt_and_responses(), "last:up")


class Grouped(torch.nn.Linear):
    """Each half of the weight's rows sees its own half of the input, as DeepSeek V4's `o_a_proj`."""

    def forward(self, x):
        halves = self.weight.view(2, -1, self.in_features)
        return torch.einsum("...gi,goi->...go", x.unflatten(-1, (2, -1)), halves).flatten(-2)


class Shared(torch.nn.Linear):
    """Each half of the input sees the whole weight, and is half of the output."""

    def forward(self, x):
        return super().forward(x.unflatten(-1, (2, -1))).flatten(-2)


class Twice(torch.nn.Linear):
    """Gives its output twice, side by side."""

    def forward(self, x):
        return super().forward(x).repeat(1, 1, 2)


@pytest.mark.parametrize(("kind", "width", "height"), [(Grouped, 8, 16), (Shared, 8, 8), (Twice, 16, 8)])
def test_a_module_of_other_shapes_is_refused(kind, width, height):
    model = make_model("llama")
    model.model.layers[1].self_attn.o_proj = kind(width, height, bias=False).double()
    with pytest.raises(GradvarError, match=r"o_proj \(\w+\) does not compute x W' \+ b"):
        measure_scores(model, *make_prompt_and_responses(), "last:o")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_that_computes_something_else_is_refused_in_half_precision(dtype):
    model = make_model("llama", dtype)
    measure_scores(model, *make_prompt_and_responses(), "last:up")
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: 1.1 * output)
    with pytest.raises(GradvarError, match="does not compute x W'"):
        measure_scores(model, *make_prompt_and_responses(), "last:up")


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("cohere", {"logit_scale": 0.8333}, "linear, scaled by"),  # that of Command R+
        ("granite", {"logits_scaling": 0.95}, "linear, scaled by"),
        ("gemma2", {"final_logit_softcapping": 100.0}, "linear, soft-capped at"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_done_to_logits_is_seen_in_any_precision(name, changes, found, dtype):
    prompt, responses = make_prompt_and_responses()
    model = make_model(name, dtype, **changes)
    measured = measure_scores(model, prompt, responses, "last:qkv")
    assert measured.head.startswith(found)
    number, given = float(measured.head.split()[-1]), next(iter(changes.values()))
    assert number == pytest.approx(1 / given if name == "granite" else given, rel=max(1e-5, 2 * torch.finfo(dtype).eps))
    model.eval()
    for response, logprobs in zip(responses, measured.logprobs, strict=True):
        expected = references.token_log_probs(model, prompt, response).detach().numpy()
        np.testing.assert_allclose(logprobs, expected, atol=8 * torch.finfo(dtype).eps)


def test_what_no_curve_says_is_left_to_the_models_own_code():
    """A head that adds to its logits: its own code is run, and the head itself cannot be measured."""
    prompt, responses = make_prompt_and_responses()
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output + 0.3 * output.square())
    measured = measure_scores(model, prompt, responses, "last:qkv")
    assert measured.head == "the model's own head"
    for response, logprobs in zip(responses, measured.logprobs, strict=True):
        expected = references.token_log_probs(model, prompt, response).detach().numpy()
        np.testing.assert_allclose(logprobs, expected, atol=1e-12)
    with pytest.raises(GradvarError, match="more to its logits than a matrix product, a scale or a soft cap"):
        measure_scores(model, prompt, responses, "lm_head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2_tied", "gpt2", "gemma", "mamba2"])  # Mamba's states are float32 at any dtype
def test_a_plain_head_is_seen_in_half_precision(name, dtype):
    assert measure_scores(make_model(name, dtype), *make_prompt_and_responses(), "*").head == "linear"


def test_a_module_that_takes_no_part_is_an_error_not_a_zero():
    model = make_model("llama")
    model.model.layers[1].unused = nn.Linear(16, 16).double()
    with pytest.raises(GradvarError, match=r"no gradient reached model\.layers\.1\.unused"):
        measure_scores(model, *make_prompt_and_responses(), "model.layers.1.unused")


def test_a_decoder_without_an_encoder_names_the_kinds_that_do():
    """BART's decoder alone: its attention to an encoder takes no part."""
    config = BartConfig(
        vocab_size=37, d_model=16, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=24,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BartForCausalLM(config).double()
    request = make_prompt_and_responses()
    with pytest.raises(GradvarError, match=r"no gradient reached .*encoder_attn\.k_proj.*`all` takes every .*attn,mlp"):
        measure_scores(model, *request, "last:all")
    assert len(measure_scores(model, *request, "last:attn,mlp").grams) == 4 + 2


def test_a_module_that_changes_its_projection_in_place():
    model = make_model("llama")
    model.model.layers[1].mlp.act_fn = nn.ReLU(inplace=True)
    prompt, responses = make_prompt_and_responses()
    targets = resolve_targets(model, "last:gate,down")
    measured = measure_scores(model, prompt, responses, "last:gate,down")
    expected = references.flat_scores(model, targets, prompt, responses)
    for key, gram in measured.grams.items():
        assert references.error(gram.gram(), references.gram_of(expected[key])) < 1e-10


class TimeFirst(nn.Module):
    """An MLP whose projections see (T, B, D), as some models have it."""

    def __init__(self, mlp):
        super().__init__()
        self.inner = mlp

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def test_tokens_in_an_unknown_order_go_one_response_at_a_time():
    model = make_model("llama")
    model.model.layers[1].mlp = TimeFirst(model.model.layers[1].mlp)
    prompt, responses = make_prompt_and_responses((17, 30, 30, 2, *[4] * 9))  # 8 tokens: nine would be one too many
    targets = resolve_targets(model, "last:mlp")
    expected = references.flat_scores(model, targets, prompt, responses)
    for budget in (1, 64, 10_000):
        seen = []
        measured = measure_scores(model, prompt, responses, "last:mlp,q", token_budget=budget, on_progress=seen.append)
        assert measured.plan.token_budget == 1
        assert seen[-1] == len(responses)
        for target in targets:
            gap = references.error(measured.grams[target.key].gram(), references.gram_of(expected[target.key]))
            assert gap < 1e-10


def test_no_batch_has_as_many_rows_as_tokens():
    prompt, responses = [3, 4], [[5] * 5 for _ in range(20)]
    for budget in range(1, 120):
        batches = make_batches(prompt, responses, budget, torch.device("cpu"))
        shapes = [tuple(batch.input_ids.shape) for batch in batches]
        assert (6, 6) not in shapes
        assert sorted(i for batch in batches for i in batch.members) == list(range(20))
        assert all(rows * length <= max(budget, length) for rows, length in shapes)


def test_autocast_reaches_the_model_and_not_the_sums():
    model = make_model("qwen2", torch.float32)
    prompt, responses = make_prompt_and_responses()
    exact = measure_scores(model, prompt, responses, "last:qkv")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = measure_scores(model, prompt, responses, "last:qkv")
        assert torch.is_autocast_enabled("cpu")
    for key, gram in measured.grams.items():
        assert gram.dtype == "float32 autocast bfloat16"
        gap = references.error(gram.gram(), exact.grams[key].gram())
        assert 1e-4 < gap < 0.1, "autocast had no effect, or too much"


@pytest.mark.parametrize("name", ["phi3", "glm4", "falcon_interleaved"])
def test_targets_are_the_same_under_autocast(name):
    model = make_model(name, torch.float32)
    specs = [target.key for target in list_targets(model)]
    exact = measure_scores(model, *make_prompt_and_responses(), specs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [target.key for target in list_targets(model)] == specs
        measured = measure_scores(model, *make_prompt_and_responses(), specs)
    for key, gram in measured.grams.items():
        assert references.error(gram.gram(), exact.grams[key].gram()) < 0.2


class Spoiler(nn.Module):
    """Changes its projection's input in place afterwards."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        x = x.detach().clone()
        y = self.linear(x)
        x += 1
        return y


def test_an_input_changed_in_place_is_refused():
    model = make_model("llama")
    model.model.layers[1].self_attn.v_proj = Spoiler(model.model.layers[1].self_attn.v_proj)
    with pytest.raises(GradvarError, match="input in place"):
        measure_scores(model, *make_prompt_and_responses(), "*.1.*v_proj.linear")


def test_an_input_buffer_used_again_for_the_next_batch_is_refused():
    model = make_model("llama", hidden_size=32, head_dim=8)
    buffer = torch.zeros(64, 64, 32, dtype=torch.float64)

    def into_buffer(module, args):
        place = buffer[: args[0].shape[0], : args[0].shape[1]]
        return (place.copy_(args[0].detach()),)

    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(into_buffer)
    with pytest.raises(GradvarError, match=r"model\.layers\.0\.self_attn\.q_proj: .*input again for other responses"):
        measure_scores(model, [3, 4], [[5, 6, 7], [8, 9, 5], [6, 9, 7]], "0:q", token_budget=1)


@pytest.mark.parametrize("home", ["device", "host"])
def test_one_input_buffer_of_two_layers_that_are_made_again_at_backward(home, monkeypatch):
    """One tensor with other values at each layer: what was packed or copied of the upper one is not the lower's."""
    model = make_model("qwen2", num_hidden_layers=3)
    buffers = {}

    def into_buffer(module, args):
        place = buffers.setdefault(args[0].shape, torch.zeros_like(args[0]))
        return (place.copy_(args[0].detach()),)

    def own(module, args):
        return (args[0].detach(),)

    request = make_prompt_and_responses((7, 4, 2))
    queries = [model.model.layers[layer].self_attn.q_proj for layer in (1, 2)]
    hooks = [query.register_forward_pre_hook(own) for query in queries]
    expected = grams(model, *request, "all:q")
    for hook in hooks:
        hook.remove()
    for query in queries:
        query.register_forward_pre_hook(into_buffer)
    if home == "host":
        monkeypatch.setattr("gradvar.gradients.passes.new_store", spilled)
    found = grams(model, *request, "all:q", checkpointing="reentrant", token_budget=100)
    assert largest_gap(found, expected) < 1e-10


def spilled(job, block, count, host):
    """Keep factors on the host whatever the plan says."""
    return new_store(job, replace(block, keep="factors", home="host"), count, host)


def test_q_k_and_v_keep_their_common_input_once(qwen, monkeypatch):
    kept = []
    own = FactorStore._keep

    def keep(self, i, a, delta):
        kept.append((a, a.untyped_storage().data_ptr()))
        own(self, i, a, delta)

    monkeypatch.setattr(FactorStore, "_keep", keep)
    measure_scores(qwen, [3] * 3, [[4], [5]], "last:qkv")
    assert len(kept) == 3 + 6  # of the witness, and of the two responses
    assert len({pointer for _, pointer in kept}) == 2
