"""How the work is done changes nothing: padding side, tile height."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from gradvar.errors import GradvarError
from gradvar.gradients import list_targets, measure_scores, plan_measurement
from gradvar.gradients.gram import FactorStore, MatrixStore
from gradvar.gradients.logprobs import Head
from gradvar.gradients.request import undisturbed
from tests.gradients import references
from tests.gradients.models import CONFIGS, FLOAT32_INSIDE, make_model, make_prompt_and_responses

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

SPECS = ["all:qkv", "last:o,mlp"]


def grams(model, specs=SPECS, **options):
    prompt, responses = make_prompt_and_responses()
    return {key: g.gram() for key, g in measure_scores(model, prompt, responses, specs, **options).grams.items()}


def largest_gap(one, other):
    assert one.keys() == other.keys()
    return max(references.error(one[key], other[key]) for key in one)


# -- padding side

NOT_FINITE_BESIDE_PADDING = ("bloom", "mpt", "gemma2")
"""Their float32 masks make NaN of rows that see nothing, where the model is in float64."""


@pytest.mark.parametrize("name", CONFIGS)
def test_the_padding_side_does_not_matter(name):
    model = make_model(name)
    specs = [t.key for t in list_targets(model) if t.kind != "head"]
    right = grams(model, specs, token_budget=60)
    if name in NOT_FINITE_BESIDE_PADDING:
        with pytest.raises(GradvarError, match="pad on the right"):
            grams(model, specs, token_budget=60, padding_side="left")
        return
    left = grams(model, specs, token_budget=60, padding_side="left")
    assert largest_gap(left, right) < (2e-5 if name in FLOAT32_INSIDE else 1e-10)


def test_the_padding_side_does_not_matter_to_the_head_probes_and_prefixes():
    model = make_model("qwen2_tied")
    prompt, responses = make_prompt_and_responses()
    options = {"token_budget": 60, "probes": 2, "seed": 0, "prefixes": 3}
    right = measure_scores(model, prompt, responses, ["lm_head", "last:qkv"], **options)
    left = measure_scores(model, prompt, responses, ["lm_head", "last:qkv"], padding_side="left", **options)
    for key, gram in right.grams.items():
        assert references.error(left.grams[key].gram(), gram.gram()) < 1e-10
        np.testing.assert_allclose(left.taus[key].value, right.taus[key].value, rtol=1e-10)
        np.testing.assert_allclose(left.prefixes[key].value, right.prefixes[key].value, rtol=1e-9, atol=1e-18)
    for one, other in zip(left.logprobs, right.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


class ByColumn(nn.Module):
    """Positions counted from the first column, padding or not."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, positions):
        return self.table(torch.arange(positions.shape[-1])[None])


def test_padding_on_the_left_is_refused_where_it_moves_the_positions():
    for dtype in (torch.float64, torch.bfloat16):
        model = make_model("gpt2", dtype)
        grams(model, "last:qkv", padding_side="left")
        model.transformer.wpe = ByColumn(model.transformer.wpe)
        grams(model, "last:qkv")
        with pytest.raises(GradvarError, match="pad on the right"):
            grams(model, "last:qkv", padding_side="left")
    with pytest.raises(GradvarError, match="padding side: expected"):
        grams(model, "last:qkv", padding_side="middle")


def test_one_probe_finds_what_later_tokens_padding_and_others_do():
    """Where it finds nothing, causality and padding are not looked at apart."""

    def found(model, side):
        ids = [5, 9, 3, 11, 7, 2, 8, 4]
        return undisturbed(model.base_model, ids, Head(model.eval(), ids).probe_states, side)

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for name in ("qwen2", "llama", "gpt2"):
            assert found(make_model(name, dtype), "right") is not None, f"{name} {dtype}: looked at apart, for nothing"
            assert found(make_model(name, dtype), "left") is not None
        ahead = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        bert = BertLMHeadModel(BertConfig(vocab_size=37, max_position_embeddings=64, is_decoder=False, **ahead))
        mixing, by_column = make_model("qwen2", dtype), make_model("gpt2", dtype)
        mixing.model.layers[0].mlp.register_forward_hook(
            lambda _, inputs, output: output + output.mean(0, keepdim=True)
        )
        by_column.transformer.wpe = ByColumn(by_column.transformer.wpe)
        for model, side in ((bert.to(dtype), "right"), (mixing, "right"), (by_column, "left")):
            assert found(model, side) is None, f"{type(model).__name__} {dtype} {side}"


@pytest.mark.parametrize(("ahead", "share"), [(1, 0.45), (2, 0.25)])
def test_a_look_at_the_next_tokens_shows_in_half_precision_too(ahead, share):
    """Part of an output one or two tokens on, which among the states of all tokens would be taken for rounding."""
    model = make_model("llama").to(torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3) if parameter.ndim > 1 else None
    measure_scores(model, *make_prompt_and_responses((12, 9, 10, 11), prompt=9), "last:q")
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, y: y + share * torch.nn.functional.pad(y, (0, 0, 0, ahead))[:, ahead:]
    )
    with pytest.raises(GradvarError, match="is not causal"):
        measure_scores(model, *make_prompt_and_responses((12, 9, 10, 11), prompt=9), "last:q")


def test_a_model_that_mixes_a_batch_is_given_each_response_alone():
    """A layer or a user's hook that averages over the rows of a batch, which no test of causality sees."""
    for dtype, most in ((torch.float64, 1e-10), (torch.bfloat16, 1e-4)):
        model = make_model("qwen2_tied", dtype)
        layer = model.model.layers[0].mlp
        with layer.register_forward_hook(lambda _, inputs, output: output + output.mean(0, keepdim=True)):
            alone = grams(model, "last:qkv", token_budget=1)
            assert largest_gap(grams(model, "last:qkv", token_budget=60), alone) < most
        assert largest_gap(grams(model, "last:qkv", token_budget=60), alone) > 10 * most


# -- tile height


@pytest.mark.parametrize("limit", [1, 2000, 5000, 1 << 30])
def test_the_tile_height_does_not_matter(monkeypatch, limit):
    model = make_model("qwen2_tied")
    prompt, responses = make_prompt_and_responses()
    specs = ["lm_head", *SPECS]
    options = {"probes": 2, "seed": 0, "prefixes": 2}
    usual = measure_scores(model, prompt, responses, specs, **options)
    monkeypatch.setattr("gradvar.gradients.fit._TILE_LIMIT", {"cpu": limit})
    other = measure_scores(model, prompt, responses, specs, **options)
    smallest = 6 * 24 * 8  # one row of the widest target for every response
    assert other.plan.tile_bytes == min(max(limit, smallest), other.plan.tile_bytes) != usual.plan.tile_bytes
    assert [[b.keep for b in p] for p in other.plan.passes] == [[b.keep for b in p] for p in usual.plan.passes]
    for key, gram in usual.grams.items():
        assert references.error(other.grams[key].gram(), gram.gram()) < 1e-12
        np.testing.assert_allclose(other.taus[key].value, usual.taus[key].value, rtol=1e-12)


@pytest.mark.parametrize("store", [FactorStore, MatrixStore])
@pytest.mark.parametrize("height", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("stretch", [1, 4, 1 << 16])
def test_tiles_of_any_height_add_up_to_the_whole(store, height, stretch, monkeypatch):
    monkeypatch.setattr("gradvar.gradients.gram._STRETCH", stretch)
    generator = torch.Generator().manual_seed(0)
    kept, expected = store(4, 7, 3, torch.float64, torch.device("cpu")), []
    for i, tokens in enumerate((1, 5, 2, 9)):
        a, delta = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) for width in (3, 7))
        kept.add(i, a, delta)
        expected.append(torch.cat([(delta.T @ a).flatten(), delta.sum(0)]).numpy())
    gram = kept.gram(True, height * 4 * 3 * 8).numpy()
    assert references.error(gram, references.gram_of(expected)) < 1e-13
    norms = kept.squared_norms(True, height * 3 * 8).numpy()
    np.testing.assert_allclose(norms, gram.diagonal(), rtol=1e-13)


@pytest.mark.parametrize("store", [FactorStore, MatrixStore])
def test_what_is_not_finite_is_seen_by_response(store):
    kept = store(5, 7, 3, torch.float32, torch.device("cpu"))
    for i, value in enumerate((1.0, float("nan"), float("inf"), -float("inf"), 2.0)):
        delta = torch.ones(4, 7)
        delta[2, 5] = value
        kept.add(i, torch.ones(4, 3), delta)
    assert kept.finite([4, 1, 0, 3]) == [True, False, True, False]
    assert kept.finite(range(5)) == [True, False, False, False, True]


# -- packing

PACKED_BY_POSITIONS = {"qwen2", "llama", "gemma2", "mistral", "phi3", "qwen3", "mixtral", "olmo2", "gpt2"}
MIXED = {"bloom", "mpt", "lfm2"}


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_sequences_give_the_same_grams_or_are_refused(name):
    model = make_model(name)
    specs = [t.key for t in list_targets(model) if t.kind != "head" and t.direct is None][:6]
    padded = grams(model, specs, token_budget=60)
    if name in MIXED:
        with pytest.raises(GradvarError, match="mixes packed sequences: measure it padded"):
            grams(model, specs, token_budget=60, packing=True)
        return
    try:
        packed = grams(model, specs, token_budget=60, packing=True)
    except GradvarError:
        packed = None
    if packed is None:
        assert name not in PACKED_BY_POSITIONS
        return
    assert largest_gap(packed, padded) < (2e-5 if name in FLOAT32_INSIDE else 1e-10)


def test_a_packed_row_is_no_longer_than_a_mask_that_the_model_keeps():
    model = make_model("gpt_neo")
    packed = measure_scores(model, *make_prompt_and_responses(), SPECS, packing=True)
    assert packed.plan.token_budget == 64
    assert largest_gap({key: gram.gram() for key, gram in packed.grams.items()}, grams(model)) < 2e-5
    many = make_model("gpt_neo", max_position_embeddings=1024)
    request = (many, *make_prompt_and_responses([40] * 20), SPECS)
    assert plan_measurement(*request, packing=True).token_budget == plan_measurement(*request).token_budget == 512


def test_attention_in_chunks_longer_than_a_probe_is_not_packed():
    """Chunks are counted from the row's beginning: the second sequence is cut where alone it is not."""
    model = make_model("llama4", attention_chunk_size=64, max_position_embeddings=512)
    prompt, responses = make_prompt_and_responses((91, 80), prompt=2)
    with pytest.raises(GradvarError, match=r"counts blocks of tokens .*attention_chunk_size=64.*--no-packing"):
        measure_scores(model, prompt, responses, "last:q", token_budget=1000, packing=True)


@pytest.mark.parametrize("name", ["opt", "falcon_interleaved", "lfm2", "gpt_oss", "minimax", "bloom", "qwen2", "gpt2"])
def test_mixing_is_seen_in_half_precision(name):
    model = make_model(name, torch.bfloat16)
    padded = grams(model, "last:all", token_budget=60)
    if name not in PACKED_BY_POSITIONS:
        with pytest.raises(GradvarError, match="mixes packed sequences: measure it padded"):
            grams(model, "last:all", token_budget=60, packing=True)
        return
    assert largest_gap(grams(model, "last:all", token_budget=60, packing=True), padded) < 0.05


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_the_head_probes_and_checkpointing(attention):
    model = make_model("qwen2_tied")
    model.set_attn_implementation(attention)
    prompt, responses = make_prompt_and_responses()
    options = {"token_budget": 70, "probes": 2, "seed": 0, "prefixes": 3}
    padded = measure_scores(model, prompt, responses, ["lm_head", "0:qkv"], **options)
    fed = []

    def note(module, args, kwargs):
        fed.append(tuple(kwargs["input_ids"].shape))

    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
    options |= {"packing": True, "checkpointing": "non_reentrant"}
    packed = measure_scores(model, prompt, responses, ["lm_head", "0:qkv"], **options)
    hook.remove()
    assert (1, 68) in fed
    limit = 1e-5 if attention == "eager" else 1e-9  # its softmax is in float32 whatever the model
    for key, gram in padded.grams.items():
        assert references.error(packed.grams[key].gram(), gram.gram()) < limit
        np.testing.assert_allclose(packed.taus[key].value, padded.taus[key].value, rtol=limit)
        np.testing.assert_allclose(packed.prefixes[key].value, padded.prefixes[key].value, rtol=limit, atol=1e-18)
    for one, other in zip(packed.logprobs, padded.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-2 * limit)
