"""The precision check against the literal reference."""

import numpy as np
import pytest
import torch

from gradvar.gradients import check_precision, resolve_targets
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses

SPECS = ["last:qkv", "0:mlp"]


def test_a_float32_model_against_itself_alone():
    prompt, responses = make_prompt_and_responses()
    check = check_precision(make_model("qwen2", torch.float32), prompt, responses, SPECS)
    assert len(check.rows) == 6 * len(responses)
    for row in check.rows:
        if row.rollout_id > 0:
            assert row.cosine == pytest.approx(1, abs=1e-6)
            assert abs(row.norm_error) < 1e-4
            assert row.gradient_error < 1e-4


def test_the_errors_are_those_of_the_gradients_themselves():
    """Two models that truly differ: every reported number against flat gradient vectors."""
    model, other = make_model("qwen2"), make_model("qwen2")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight *= 1.2
    prompt, responses = make_prompt_and_responses((8, 5, 20, 13))
    check = check_precision(model, prompt, responses, SPECS, rollout_ids=[4, 5, 6, 7], reference=other, temperature=0.8)
    targets = resolve_targets(model, SPECS)
    ours = references.flat_scores(model, targets, prompt, responses, temperature=0.8)
    theirs = references.flat_scores(other, targets, prompt, responses, temperature=0.8)
    rows = {(row.target, row.rollout_id): row for row in check.rows}
    for target in targets:
        a, b = ours[target.key], theirs[target.key]
        spread = [((x - x.mean(0)) ** 2).sum(1) for x in (a, b)]
        for i in range(4):
            row, size = rows[target.key, 4 + i], np.linalg.norm(b[i])
            assert row.cosine == pytest.approx(a[i] @ b[i] / np.linalg.norm(a[i]) / size, abs=1e-10)
            assert row.gradient_error == pytest.approx(np.linalg.norm(a[i] - b[i]) / size, rel=1e-8)
            assert row.norm_error == pytest.approx(np.linalg.norm(a[i]) / size - 1, abs=1e-10)
            assert row.deviation_error == pytest.approx(spread[0][i] / spread[1][i] - 1, abs=1e-9)
    assert np.abs(check.logprobs[2] - check.reference_logprobs[2]).max() > 1e-4


def test_bfloat16_is_seen_to_be_coarser():
    prompt, responses = make_prompt_and_responses((8, 5, 20, 13))
    model = make_model("llama", torch.bfloat16)
    check = check_precision(model, prompt, responses, "last:v")
    errors = [row.gradient_error for row in check.rows]
    assert 1e-4 < max(errors) < 0.2
    assert model.dtype == torch.bfloat16
    assert len(check.logprobs[0]) == 8
