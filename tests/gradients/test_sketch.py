"""Sketches of gradients: the projection they are, that nothing but seed and target moves it, and their error."""

import hashlib
import re

import numpy as np
import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients import SketchPlan, measure_scores, plan_measurement, resolve_targets
from gradvar.gradients.sketch import REPEATS, Sketch
from tests.gradients import references
from tests.gradients.models import make_model, make_prompt_and_responses

SPECS = ["last:qkv", "last:o,mlp"]
PLAN = SketchPlan(dimension=256, seed=3)
SLACK = 1e-6
"""Sketches are float32."""


@pytest.fixture(scope="module")
def qwen():
    return make_model("qwen2")


@pytest.fixture(scope="module")
def whole(qwen):
    return sketches(qwen, *make_prompt_and_responses())


def sketches(model, prompt, responses, plan=PLAN, **options):
    measured = measure_scores(model, prompt, responses, SPECS, sketch=plan, **options)
    return {key: one.matrix for key, one in measured.sketches.items()}


def projection(key, shape, plan=PLAN):
    """The sketch as a dense matrix (O I, d), made by sketching every unit gradient."""
    sketch = Sketch(plan, key, shape, shape[0] * shape[1])
    sketch.add_rows(0, torch.eye(shape[0] * shape[1], dtype=torch.float64))
    return sketch.values().astype(np.float64)


def bias_projection(key, shape, plan=PLAN):
    sketch = Sketch(plan, key, shape, shape[0])
    sketch.add_bias(0, torch.eye(shape[0], dtype=torch.float64))
    return sketch.values().astype(np.float64)


def assert_close(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert np.abs(value - other[key]).max() <= SLACK * np.abs(value).max()


def test_every_entry_has_one_bucket_with_a_sign_in_each_part():
    matrix = projection("layer", (3, 70)).reshape(210, REPEATS, PLAN.width)
    used = matrix != 0
    assert (used.sum(axis=2) == 1).all()
    bucket = used.argmax(axis=2)
    assert (bucket == bucket[:, :1]).all(), "all parts share the hash"
    assert np.abs(matrix[used]) == pytest.approx(1 / np.sqrt(REPEATS))
    assert abs(np.sign(matrix[used]).mean()) < 4 / np.sqrt(210 * REPEATS)
    chunk = bucket[:, 0].reshape(3, 70)[:, : PLAN.width]
    assert all(len(set(row)) == PLAN.width for row in chunk), "entries of one chunk do not meet"
    assert len(set(bias_projection("layer", (40, 70)).reshape(40, REPEATS, -1)[:, 0].argmax(axis=1))) > 10


def test_sketches_are_that_projection_of_the_score_gradients(qwen, whole):
    """Flat score gradients from autograd, one response at a time, times the dense projection, biases among them."""
    prompt, responses = make_prompt_and_responses()
    targets = resolve_targets(qwen, SPECS)
    assert any(target.has_bias for target in targets)
    scores = references.flat_scores(qwen, targets, prompt, responses)
    for target in targets:
        shape = (target.out_features, target.in_features)
        split = shape[0] * shape[1]
        expected = scores[target.key][:, :split] @ projection(target.key, shape)
        if target.has_bias:
            expected += scores[target.key][:, split:] @ bias_projection(target.key, shape)
        assert np.abs(whole[target.key] - expected).max() <= SLACK * np.abs(expected).max(), target.key


@pytest.mark.parametrize("options", [{"token_budget": 1}, {"token_budget": 70}, {"memory_budget": 440_000}])
def test_batches_passes_and_tiles_do_not_matter(qwen, whole, options):
    assert_close(sketches(qwen, *make_prompt_and_responses(), **options), whole)


def test_order_and_batch_mates_do_not_matter(qwen, whole):
    prompt, responses = make_prompt_and_responses()
    chosen = sketches(qwen, prompt, [responses[5], responses[2]])
    assert_close(chosen, {key: value[[5, 2]] for key, value in whole.items()})


def test_seed_and_target_choose_the_projection_and_nothing_else(qwen, whole):
    again = sketches(qwen, *make_prompt_and_responses())
    assert all((again[key] == whole[key]).all() for key in whole)
    other = sketches(qwen, *make_prompt_and_responses(), plan=SketchPlan(dimension=256, seed=4))
    for key, value in whole.items():
        overlap = float((other[key][0] @ value[0]) / np.linalg.norm(value[0]) ** 2)
        assert abs(overlap) < 5 / np.sqrt(256), "another seed, another projection"
    one, two = projection("a", (4, 70)), projection("b", (4, 70))
    assert (one != two).any()


def test_without_sketch_nothing_is_made_and_grams_are_the_same(qwen):
    prompt, responses = make_prompt_and_responses()
    with_sketch = measure_scores(qwen, prompt, responses, SPECS, sketch=PLAN)
    without = measure_scores(qwen, prompt, responses, SPECS)
    assert without.sketches == {}
    for key, gram in without.grams.items():
        assert (gram.matrix == with_sketch.grams[key].matrix).all()


def test_products_of_two_prompts_are_unbiased_with_the_stated_variance(qwen):
    """Over 400 seeds, every product of flat score gradients of two prompts: mean and variance."""
    target = resolve_targets(qwen, ["last:v"])[0]
    shape = (target.out_features, target.in_features)
    flat = []
    for seed in (1, 2):
        prompt, responses = make_prompt_and_responses(lengths=(7, 20, 4), prompt=4 + seed, seed=seed)
        flat.append(references.flat_scores(qwen, [target], prompt, responses, include_bias=False)[target.key])
    gradients = torch.from_numpy(np.concatenate(flat))
    exact = np.concatenate(flat) @ np.concatenate(flat).T
    found = []
    for seed in range(400):
        sketch = Sketch(SketchPlan(dimension=256, seed=seed), target.key, shape, 6)
        sketch.add_rows(0, gradients)
        values = sketch.values().astype(np.float64)
        found.append(values @ values.T)
    norms = np.outer(exact.diagonal(), exact.diagonal())
    stated = np.sqrt((norms + exact**2) / 256)
    z = (np.mean(found, axis=0) - exact) / (stated / np.sqrt(400))
    assert np.abs(z).max() < 4
    assert (np.std(found, axis=0) / stated).max() < 1 + 4 / np.sqrt(2 * 400)
    parts = REPEATS * np.einsum("irk,jrk->rij", values.reshape(6, REPEATS, -1), values.reshape(6, REPEATS, -1))
    assert parts.mean(axis=0) == pytest.approx(values @ values.T), "parts estimate the same product, each alone"


@pytest.mark.parametrize("dimension", [0, 100, 300, 1 << 20])
def test_a_dimension_that_is_no_power_of_two_is_refused(dimension):
    with pytest.raises(GradvarError, match="power of two from 256 to 65536"):
        SketchPlan(dimension=dimension)


def test_sketches_that_take_the_whole_budget_are_refused(qwen):
    prompt, responses = make_prompt_and_responses()
    large, small = SketchPlan(dimension=65536), 10_000_000
    with pytest.raises(GradvarError, match="of them for sketches of 65536 numbers") as raised:
        measure_scores(qwen, prompt, responses, SPECS, sketch=large, memory_budget=small)
    least = int(re.search(r"at least (\d+) bytes", str(raised.value))[1])
    plan = plan_measurement(qwen, prompt, responses, SPECS, sketch=large, memory_budget=least)
    assert plan.cost.peak_bytes <= least, "the least that is named does"
    with pytest.raises(GradvarError, match=f"at least {least} bytes"):
        plan_measurement(qwen, prompt, responses, SPECS, sketch=large, memory_budget=least - 1)


def test_a_long_bias_in_chunks_is_that_in_one(monkeypatch):
    bias = torch.randn(3, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for piece in (1 << 20, 256 * 16):
        monkeypatch.setattr("gradvar.gradients.sketch._PIECE", piece)
        sketch = Sketch(PLAN, "layer", (80, 40), 3)
        sketch.add_bias(10, bias)
        found.append(sketch.values())
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-7)
    assert np.abs(found[0]).max() > 0.1


@pytest.mark.parametrize(
    ("shape", "dimension", "digest"), [((40, 70), 256, "1273a63241fb9b27"), ((6, 1100), 4096, "d2eb1d304cc5ebb2")]
)
@pytest.mark.parametrize("way", ["_add_by_chunks", "_add_at_once"])
def test_hash_and_signs_are_those_of_the_first_release(shape, dimension, digest, way):
    """Whole numbers, whose sums are exact in any order: not a bit may change, or runs could not be compared."""
    rows, columns = shape
    sketch = Sketch(SketchPlan(dimension=dimension, seed=3), "model.layers.1.mlp.up_proj", shape, 3)
    tile = (torch.arange(3 * rows * columns) * 37 % 11 - 5).float().view(3, rows, columns)
    getattr(sketch, way)(0, tile[:, :4])
    getattr(sketch, way)(4, tile[:, 4:])
    sketch.add_bias(0, (torch.arange(3 * rows) * 29 % 13 - 6).double().view(3, rows))
    assert hashlib.sha256(sketch.values().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(("shape", "dimension"), [((40, 70), 256), ((6, 1100), 4096), ((5, 3), 256)])
def test_many_rows_at_once_are_those_chunk_by_chunk(shape, dimension):
    tile = torch.randn(11, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (Sketch(SketchPlan(dimension=dimension), "layer", shape, 11) for _ in range(2))
    one._add_by_chunks(0, tile)
    other._add_at_once(0, tile)
    assert other.values().any()
    np.testing.assert_allclose(other._total.numpy(), one._total.numpy(), rtol=0, atol=1e-13)
