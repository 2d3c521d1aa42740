"""The user's model is left as it was found, after an exception or Ctrl-C too."""

import pytest
import torch

from gradvar.gradients import measure_scores
from tests.gradients.models import (
    grams,
    largest_gap,
    make_prompt_and_responses,
    state,
    uneven,
)


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
