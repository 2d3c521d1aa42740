"""Requests and models that are refused, each in one clear line."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, resolve_targets
from tests.gradients import references
from tests.gradients.models import (
    VOCABULARY,
    make_model,
    make_prompt_and_responses,
)

PROMPT, RESPONSES = [3, 4], [[5, 6], [7]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses": []}, "no responses"),
        ({"responses": [[5], []]}, "response 1 is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"responses": [[5], [VOCABULARY]]}, f"response 1 holds token id {VOCABULARY}.*0 to {VOCABULARY - 1}"),
        ({"responses": [[5], [-1]]}, "response 1 holds token id -1"),
        ({"prompt": [99]}, "the prompt holds token id 99"),
        ({"responses": [[5], [6] * 64]}, "response 1 .*65 tokens.*64 positions"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"loss_masks": [None]}, "loss masks"),
        ({"loss_masks": [[1, 0], [0]]}, "response 1.*0 everywhere"),
        ({"loss_masks": [[1], None]}, "response 0.*1 entries for 2 tokens"),
        ({"loss_masks": [[1, 2], None]}, "response 0.*only 0 and 1"),
        ({"rollout_ids": [1, 1]}, "rollout ids"),
        ({"token_budget": 0}, "token budget"),
        ({"memory_budget": 100}, "100 bytes is too small: expected at least"),
        ({"targets": []}, "no targets"),
    ],
)
def test_bad_requests_end_in_one_clear_line(qwen, changes, message):
    options = {"prompt": PROMPT, "responses": RESPONSES, "targets": "last:qkv", **changes}
    with pytest.raises(GradvarError, match=message) as caught:
        measure_scores(qwen, options.pop("prompt"), options.pop("responses"), options.pop("targets"), **options)
    assert "\n" not in str(caught.value)


def test_a_response_that_just_fits_the_positions(qwen):
    measure_scores(qwen, PROMPT, [[5] * 63], "last:v")


def test_norms_may_be_compiled():
    """They hold nothing that hooks are put on; a GPU runs them in one pass over memory instead of ten."""
    prompt, responses = make_prompt_and_responses()
    expected = measure_scores(make_model("llama"), prompt, responses, "all:qkv,mlp").grams
    model, calls = make_model("llama"), []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.compile(backend=backend, dynamic=True)
    for key, gram in measure_scores(model, prompt, responses, "all:qkv,mlp").grams.items():
        assert references.error(gram.gram(), expected[key].gram()) < 1e-12
    assert calls


def test_a_compiled_model_is_refused():
    """Marked as torch.compile marks it; compiling in earnest takes the test a minute of imports."""
    model = make_model("llama")
    model.model.layers[1]._compiled_call_impl = model.model.layers[1].forward
    with pytest.raises(GradvarError, match="compiled"):
        measure_scores(model, PROMPT, RESPONSES, "last:v")
    wrapper = make_model("llama")
    wrapper._orig_mod = model
    with pytest.raises(GradvarError, match="compiled"):
        measure_scores(wrapper, PROMPT, RESPONSES, "last:v")


def test_something_that_is_no_language_model_is_refused():
    with pytest.raises(GradvarError, match="causal language model"):
        measure_scores(nn.Linear(3, 3), PROMPT, RESPONSES, "last:v")


@pytest.mark.parametrize("decoder", [False, True])
def test_a_model_that_looks_ahead_is_refused(decoder):
    """The response's last token is not fed, so an encoder would give other numbers without a word."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, is_decoder=decoder, **sizes)
    model = BertLMHeadModel(config).double()
    if decoder:
        targets = resolve_targets(model, "last:attn,mlp")
        grams = measure_scores(model, PROMPT, RESPONSES, "last:attn,mlp").grams
        for key, scores in references.flat_scores(model.eval(), targets, PROMPT, RESPONSES).items():
            assert references.error(grams[key].gram(), references.gram_of(scores)) < 1e-10
    else:
        for dtype in (torch.float64, torch.bfloat16):
            with pytest.raises(GradvarError, match="BertModel is not causal"):
                measure_scores(model.to(dtype), PROMPT, RESPONSES, "last:attn,mlp")


def test_a_response_whose_gradient_is_not_finite_is_named():
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = float("nan")
    with pytest.raises(GradvarError, match="not finite for response 12"):
        measure_scores(model, PROMPT, [[5, 6], [5, 9, 6], [7]], "last:v", rollout_ids=[10, 12, 13])


def test_a_gradient_that_overflows_is_named():
    model = make_model("llama", torch.float16).float()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e30
        model.model.layers[1].mlp.up_proj.weight *= 1e30
    with pytest.raises(GradvarError, match="not finite for response 0"):
        measure_scores(model, PROMPT, RESPONSES, "0:qkv")
