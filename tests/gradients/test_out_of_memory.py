"""A device that runs out of memory: the pass again in half batches, every number as it would have been, or one line."""

import numpy as np
import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, passes
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses


def failing(monkeypatch, times, after=1):
    """Let backward run out of memory so many times, from the second batch on; returns the sizes of all batches."""
    own, calls, sizes = passes._backward, [0], []

    def backward(seen, *args, **kwargs):
        calls[0] += 1
        sizes.append(seen.hidden.shape[0])
        if after < calls[0] <= after + times:
            calls[0] = after if times > 1 else calls[0]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return own(seen, *args, **kwargs)

    monkeypatch.setattr(passes, "_backward", backward)
    return sizes


@pytest.mark.parametrize("probes", [0, 2])
def test_the_pass_is_run_again_in_half_batches(monkeypatch, probes):
    model = make_model("qwen2")
    prompt, responses = make_prompt_and_responses((9, 5, 12, 7, 3, 11, 8, 8))
    options = {"token_budget": 64, "probes": probes, "seed": 0}
    expected = measure_scores(model, prompt, responses, "all:qkv", **options)
    with monkeypatch.context() as patch:
        sizes = failing(patch, 1)
        found = measure_scores(model, prompt, responses, "all:qkv", **options)
    assert found.plan.token_budget <= expected.plan.token_budget // 2
    assert max(sizes[2:]) < sizes[0]
    for key, gram in expected.grams.items():
        assert references.error(found.grams[key].gram(), gram.gram()) < 1e-12
        if probes:
            np.testing.assert_allclose(found.taus[key].value, expected.taus[key].value, rtol=1e-10)
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_twice_is_one_clear_line(monkeypatch):
    prompt, responses = make_prompt_and_responses((9, 5, 12, 7, 3, 11, 8, 8))
    failing(monkeypatch, 10**6)
    with pytest.raises(GradvarError, match=r"cpu ran out of memory in batches of .* give a lower --memory-budget"):
        measure_scores(make_model("qwen2"), prompt, responses, "last:q", token_budget=64)


def test_alone_there_is_nothing_to_halve(monkeypatch):
    prompt, responses = make_prompt_and_responses((9, 5))
    sizes = failing(monkeypatch, 1, after=0)
    with pytest.raises(GradvarError, match="ran out of memory"):
        measure_scores(make_model("qwen2"), prompt, responses, "last:q", token_budget=1)
    assert len(sizes) == 1
