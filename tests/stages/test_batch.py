"""Products between prompts: measured by sketch, kept, made again when stale, and estimated by `cv`."""

import numpy as np
import pytest

from gradvar.errors import GradvarError
from gradvar.runs import open_run
from gradvar.stages import cv, measure
from gradvar.stages.batch import cross_products, sketch_error_line, sketch_errors
from gradvar.stages.groups import estimated_groups
from tests.stages.small import make_run, responses, write_responses

SKETCH = {"targets": ("last:q,v",), "cross": "sketch", "sketch_dim": 256}
CV = {"group_size": 2, "batch_prompts": (2,), "rules": ("grpo", "dapo"), "advantage": "mean"}


@pytest.fixture
def run(tmp_path):
    made = make_run(tmp_path, prompts=5)
    measure(made, SKETCH)
    return made


def test_measure_stores_a_sketch_of_every_response_whose_error_is_as_stated(run):
    for prompt_id in run.prompt_ids:
        sketches, grams = run.sketches(prompt_id), run.grams(prompt_id)
        assert sketches.keys() == grams.keys()
        for key, one in sketches.items():
            assert one.matrix.shape == (6, 256)
            assert one.rollout_ids == grams[key].rollout_ids
    for error in sketch_errors(run).values():
        assert 0.4 * error.stated < error.measured < 2 * error.stated
    assert "expected" in sketch_error_line(sketch_errors(run))
    assert '"sketch checked"' in (run.path / "log.jsonl").read_text()


def test_a_measured_run_is_sketched_later_and_its_grams_stay(tmp_path):
    run = make_run(tmp_path)
    measure(run, {"targets": ("last:q,v",)})
    before = {p: run.file("grams", p).read_bytes() for p in run.prompt_ids}
    assert sketch_errors(run) == {}
    measure(run, SKETCH)
    assert {p: run.file("grams", p).read_bytes() for p in run.prompt_ids} == before
    stamps = {p: run.file("sketches", p).stat().st_mtime_ns for p in run.prompt_ids}
    measure(run, SKETCH)
    assert {p: run.file("sketches", p).stat().st_mtime_ns for p in run.prompt_ids} == stamps, "nothing was missing"
    measure(run, {**SKETCH, "sketch_dim": 512})
    assert {one.dimension for p in run.prompt_ids for one in run.sketches(p).values()} == {512}


def test_products_follow_the_rows_of_the_scores_and_add_over_targets(run):
    groups = estimated_groups(run)
    products, without = cross_products(run, groups)
    assert without == []
    names = run.prompt_ids
    updates = {name: np.eye(6)[[4, 0]] for name in names}
    total = products["sum"].of_updates(updates)
    parts = [products[key].of_updates(updates) for key in run.targets]
    assert total == pytest.approx(sum(parts))
    rows = np.concatenate([run.sketches(name)[run.targets[0]].matrix[[4, 0]] for name in names]).astype(float)
    assert parts[0].mean(axis=0) == pytest.approx(rows @ rows.T, rel=1e-5, abs=1e-6 * np.abs(rows @ rows.T).max())


def test_cv_writes_batches_and_a_prompt_that_grew_is_told(run, capsys):
    cv(run, CV)
    table = run.table("batches")
    assert set(table["target"]) == {*run.targets, "sum"}
    assert table["clusters"].eq(5).all()
    assert (table["sketch_error"].dropna() >= 0).all()
    write_responses(run, "1", responses((5, 9, 3, 7, 6, 8, 4), seed=9))
    measure(run, {**SKETCH, "cross": "none"})

    class Ear:
        def __init__(self):
            self.lines = []

        def say(self, text):
            self.lines.append(text)

        def warn(self, text):
            self.lines.append(text)

        def task(self, description, total, done=0):
            from gradvar.stages.listener import Silent

            return Silent().task(description, total, done)

    ear = Ear()
    cv(run, CV, ear)
    assert any("1 prompt (first: 1) without sketches" in line for line in ear.lines)
    assert run.table("batches")["clusters"].eq(4).all()
    for prompt_id in run.prompt_ids:
        run.file("sketches", prompt_id).unlink()
    cv(run, CV)
    assert not (run.path / "tables" / "batches.parquet").exists()


def test_damage_is_named_and_bad_settings_refused(run):
    path = run.file("sketches", "2")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(GradvarError, match=r"damaged file .*sketches/2.safetensors"):
        cv(open_run(run.path), CV)
    with pytest.raises(GradvarError, match="--sketch-dim: expected a power of two"):
        measure(run, {**SKETCH, "sketch_dim": 1000})
    with pytest.raises(GradvarError, match="--cross: expected one of none, sketch, exact"):
        measure(run, {**SKETCH, "cross": "both"})
    with pytest.raises(GradvarError, match="--batch-prompts"):
        cv(run, {**CV, "batch_prompts": ()})


def test_exact_products_are_kept_until_a_prompt_changes_and_win_over_sketches(run):
    exact = {"targets": ("last:q,v",), "cross": "exact"}
    measure(run, exact)
    grams = run.cross_grams()
    assert grams.matrices.keys() == set(run.targets)
    for prompt_id in run.prompt_ids:
        for key, gram in run.grams(prompt_id).items():
            rows = grams.rows(prompt_id, gram.rollout_ids)
            block = grams.matrices[key][np.ix_(rows, rows)]
            assert np.abs(block - gram.matrix).max() < 1e-5 * np.abs(gram.matrix).max()
    stamp = (run.path / "cross.safetensors").stat().st_mtime_ns
    measure(run, exact)
    assert (run.path / "cross.safetensors").stat().st_mtime_ns == stamp, "nothing was missing"
    groups = estimated_groups(run)
    products, _ = cross_products(run, groups)
    assert {one.source for one in products.values()} == {"exact"}
    updates = {name: np.eye(6) for name in run.prompt_ids}
    rows = np.concatenate([run.sketches(name)[run.targets[0]].matrix for name in run.prompt_ids]).astype(float)
    total = products[run.targets[0]].of_updates(updates)[0]
    norms = np.sqrt(total.diagonal())
    assert np.abs(rows @ rows.T - total).max() / norms.max() ** 2 < 6 / np.sqrt(256)
    cv(run, CV)
    assert set(run.table("batches")["products"]) == {"exact"}

    measure(run, {**exact, "targets": ("last:q,k,v",)})
    assert len(run.cross_grams().matrices) == 3
    write_responses(run, "1", responses((5, 9, 3, 7, 6, 8, 4), seed=9))
    measure(run, {**exact, "cross": "none"})
    assert run.cross_grams() is None, "of other responses"
    measure(run, exact)
    assert len(run.cross_grams().responses) == 31
    with pytest.raises(GradvarError, match=r"--cross exact: .*--cross sketch takes one prompt at a time"):
        measure(run, {**exact, "targets": ("all:mlp",), "memory_budget": 1.2e-4})
