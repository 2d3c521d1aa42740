"""What measure_scores promises beyond the Gram itself: invariances, masks, per-token numbers, state, refusals."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from gradvar.errors import GradvarError
from gradvar.gradients import list_targets, measure_scores, resolve_targets, score_grams
from gradvar.gradients.batches import make_batches
from gradvar.gradients.gram import FactorStore
from tests.gradients import references
from tests.gradients.models import VOCABULARY, least_budget, make_model, make_prompt_and_responses, state, uneven

SPECS = ["all:qkv", "last:o,mlp"]


def grams(model, prompt, responses, specs=SPECS, **options):
    return {key: g.gram() for key, g in measure_scores(model, prompt, responses, specs, **options).grams.items()}


def largest_gap(one, other):
    assert one.keys() == other.keys()
    return max(references.error(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def qwen():
    return make_model("qwen2")


@pytest.fixture(scope="module")
def whole(qwen):
    """One padded batch of everything."""
    return grams(qwen, *make_prompt_and_responses(), token_budget=10_000)


@pytest.mark.parametrize("budget", [1, 40, 70, 120])
def test_batches_do_not_matter(qwen, whole, budget):
    assert largest_gap(grams(qwen, *make_prompt_and_responses(), token_budget=budget), whole) < 1e-12


def test_order_and_batch_mates_do_not_matter(qwen, whole):
    prompt, responses = make_prompt_and_responses()
    order = [4, 0, 5, 2, 1, 3]
    shuffled = grams(qwen, prompt, [responses[i] for i in order])
    for key, gram in whole.items():
        assert references.error(shuffled[key], gram[np.ix_(order, order)]) < 1e-12
    pair = grams(qwen, prompt, [responses[2], responses[5]])
    for key, gram in whole.items():
        assert references.error(pair[key], gram[np.ix_([2, 5], [2, 5])]) < 1e-12


@pytest.mark.parametrize("share", [1.0, 1.05])
def test_a_small_memory_budget_gives_the_same_grams_in_more_passes(qwen, whole, share):
    prompt, responses = make_prompt_and_responses()
    memory = int(share * least_budget(qwen, prompt, responses, SPECS))
    measured = measure_scores(qwen, prompt, responses, SPECS, memory_budget=memory)
    assert len(measured.plan.passes) > 1
    assert {b.keep for blocks in measured.plan.passes for b in blocks} <= {"factors", "matrices"}
    assert largest_gap({k: g.gram() for k, g in measured.grams.items()}, whole) < 1e-12
    assert all(len(lp) == len(r) for lp, r in zip(measured.logprobs, responses, strict=True))


def test_the_head_in_several_passes():
    model = make_model("qwen2_tied")
    prompt, responses = make_prompt_and_responses()
    once = grams(model, prompt, responses, "lm_head")
    least = least_budget(model, prompt, responses, "lm_head")
    measured = measure_scores(model, prompt, responses, "lm_head", memory_budget=least + 500)
    assert len(measured.plan.passes) > 1
    assert references.error(measured.grams["lm_head"].gram(), once["lm_head"]) < 1e-12


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature_divides_the_logits(qwen, temperature):
    prompt, responses = make_prompt_and_responses()
    measured = measure_scores(qwen, prompt, responses, "last:k", temperature=temperature)
    (target,) = resolve_targets(qwen, "last:k")
    expected = references.flat_scores(qwen, [target], prompt, responses, temperature=temperature)[target.key]
    gram = measured.grams[target.key]
    assert references.error(gram.gram(), references.gram_of(expected)) < 1e-12
    assert gram.temperature == temperature
    assert gram.dtype == "float64"


def test_masked_tokens_are_read_but_carry_no_loss(qwen):
    prompt, responses = make_prompt_and_responses()
    masks = [None, [0, 1], [1] * 5 + [0] * 7 + [1] * 5, None, [0] * 29 + [1], [1, 0, 1, 0]]
    measured = measure_scores(qwen, prompt, responses, SPECS, loss_masks=masks, token_budget=60)
    targets = resolve_targets(qwen, SPECS)
    expected = references.flat_scores(qwen, targets, prompt, responses, masks=masks)
    for key, gram in measured.grams.items():
        assert references.error(gram.gram(), references.gram_of(expected[key])) < 1e-10
    unmasked = measure_scores(qwen, prompt, responses, SPECS)
    for one, other in zip(measured.logprobs, unmasked.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_leaving_the_bias_out(qwen):
    prompt, responses = make_prompt_and_responses()
    targets = resolve_targets(qwen, "last:qkv")
    assert all(t.has_bias for t in targets)
    measured = measure_scores(qwen, prompt, responses, "last:qkv", include_bias=False)
    expected = references.flat_scores(qwen, targets, prompt, responses, include_bias=False)
    for key, gram in measured.grams.items():
        assert not gram.include_bias
        assert references.error(gram.gram(), references.gram_of(expected[key])) < 1e-12


def test_grams_of_targets_add_up_to_the_gram_over_both(qwen):
    prompt, responses = make_prompt_and_responses()
    measured = measure_scores(qwen, prompt, responses, "last:qkv").grams
    q, k, v = measured.values()
    scores = references.flat_scores(qwen, resolve_targets(qwen, "last:qkv"), prompt, responses)
    together = references.gram_of(np.concatenate(list(scores.values()), axis=1))
    assert references.error((q + k + v).gram(), together) < 1e-12


def test_deviations_from_the_gram_alone(qwen):
    """D_i = ||g_i - mean g||^2 by arithmetic on S equals the difference of the gradients themselves."""
    prompt, responses = make_prompt_and_responses((8, 5, 20, 13, 30, 2))
    (target,) = resolve_targets(qwen, "last:v")
    gram = measure_scores(qwen, prompt, responses, "last:v").grams[target.key].gram()
    scores = references.flat_scores(qwen, [target], prompt, responses)[target.key]
    direct = ((scores - scores.mean(0)) ** 2).sum(1)
    np.testing.assert_allclose(np.diag(gram) - 2 * gram.mean(1) + gram.mean(), direct, rtol=1e-11)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_entropy_and_collision_of_each_token(name):
    model = make_model(name).eval()
    prompt, responses = make_prompt_and_responses()
    measured = measure_scores(model, prompt, responses, "last:v", temperature=0.7)
    for i, response in enumerate(responses):
        p = references.distributions(model, prompt, response, 0.7)
        np.testing.assert_allclose(measured.entropy[i], -(p * np.log(p)).sum(1), atol=1e-12)
        np.testing.assert_allclose(measured.collision[i], (p**2).sum(1), atol=1e-12)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "cohere"])
def test_log_probs_against_the_loss_of_transformers(name):
    model = make_model(name, torch.float32)
    prompt, responses = make_prompt_and_responses()
    measured = measure_scores(model, prompt, responses, "last:attn")
    model.eval()
    for i, response in enumerate(responses):
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss)
        assert -measured.logprobs[i].mean() == pytest.approx(loss, rel=1e-5)


def test_chunks_of_tokens_do_not_matter(qwen, whole, monkeypatch):
    monkeypatch.setattr("gradvar.gradients.logprobs._CHUNK_BYTES", {"cpu": VOCABULARY * 8 * 3})
    assert largest_gap(grams(qwen, *make_prompt_and_responses()), whole) < 1e-12


def test_chunks_of_tokens_do_not_matter_to_a_models_own_head(monkeypatch):
    model = make_model("gemma2")
    before = grams(model, *make_prompt_and_responses())
    monkeypatch.setattr("gradvar.gradients.logprobs._CHUNK_BYTES", {"cpu": VOCABULARY * 8 * 3})
    assert largest_gap(grams(model, *make_prompt_and_responses()), before) < 1e-12


# float32 on this model leaves about 1e-6; bfloat16 keeps 8 bits in every activation (measured: see the report)
@pytest.mark.parametrize(("dtype", "limit", "worst_logprob"), [(torch.float32, 3e-5, 1e-5), (torch.bfloat16, 0.1, 0.3)])
def test_lower_precision_stays_close_to_float64(qwen, dtype, limit, worst_logprob):
    prompt, responses = make_prompt_and_responses()
    model = make_model("qwen2", dtype)
    exact = make_model("qwen2", dtype).double()  # the same rounded weights
    low = measure_scores(model, prompt, responses, SPECS)
    high = measure_scores(exact, prompt, responses, SPECS)
    for key, gram in low.grams.items():
        assert references.error(gram.gram(), high.grams[key].gram()) < limit
        assert gram.dtype == str(dtype).removeprefix("torch.")
    for one, other in zip(low.logprobs, high.logprobs, strict=True):
        assert np.abs(one - other).max() < worst_logprob


def test_progress_counts_responses_up_to_all_of_them(qwen):
    seen = []
    prompt, responses = make_prompt_and_responses()
    measure_scores(qwen, prompt, responses, "last:v", token_budget=40, on_progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert seen[-1] == len(responses)


def test_score_grams_is_the_thin_form(qwen, whole):
    prompt, responses = make_prompt_and_responses()
    thin = score_grams(qwen, prompt, responses, SPECS)
    assert largest_gap({k: g.gram() for k, g in thin.items()}, whole) < 1e-12
    assert next(iter(thin.values())).rollout_ids == tuple(range(len(responses)))


def test_rollout_ids_name_the_rows(qwen):
    prompt, responses = make_prompt_and_responses()
    measured = measure_scores(qwen, prompt, responses, "last:v", rollout_ids=[3, 1, 4, 15, 9, 2])
    assert next(iter(measured.grams.values())).rollout_ids == (3, 1, 4, 15, 9, 2)


# -- the user's model is left as it was


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma2"])
def test_state_is_restored(name):
    model = uneven(name)
    before = state(model)
    weights = [p.detach().clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    prompt, responses = make_prompt_and_responses()
    first = grams(model, prompt, responses, "last:all")
    assert state(model) == before
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert largest_gap(grams(model.eval(), prompt, responses, "last:all"), first) < 1e-12  # dropout was off


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["progress", "forward", "head"])
def test_state_is_restored_after_an_exception(error, where):
    model = uneven("gemma2")
    before = state(model)
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise error("stop here")

    handle, options = None, {}
    if where == "progress":
        options["on_progress"] = fail
    else:
        module = model.model.layers[1].mlp if where == "forward" else model.lm_head
        handle = module.register_forward_hook(fail)
        before = state(model)
    prompt, responses = make_prompt_and_responses()
    with pytest.raises(error):
        measure_scores(model, prompt, responses, "last:qkv", token_budget=40, **options)
    assert state(model) == before
    if handle is not None:
        handle.remove()


def test_it_measures_under_no_grad_and_inference_mode(qwen, whole):
    with torch.no_grad():
        assert largest_gap(grams(qwen, *make_prompt_and_responses()), whole) < 1e-12
    with torch.inference_mode():
        assert largest_gap(grams(qwen, *make_prompt_and_responses()), whole) < 1e-12


# -- modules used in unusual ways


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


# -- refusals

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
