"""What shows beyond the witness's beginning: stretches of the longest response, and whole ones over the lengths."""

import re

import accelerate
import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, resolve_targets, witness
from gradvar.gradients.usage import LiveBytes
from gradvar.gradients.witness import check_stretch
from tests.gradients import references
from tests.gradients.models import least_budget, make_model, make_prompt_and_responses
from tests.gradients.test_witness import PROMPT, RESPONSES, around, used_again


def used_again_in_long_ones(mlp, x):
    return mlp(x) + used_again(mlp, x) if x.shape[1] > 40 else mlp(x)


def used_again_further_on(mlp, x):
    later = (torch.arange(x.shape[1]) > 42).to(x.dtype)[:, None]
    return mlp(x) + later * used_again(mlp, x)


@pytest.mark.parametrize("lengths", [(50,), (50, 44, 41, 10)])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_a_weight_used_elsewhere_in_long_sequences_alone_is_refused(budget, lengths):
    with pytest.raises(GradvarError, match=r"up_proj .*from autograd's.*used outside its module's call"):
        measure_scores(
            around("llama", 1, used_again_in_long_ones),
            *make_prompt_and_responses(lengths),
            "*.1.mlp.inner.up_proj",
            token_budget=budget,
        )


def test_a_weight_used_elsewhere_far_on_is_refused_where_looking_there_is_cheap():
    """The states of a beginning are the same: only a longer stretch shows it, one of 100 responses whole."""
    with pytest.raises(GradvarError, match=r"up_proj .*from autograd's.*used outside its module's call"):
        measure_scores(
            around("llama", 1, used_again_further_on),
            *make_prompt_and_responses((50,) * 100),
            "*.1.mlp.inner.up_proj",
        )


def used_again_in_middling_ones(mlp, x):
    return mlp(x) + used_again(mlp, x) if 42 <= x.shape[1] < 48 else mlp(x)


def test_a_weight_used_elsewhere_at_middling_lengths_is_refused_some_prompts_on():
    """A pass has 49 tokens to spare: the first feeds so many of the longest, the second a response of 40, whole."""
    model = around("llama", 1, used_again_in_middling_ones)

    def measure(seed):
        request = make_prompt_and_responses((10, 20, 57, 40, 52) * 20, seed=seed)
        return measure_scores(model, *request, "*.1.mlp.inner.up_proj", token_budget=1)

    measure(1)
    with pytest.raises(GradvarError, match=r"up_proj .*from autograd's.*may be wrong too"):
        measure(2)


def test_a_batch_that_changes_middling_responses_is_measured_one_by_one_some_prompts_on():
    """In batches they are padded beyond that length; the witness is a beginning, short of it."""

    def act(mlp, x):
        return mlp(x) * (1.5 if 42 <= x.shape[1] < 48 else 1.0)

    model, budgets = around("llama", 1, act), []
    targets = resolve_targets(model, "last:q")
    for seed in range(3):
        prompt, responses = make_prompt_and_responses((10, 20, 57, 40, 52) * 20, seed=seed)
        measured = measure_scores(model, prompt, responses, "last:q", token_budget=10_000)
        budgets.append((measured.plan.token_budget, measured.changed_in_batches))
    assert budgets == [(10_000, False), (1, True), (1, True)], "once seen, the model is never trusted again"
    expected = references.flat_scores(model, targets, prompt, responses)
    gram = measured.grams[targets[0].key].gram()
    assert references.error(gram, references.gram_of(expected[targets[0].key])) < 1e-10


def test_stretches_are_spread_over_the_lengths_and_cost_what_the_passes_pay_for(monkeypatch):
    looked = []
    own = witness.make_alone

    def noted(job, chosen, start, stop):
        if start:
            looked.append((len(job.responses[chosen]), stop))
        return own(job, chosen, start, stop)

    monkeypatch.setattr(witness, "make_alone", noted)
    model = make_model("llama", max_position_embeddings=512)
    lengths = tuple(range(36, 436, 5))
    prompt, responses = make_prompt_and_responses(lengths)
    fed = sum(lengths) + 4 * len(lengths)
    for _ in range(12):
        measure_scores(model, prompt, responses, "last:q")
    assert looked[0] == (431, fed // 80 - 4)
    assert all(length == stop for length, stop in looked[1:]), "whole ones"
    assert sum(stop + 4 for _, stop in looked) <= 12 * fed / 80
    thirds = {(length - 36) * 3 // 400 for length, _ in looked}
    assert thirds == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("room", r"no room for its gradient of \d+ bytes"),
        ("hooks", "hooks on its gradient"),
        ("offloaded", "offloaded"),
        ("places", "in several places under reentrant checkpointing"),
    ],
)
def test_what_is_not_held_against_autograd_is_said(change, why):
    model, options = make_model("qwen2", hidden_size=256, intermediate_size=2048), {}
    if change == "room":
        options["memory_budget"] = least_budget(model, PROMPT, RESPONSES[:1], "last:up") * 11 // 10
    elif change == "hooks":
        model.model.layers[1].mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    elif change == "offloaded":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    else:
        model.model.layers[1].mlp = model.model.layers[0].mlp
        options["checkpointing"] = "reentrant"
    spec = "*.0.mlp.up_proj" if change == "places" else "last:up"
    measured = measure_scores(model, PROMPT, RESPONSES[:1], spec, **options)
    assert list(measured.unheld) == list(measured.grams)
    assert re.search(why, next(iter(measured.unheld.values())))
    assert measure_scores(make_model("qwen2"), PROMPT, RESPONSES, "last:up").unheld == {}


@pytest.mark.parametrize("spec", ["*.1.mlp.inner.up_proj", "last:qkv", "lm_head"])
def test_states_that_change_with_the_length_alone_are_measured(spec):
    model = around("llama", 1, lambda mlp, x: mlp(x) * (1.5 if x.shape[1] > 40 else 1.0))
    prompt, responses = make_prompt_and_responses((50, 44, 30, 10))
    measured = measure_scores(model, prompt, responses, spec, token_budget=10_000)
    assert measured.plan.token_budget == 1
    expected = references.flat_scores(model, resolve_targets(model, spec), prompt, responses)
    for key, gram in measured.grams.items():
        assert references.error(gram.gram(), references.gram_of(expected[key])) < 1e-10


@pytest.mark.parametrize("targets", ["0:attn,mlp", "lm_head"])
def test_a_long_stretch_takes_no_more_than_a_batch_and_what_is_kept_of_it(targets, monkeypatch):
    model = around("llama", 1, lambda mlp, x: mlp(x) * (1.5 if x.shape[1] > 40 else 1.0))
    model.config.max_position_embeddings = 5000
    seen = []

    def watched(job, blocks, batches, tokens):
        with LiveBytes() as live:
            check_stretch(job, blocks, batches, tokens)
        kept = sum(block.bytes for block in blocks)
        seen.append((tokens, live.peak, job.plan.work_bytes + kept))

    monkeypatch.setattr("gradvar.gradients.passes.check_stretch", watched)
    prompt, responses = make_prompt_and_responses((2000, 300))
    measure_scores(model, prompt, responses, targets, token_budget=1)
    assert [tokens for tokens, _, _ in seen] == [28, 2004]
    _, peak, planned = seen[-1]
    assert 1 << 20 < peak <= planned
