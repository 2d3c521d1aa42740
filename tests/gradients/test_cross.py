"""Exact products between prompts: against autograd's flat gradients, against each prompt's own Gram, and the sketch."""

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.gradients import SketchPlan, cross_grams, measure_scores, resolve_targets
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses

SPECS = ["last:qkv", "last:o,mlp"]


@pytest.fixture(scope="module")
def qwen():
    return make_model("qwen2")


@pytest.fixture(scope="module")
def asked():
    made = [
        make_prompt_and_responses(lengths=lengths, prompt=prompt, seed=prompt)
        for prompt, lengths in ((5, (7, 20, 4)), (9, (3, 12, 1, 8)), (2, (16, 5)))
    ]
    return [prompt for prompt, _ in made], [responses for _, responses in made]


@pytest.fixture(scope="module")
def grams(qwen, asked):
    return cross_grams(qwen, *asked, SPECS)


def test_products_are_those_of_the_flat_gradients(qwen, asked, grams):
    targets = resolve_targets(qwen, SPECS)
    flat = [references.flat_scores(qwen, targets, p, r) for p, r in zip(*asked, strict=True)]
    for key, gram in grams.items():
        reference = references.gram_of(np.concatenate([of_prompt[key] for of_prompt in flat]))
        assert references.error(gram, reference) < 1e-12


def test_the_blocks_of_a_prompt_are_its_score_gram(qwen, asked, grams):
    start = 0
    for prompt, responses in zip(*asked, strict=True):
        block = slice(start, start + len(responses))
        for key, gram in measure_scores(qwen, prompt, responses, SPECS).grams.items():
            assert references.error(grams[key][block, block], gram.matrix) < 1e-12
        start = block.stop


@pytest.mark.parametrize("options", [{"token_budget": 1}, {"memory_budget": 200_000}])
def test_batches_and_passes_do_not_matter(qwen, asked, grams, options):
    seen = []
    again = cross_grams(qwen, *asked, SPECS, on_progress=seen.append, **options)
    for key, gram in grams.items():
        assert references.error(again[key], gram) < 1e-12
    assert seen[-1] == 9
    assert seen == sorted(seen)


def test_masks_are_taken_prompt_by_prompt(qwen, asked):
    prompts, responses = asked
    masks = [[[0] * (len(r) - 1) + [1] for r in of_prompt] for of_prompt in responses]
    masks[1] = None
    found = cross_grams(qwen, prompts, responses, ["last:v"], loss_masks=masks)
    target = resolve_targets(qwen, ["last:v"])[0]
    flat = [
        references.flat_scores(qwen, [target], p, r, masks=m)[target.key]
        for p, r, m in zip(prompts, responses, masks, strict=True)
    ]
    assert references.error(found[target.key], references.gram_of(np.concatenate(flat))) < 1e-12


def test_sketches_of_prompts_measured_apart_estimate_the_exact_products(qwen, asked, grams):
    plan = SketchPlan(dimension=4096, seed=1)
    made = [measure_scores(qwen, p, r, SPECS, sketch=plan).sketches for p, r in zip(*asked, strict=True)]
    for key, gram in grams.items():
        rows = np.concatenate([of_prompt[key].matrix for of_prompt in made]).astype(float)
        assert references.error(rows @ rows.T, gram) < 5 * np.sqrt(2 / 4096)


def test_what_does_not_fit_is_refused_in_one_line(qwen, asked):
    with pytest.raises(GradvarError, match=r"exact products of 9 responses over 7 targets take .* or use a sketch"):
        cross_grams(qwen, *asked, SPECS, memory_budget=8_000)
    with pytest.raises(GradvarError, match="expected responses for each of 3 prompts, received 2"):
        cross_grams(qwen, asked[0], asked[1][:2], SPECS)
