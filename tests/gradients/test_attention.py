"""Attention of our own for packed sequences: exact on the CPU, chosen where it can be had, refused where it cannot."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.attention import varlen

from gradvar import attention
from gradvar.attention import VARLEN, choose_attention, register, varlen_attention, why_not
from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, resolve_targets
from gradvar.gradients.batches import last_hidden, make_batches
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses


def naive(query, key, value, scale, window):
    """Attention of one sequence by its definition, (T, H, D)."""
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    rows = []
    for t in range(len(query)):
        first = max(0, t + 1 - window)
        for h in range(heads):
            k, v = key[first : t + 1, h // groups], value[first : t + 1, h // groups]
            rows.append((k @ query[t, h] * scale).softmax(0) @ v)
    return torch.stack(rows).view(len(query), heads, -1)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_each_sequence_sees_itself_alone_gradients_too(key_heads, scale, window):
    generator = torch.Generator().manual_seed(0)
    lengths, width = (7, 1, 4), 6
    sizes = (4, key_heads, key_heads)
    q, k, v = (torch.randn(12, n, width, generator=generator, dtype=torch.float64).requires_grad_() for n in sizes)
    starts = torch.tensor([0, 7, 8, 12], dtype=torch.int32)
    rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
    output, weights = varlen_attention(
        torch.nn.Identity(), *rows, None, scaling=scale, sliding_window=window, cu_seq_lens_q=starts, max_length_q=7
    )
    parts = [
        naive(*(x[a:b] for x in (q, k, v)), scale or width**-0.5, window or 100)
        for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False)
    ]
    expected = torch.cat(parts)
    assert weights is None
    assert output.shape == (1, sum(lengths), 4, width)
    torch.testing.assert_close(output[0], expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(output[0], (q, k, v), seed), torch.autograd.grad(expected, (q, k, v), seed), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_rows_without_packing_and_queries_behind_kept_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    output, _ = varlen_attention(torch.nn.Identity(), q, k, v, None)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    behind, _ = varlen_attention(torch.nn.Identity(), q[:, :, 6:], k, v, None)
    torch.testing.assert_close(behind, expected[:, 6:])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal=False"),
        ({"attention_mask": torch.ones(1, 5)}, "attention_mask"),
    ],
)
def test_what_it_does_not_do_is_refused(options, named):
    q = torch.zeros(1, 4, 5, 8)
    mask = options.pop("attention_mask", None)
    with pytest.raises(GradvarError, match=f"does not do {named}"):
        varlen_attention(torch.nn.Identity(), q, q, q, mask, **options)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "mistral", "gemma3", "phi3", "gpt_neox", "qwen3"])
def test_packed_grams_are_the_padded_ones(name):
    """Windows of 6 tokens (Mistral, Gemma 3), fused qkv, shared heads; probes and checkpointing on the same graph."""
    expected_model = make_model(name)
    prompt, responses = make_prompt_and_responses((9, 5, 12, 7, 3, 11))
    options = {"probes": 2, "seed": 0}
    specs = ["0:attn", "last:mlp"]
    expected = measure_scores(expected_model, prompt, responses, specs, packing=False, **options)
    register()
    model = make_model(name)
    model.set_attn_implementation(VARLEN)
    for more in ({"packing": True, "token_budget": 60}, {"packing": True, "checkpointing": "non_reentrant"}, {}):
        found = measure_scores(model, prompt, responses, specs, **options, **more)
        assert found.attention == VARLEN
        for key, gram in expected.grams.items():
            assert references.error(found.grams[key].gram(), gram.gram()) < 1e-10
            np.testing.assert_allclose(found.taus[key].value, expected.taus[key].value, rtol=1e-9)


def test_sequences_lengths_are_handed_to_the_layers(monkeypatch):
    """Else each layer reads them back from the positions: on a GPU one wait a layer."""
    seen = []

    def noting(module, query, key, value, mask, **others):
        seen.append((others.get("cu_seq_lens_q"), others.get("max_length_q")))
        return varlen_attention(module, query, key, value, mask, **others)

    from transformers import AttentionInterface

    register()
    model = make_model("qwen2")
    model.set_attn_implementation(VARLEN)
    AttentionInterface.register(VARLEN, noting)
    try:
        (batch,) = make_batches([3, 4], [[5, 6, 7], [8, 9]], 100, torch.device("cpu"), packed=True)
        last_hidden(model.base_model, batch)
    finally:
        register()
    assert [(starts.tolist(), longest) for starts, longest in seen] == [([0, 4, 7], 4)] * 2


def test_which_attention_a_setting_means():
    qwen, gemma2 = make_model("qwen2").config, make_model("gemma2").config
    assert choose_attention("auto", qwen, "cpu", "float32") is None
    assert choose_attention("auto", qwen, "cuda", "float32") is None
    assert choose_attention("auto", qwen, "cuda:1", "bfloat16") == VARLEN
    assert choose_attention("auto", gemma2, "cuda", "bfloat16") in (None, "flash_attention_2")
    assert choose_attention("eager", qwen, "cpu", "float32") == "eager"
    assert why_not(qwen) is None
    with pytest.raises(GradvarError, match="bends its attention logits"):
        choose_attention(VARLEN, gemma2, "cpu", "float32")
    with pytest.raises(GradvarError, match="cannot be exchanged"):
        choose_attention(VARLEN, make_model("mamba2").config, "cpu", "float32")
    with pytest.raises(GradvarError, match="expected a CUDA device and bfloat16"):
        choose_attention("flash_attention_2", qwen, "cpu", "bfloat16")
    with pytest.raises(GradvarError, match="no backward of it on cpu"):
        choose_attention("flex_attention", qwen, "cpu", "float32")


def test_attention_that_only_a_mask_tells_is_not_exchanged():
    from transformers import Llama4TextConfig

    assert "a mask tells" in str(why_not(Llama4TextConfig()))
    assert choose_attention("auto", Llama4TextConfig(), "cuda", "bfloat16") is None


def by_definition(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch's kernel is said to give, where it does not run: (T, H, D) of packed sequences.

    torch's own code sees the arguments as well, without values, and refuses what it does not take.
    """
    shapes = [x.detach().to("meta", torch.bfloat16) for x in (query, key, value)]
    starts = [x.to("meta") for x in (cu_seq_q, cu_seq_k)]
    own = varlen.varlen_attn(
        *shapes, *starts, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=enable_gqa
    )  # fmt: skip
    assert own.shape == query.shape
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size == (-1, 0), "all that went before, nothing that follows"
    bounds = list(itertools.pairwise(cu_seq_q.tolist()))
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == max(b - a for a, b in bounds)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.cat([naive(*(x[a:b] for x in (query, key, value)), scale, max_q) for a, b in bounds])


@pytest.fixture
def kernel(monkeypatch):
    """Let a function play torch's kernel, on the CPU too."""
    calls = []

    def play(function):
        @functools.wraps(by_definition)  # its parameters
        def noted(*args, **options):
            calls.append(args[0].shape)
            return function(*args, **options)

        def fits(query, key, value, scale):
            return attention._agrees(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1], scale)

        attention._agrees.cache_clear()
        monkeypatch.setattr(attention, "_kernel", lambda: noted)
        monkeypatch.setattr(attention, "_fits_kernel", fits)
        return calls

    yield play
    attention._agrees.cache_clear()


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    window = (-1, 0) if is_causal else (-1, -1)
    return by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window)


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("older", [of_torch_2_10, of_torch_2_11])
@pytest.mark.parametrize("scale", [None, 0.7, 8**-0.5])
def test_older_kernels_get_every_head_its_keys(monkeypatch, older, scale):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(9, heads, 8, generator=generator) for heads in (4, 2, 2))
    starts = torch.tensor([0, 5, 9], dtype=torch.int32)
    expected = by_definition(query, key, value, starts, starts, 5, 5, scale=scale, window_size=(-1, 0), enable_gqa=True)
    monkeypatch.setattr(attention, "_kernel", lambda: older)
    torch.testing.assert_close(attention._by_kernel(query, key, value, starts, 5, scale), expected)


def test_packed_grams_by_a_kernel_for_all_sequences_at_once(kernel):
    """How torch's kernel is called: shapes, where sequences begin, shared heads, the model's own scale."""
    calls = kernel(by_definition)
    prompt, responses = make_prompt_and_responses((9, 5, 12, 7, 3, 11))
    for name in ("qwen3", "granite"):  # granite: a scale of its own
        expected = measure_scores(make_model(name), prompt, responses, ["0:attn", "last:mlp"]).grams
        register()
        model = make_model(name)
        model.set_attn_implementation(VARLEN)
        found = measure_scores(model, prompt, responses, ["0:attn", "last:mlp"], packing=True).grams
        assert calls.count((sum(len(r) + 4 for r in responses), 4, 8 if name == "qwen3" else 4)) >= 2
        for key, gram in expected.items():
            assert references.error(found[key].gram(), gram.gram()) < 1e-10


def without_causality(query, key, value, *args, **options):
    return by_definition(query.flip(0), key.flip(0), value.flip(0), *args, **options).flip(0)


def without_bounds(query, key, value, starts, *args, **options):
    both = torch.tensor([0, len(query)], dtype=torch.int32)
    return by_definition(query, key, value, both, both, len(query), len(query), **options)


def without_a_gradient(query, key, value, *args, **options):
    return by_definition(query, key.detach(), value, *args, **options)


def half_a_gradient(query, key, value, *args, **options):
    return by_definition(query, (key + key.detach()) / 2, value, *args, **options)


def no_such_kernel(*args, **options):
    raise NotImplementedError("not on this device")


@pytest.mark.parametrize(
    "function", [without_causality, without_bounds, without_a_gradient, half_a_gradient, no_such_kernel]
)
def test_a_kernel_is_tried_before_it_is_trusted(kernel, function):
    sizes = (torch.device("cpu"), torch.bfloat16, 4, 2, 16)
    kernel(by_definition)
    assert attention._agrees(*sizes)
    kernel(function)
    assert not attention._agrees(*sizes)


def test_a_bfloat16_model_packed_without_padding_is_the_float64_loop_to_its_roundings():
    """One row of all tokens, no mask; the same weights in float64 are the reference."""
    register()
    model = make_model("qwen2", torch.bfloat16)
    model.set_attn_implementation(VARLEN)
    prompt, responses = make_prompt_and_responses()
    fed = []

    def note(module, args, options):
        fed.append((tuple(options["input_ids"].shape), options.get("attention_mask")))

    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
    measured = measure_scores(model, prompt, responses, ["all:qkv", "last:o,mlp"], packing=True, token_budget=200)
    hook.remove()
    assert ((1, sum(len(prompt) + len(r) - 1 for r in responses)), None) in fed
    assert (measured.dtype, measured.attention) == ("bfloat16", VARLEN)
    exact = make_model("qwen2", torch.bfloat16).double()
    targets = resolve_targets(exact, ["all:qkv", "last:o,mlp"])
    for key, scores in references.flat_scores(exact, targets, prompt, responses).items():
        gram = measured.grams[key].gram()
        assert gram.dtype == np.float64
        assert references.error(gram, references.gram_of(scores)) < 0.1
