"""What is written comes back; damage is named; a run is one run."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradvar.errors import GradvarError
from gradvar.runs import (
    Measures,
    PrefixNorms,
    Prompt,
    Rollout,
    Run,
    SampleConfig,
    ScoreGram,
    TauEstimate,
    create_run,
    open_run,
    rollouts_digest,
)

PROMPTS = [
    Prompt(prompt_id="0", text="héllo\n", token_ids=(1, 2, 3), data_source="s", ground_truth={"a": [1, "b"]}),
    Prompt(prompt_id="7", text="", token_ids=(4,), extra=None),
]
ROLLOUTS = [
    Rollout(rollout_id=0, token_ids=(5, 6), text="x", finish_reason="stop", sampler_logprobs=(-0.5, -1.25)),
    Rollout(rollout_id=1, token_ids=(7, 8, 9), text="<script>", finish_reason="length", loss_mask=(1, 0, 1)),
]


@pytest.fixture
def run(tmp_path) -> Run:
    run = create_run(tmp_path / "run")
    run.begin("sample", SampleConfig(model="m", prompts="p", max_tokens=16))
    run.write_prompts(PROMPTS)
    run.write_rollouts("0", ROLLOUTS)
    return run


def write_measured(run: Run) -> ScoreGram:
    gradients = np.random.default_rng(1).normal(size=(2, 4))
    gram = ScoreGram(
        target="model.q",
        matrix=gradients @ gradients.T,
        rollout_ids=(0, 1),
        dtype="float32",
        include_bias=True,
        temperature=1.0,
    )
    run.write_grams("0", {"model.q": gram}, rollouts_digest=rollouts_digest(ROLLOUTS))
    logprobs = [np.array([-0.5, -1.0], dtype=np.float32), np.array([-1.0, -2.0, -4.0], dtype=np.float32)]
    measures = Measures(rollout_ids=(0, 1), policy_logprobs=logprobs, entropy=np.ones(2), proxy=np.ones(2))
    run.write_measures("0", measures)
    return gram


def test_prompts_and_rollouts_come_back(run):
    again = open_run(run.path)
    assert again.prompts() == PROMPTS
    assert again.rollouts("0") == ROLLOUTS
    assert again.config(SampleConfig).max_tokens == 16


def test_grams_and_measures_come_back_exactly(run):
    gram = write_measured(run)
    again = open_run(run.path)
    np.testing.assert_array_equal(again.grams("0")["model.q"].matrix, gram.matrix)
    assert again.grams_label("0") == rollouts_digest(ROLLOUTS)
    assert again.targets == ["model.q"]
    np.testing.assert_array_equal(again.measures("0").policy_logprobs[1], [-1, -2, -4])


def test_scores_join_everything_and_leave_rewards_unverified_without_a_file(run):
    write_measured(run)
    scores = run.scores("model.q")[0]
    assert np.isnan(scores.rewards).all()
    np.testing.assert_array_equal(scores.lengths, [2, 2])
    np.testing.assert_array_equal(scores.truncated, [False, True])
    np.testing.assert_allclose(scores.log_probs, [-1.5, -5.0])  # the masked token is left out
    run.write_rewards("0", [0, 1], np.array([1.0, np.nan]), label=("digest", "exact"))
    np.testing.assert_array_equal(run.scores()[0].rewards, [1.0, np.nan])
    assert run.rewards_label("0") == ("digest", "exact")


def test_equal_content_gives_equal_bytes(run):
    path = run.file("rollouts", "0")
    before = path.read_bytes()
    run.write_rollouts("0", ROLLOUTS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["rollouts", "grams", "measures"])
@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_file_is_named(run, kind, damage):
    write_measured(run)
    path = run.file(kind, "0")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    reader = {"rollouts": run.rollouts, "grams": run.grams, "measures": run.measures}[kind]
    with pytest.raises(GradvarError, match=str(path)):
        reader("0")


def test_not_a_run(tmp_path):
    with pytest.raises(GradvarError, match="no run directory"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(GradvarError, match=r"has no run\.json"):
        open_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(GradvarError, match=r"not empty \(it holds 'notes.txt'\)"):
        create_run(tmp_path)
    with pytest.raises(GradvarError, match="is a file"):
        create_run(tmp_path / "notes.txt")


def test_newer_or_damaged_run_json(run):
    info = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**info, "format_version": 99}))
    with pytest.raises(GradvarError, match="format_version 99"):
        open_run(run.path)
    (run.path / "run.json").write_text("{")
    with pytest.raises(GradvarError, match="damaged file"):
        open_run(run.path)
    (run.path / "run.json").write_text("[]")
    with pytest.raises(GradvarError, match="no format_version"):
        open_run(run.path)


def test_a_missing_gram_and_an_unknown_target_say_what_to_do(run):
    with pytest.raises(GradvarError, match="gradvar measure"):
        run.scores()
    write_measured(run)
    with pytest.raises(GradvarError, match=r"known are sum, model\.q"):
        run.scores("model.k")


def test_only_one_process_writes(run):
    code = f"import gradvar\nwith gradvar.open_run({str(run.path)!r}).locked(): pass"
    with run.locked():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process is working on" in done.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_opening_a_run_loads_no_torch(run):
    code = (
        f"import sys, gradvar\nrun = gradvar.open_run({str(run.path)!r})\nrun.prompts()\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_extra_columns_come_back_and_what_was_left_out_is_in_no_score(run):
    gradients = np.random.default_rng(1).normal(size=(3, 4))
    about = {"rollout_ids": (0, 1, 2), "dtype": "float32", "include_bias": True, "temperature": 1.0}
    rollouts = [*ROLLOUTS, Rollout(rollout_id=2, token_ids=(4,), text="z", finish_reason="stop")]
    run.write_rollouts("0", rollouts)
    grams = {name: ScoreGram(target=name, matrix=gradients @ gradients.T, **about) for name in ("a", "b")}
    run.write_grams("0", grams, rollouts_digest=rollouts_digest(rollouts))
    lengths = np.array([[1, 2], [1, 2], [1, 1]])
    measures = Measures(
        rollout_ids=(0, 1, 2),
        policy_logprobs=[np.full(len(r.token_ids), -1.0, dtype=np.float32) for r in rollouts],
        entropy=np.arange(3.0),
        proxy=np.arange(3.0),
        taus={"b": TauEstimate(target="b", value=np.arange(3.0), error=np.full(3, np.nan), probes=1, seed=5)},
        prefixes={"a": PrefixNorms(target="a", lengths=lengths, value=lengths / 3)},
        left_out={1: "the gradient over b is not finite"},
    )
    run.write_measures("0", measures)
    again = open_run(run.path).measures("0")
    np.testing.assert_array_equal(again.taus["b"].value, np.arange(3.0))
    assert (again.taus["b"].probes, again.taus["b"].seed) == (1, 5)
    np.testing.assert_array_equal(again.prefixes["a"].lengths, lengths)
    np.testing.assert_array_equal(again.prefixes["a"].value, lengths / 3)
    assert again.left_out == measures.left_out
    scores = run.scores("a")[0]
    assert scores.rollout_ids == (0, 2)
    np.testing.assert_array_equal(scores.gram, grams["a"].matrix[np.ix_([0, 2], [0, 2])])
    np.testing.assert_array_equal(scores.lengths, [2, 1])
    np.testing.assert_array_equal(scores.log_probs, [-2.0, -1.0])
    np.testing.assert_array_equal(run.taus()["0", "b"].value, [0.0, 2.0])
    np.testing.assert_array_equal(run.prefixes()["0", "a"].lengths, [[1, 2], [1, 1]])
    assert run.taus().keys() == {("0", "b")}


def test_measures_that_are_none_of_ours(run):
    write_measured(run)
    path = run.file("measures", "0")
    schema = pq.read_schema(path).with_metadata({"gradvar": '{"taus": {"model.q": {"probes": 1, "seed": 0}}}'})
    pq.write_table(pq.read_table(path).cast(schema), path)
    with pytest.raises(GradvarError, match=r"damaged file .*model\.q/tau"):
        run.measures("0")
