"""What measure_scores promises beyond the Gram itself: invariances, masks, per-token numbers."""

import numpy as np
import pytest
import torch

from gradvar.gradients import measure_scores, resolve_targets, score_grams
from tests.gradients import references
from tests.gradients.models import (
    FLOAT32_INSIDE,
    SPECS,
    VOCABULARY,
    grams,
    largest_gap,
    least_budget,
    make_model,
    make_prompt_and_responses,
)


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
    atol = 1e-7 if name in FLOAT32_INSIDE else 1e-12
    for i, response in enumerate(responses):
        p = references.distributions(model, prompt, response, 0.7)
        np.testing.assert_allclose(measured.entropy[i], -(p * np.log(p)).sum(1), rtol=1e-6, atol=atol)
        np.testing.assert_allclose(measured.collision[i], (p**2).sum(1), rtol=1e-6, atol=atol)


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


@pytest.mark.slow
def test_responses_of_20_to_16_000_tokens():
    model = make_model("qwen2", max_position_embeddings=16384)
    prompt, responses = make_prompt_and_responses((16_000, 20, 900))
    flat = references.flat_scores(model, resolve_targets(model, SPECS), prompt, responses)
    for options in ({"memory_budget": 400 << 20}, {"checkpointing": "non_reentrant"}):
        measured = measure_scores(model, prompt, responses, SPECS, **options)
        for key, scores in flat.items():
            assert references.error(measured.grams[key].gram(), references.gram_of(scores)) < 1e-10
