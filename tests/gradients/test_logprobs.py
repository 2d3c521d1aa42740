"""What is taken for a head's curve and what is left to the model's own code."""

import numpy as np
import pytest
import torch
from torch import nn

from gradvar.gradients import logprobs
from gradvar.gradients.logprobs import VOCABULARY_TILE, Head, compute_dtype
from gradvar.gradients.usage import LiveBytes
from tests.gradients.models import VOCABULARY, make_model, make_prompt_and_responses


def of_logits(change):
    """A model whose output embedding hands its logits to `change`."""

    def make(dtype):
        model = make_model("llama", dtype)
        model.lm_head.register_forward_hook(lambda module, args, output: change(output).to(output.dtype))
        return model

    return make


def masked(logits):
    """Token 7 is never to be drawn, in the way of Chameleon."""
    return torch.where(torch.arange(VOCABULARY) == 7, torch.finfo(logits.dtype).min, logits)


def loud(name, size, **changes):
    """A model with logits of up to `size` before a scale or a cap."""

    def make(dtype):
        model = make_model(name, torch.float64, tie_word_embeddings=False, **changes).eval()
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([make_prompt_and_responses()[0]])).last_hidden_state
            model.lm_head.weight.mul_(size / model.lm_head(hidden).abs().max())
        return model.to(dtype)

    return make


def forbidden(name, **changes):
    """A model whose output embedding gives token 7 a logit of -inf."""

    def make(dtype):
        model = make_model(name, dtype, tie_word_embeddings=False, **changes)
        model.lm_head.bias = nn.Parameter(torch.zeros(VOCABULARY, dtype=dtype))
        model.lm_head.bias.data[7] = -torch.inf
        return model

    return make


def without_first_states(dtype):
    """A model whose first token has no states: nothing is predicted from them here."""
    model = make_model("gemma2", dtype, tie_word_embeddings=False)

    def hook(module, args, output):
        return torch.where(torch.arange(output.shape[1])[:, None] == 0, torch.nan, output)

    model.model.norm.register_forward_hook(hook)
    return model


def silent(dtype):
    model = make_model("cohere", dtype, tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()
    return model


WAVES = torch.arange(VOCABULARY).sin()
OWN, CAPPED = "the model's own head", "linear, soft-capped"


@pytest.mark.parametrize(
    ("make", "dtype", "found"),
    [
        pytest.param(of_logits(lambda y: y * (1 + 0.015 * WAVES)), torch.bfloat16, OWN, id="factor of each token"),
        pytest.param(of_logits(lambda y: y + 0.03 * WAVES), torch.bfloat16, OWN, id="term of each token"),
        pytest.param(of_logits(masked), torch.float64, OWN, id="masked"),
        pytest.param(of_logits(masked), torch.float32, OWN, id="masked, float32"),
        pytest.param(of_logits(lambda y: y[..., :30]), torch.float64, OWN, id="fewer logits than rows"),
        pytest.param(loud("gemma2", 300.0, final_logit_softcapping=1e3), torch.float16, CAPPED, id="high cap"),
        pytest.param(loud("gemma2", 3e3, final_logit_softcapping=1e5), torch.float32, CAPPED, id="very high cap"),
        pytest.param(forbidden("cohere"), torch.float64, "linear, scaled by 0.3", id="-inf beside a scale"),
        pytest.param(forbidden("gemma2"), torch.float64, "linear, soft-capped at 3", id="-inf below a cap"),
        pytest.param(without_first_states, torch.float64, "linear, soft-capped at 3", id="states not finite"),
        pytest.param(silent, torch.float64, OWN, id="nothing but zeros"),
    ],
)
def test_odd_heads_are_what_their_own_code_says(make, dtype, found):
    """The gradient in the hidden states is that of autograd through the model's own code."""
    model = make(dtype).eval()
    prompt, (response, *_) = make_prompt_and_responses((20,))
    tokens = torch.tensor([x % 30 if x % 30 != 7 else 8 for x in response])
    with torch.no_grad():
        head = Head(model, prompt)
        hidden = head.base(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
    leaf = hidden.clone().requires_grad_()
    chosen = head.own_logits(leaf).double().log_softmax(-1).gather(1, tokens[:, None])
    (expected,) = torch.autograd.grad(chosen.sum(), leaf)
    scores = head.token_scores(hidden, tokens, torch.ones(len(tokens), dtype=hidden.dtype), 1.0, 1 << 20)
    assert head.description.startswith(found)
    limit = (4 if dtype == torch.bfloat16 else 64) * torch.finfo(dtype).eps * float(expected.double().abs().max())
    np.testing.assert_allclose(scores.hidden_gradient.double(), expected.double(), rtol=0, atol=limit)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("chunk", [1 << 24, 1 << 20])
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "phi"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_alive_at_one_time_are_foretold(name, dtype, chunk, whole, monkeypatch):
    """Of `whole` chunks as on CUDA; with a logit of -inf, which costs a copy."""
    if whole:
        monkeypatch.setattr(logprobs, "_IN_CACHE", 1 << 40)
    model = make_model(name, dtype, vocab_size=20_000).eval()
    if name == "phi":
        model.lm_head.bias.data[7] = -torch.inf
    head = Head(model, [3, 4, 5])
    assert head.is_linear
    tokens, wide = 250, compute_dtype(dtype)
    states = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with LiveBytes() as live:
        head.token_scores(states, torch.full((tokens,), 9), torch.ones(tokens, dtype=wide), 0.7, chunk)
    columns = tokens * 16 * (dtype.itemsize + 3 * wide.itemsize) + VOCABULARY_TILE * 16 * 4
    told = head.alive_bytes(min(chunk, tokens * 20_000 * wide.itemsize), dtype)
    assert live.peak <= told + columns
    assert told <= live.peak * (1.6 if whole else 1.2 if chunk > 1 << 20 else 2)
