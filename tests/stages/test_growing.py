"""What may change in a run: identity is refused, additions are made, the rest is free."""

import contextlib
import shutil

import numpy as np
import pytest

import gradvar
from gradvar.demo import policy_path
from gradvar.errors import GradvarError
from gradvar.runs import SampleConfig, create_run
from gradvar.stages import cv, fit, measure, reward, sample
from gradvar.stages.identity import agreed_prompts
from tests.conftest import gradvar as run_command


@pytest.fixture
def run(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return gradvar.open_run(tmp_path / "run")


def contents(run, kind):
    return {path.name: path.read_bytes() for path in (run.path / kind).iterdir()}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": 0.9}, "temperature = 1.0, received 0.9"),
        ({"max_tokens": 512}, "max_tokens = 1024, received 512"),
        ({"engine": "vllm"}, "engine = 'transformers', received 'vllm'"),
        ({"dtype": "bfloat16"}, "dtype = 'float32', received 'bfloat16'"),
        ({"template": "none"}, "template"),
        ({"seed": 5}, "seed = 0, received 5"),
    ],
)
def test_identity_is_refused_with_the_difference_named(run, given, words):
    before = contents(run, "rollouts")
    with pytest.raises(GradvarError) as caught:
        sample(run, given)
    assert words in str(caught.value)
    assert contents(run, "rollouts") == before


def test_another_bias_choice_is_refused(run):
    with pytest.raises(GradvarError, match="include_bias = True, received False"):
        measure(run, {"include_bias": False})


def test_another_model_is_refused(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(policy_path(), other)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config + "\n")
    with pytest.raises(GradvarError, match="one run holds one model"):
        sample(run, {"model": str(other)})


def test_another_prompt_text_is_refused(run):
    prompt = run.prompts()[0]
    changed = type(prompt)(**{**vars(prompt), "text": prompt.text + "!"})
    with pytest.raises(GradvarError, match="kept prompts may not change"):
        agreed_prompts(run, [changed])


def test_nothing_missing_nothing_done(run):
    before = {kind: contents(run, kind) for kind in ("rollouts", "rewards", "grams", "measures")}
    sample(run, {})
    reward(run, {})
    measure(run, {})
    assert {kind: contents(run, kind) for kind in before} == before


def test_rollouts_grow_and_the_kept_ones_stay(run):
    kept = {prompt_id: run.rollouts(prompt_id) for prompt_id in run.prompt_ids}
    old = run.scores()[0].gram
    sample(run, {"rollouts": 32})
    for prompt_id, rollouts in kept.items():
        grown = run.rollouts(prompt_id)
        assert len(grown) == 32
        assert grown[:24] == rollouts
        assert [r.rollout_id for r in grown] == list(range(32))
        assert [r.token_ids for r in grown[24:]] != [r.token_ids for r in rollouts[:8]]  # new noise, not the old again
    assert run.scores()[0].gram.shape == (24, 24)  # still those that were measured
    reward(run, {})
    measure(run, {})
    new = run.scores()[0]
    assert new.gram.shape == (32, 32)
    assert len(new.rewards) == 32
    np.testing.assert_allclose(new.gram[:24, :24], old, rtol=1e-4, atol=1e-4 * np.abs(old).max())


def test_a_target_is_added_and_the_others_stay(run):
    before = {prompt_id: run.grams(prompt_id) for prompt_id in run.prompt_ids}
    measures = contents(run, "measures")
    measure(run, {"targets": ("last:mlp",)})
    assert len(run.targets) > len(before[run.prompt_ids[0]])
    for prompt_id, grams in before.items():
        for target, gram in grams.items():
            np.testing.assert_array_equal(run.grams(prompt_id)[target].matrix, gram.matrix)
    assert contents(run, "measures") == measures


def test_prompts_are_added_and_the_first_stay(run):
    before, rollouts = run.prompts(), contents(run, "rollouts")
    sample(run, {"n_prompts": 4})
    assert run.prompts()[:3] == before
    assert len(run.prompts()) == 4
    assert rollouts.items() <= contents(run, "rollouts").items()
    assert len(contents(run, "rollouts")) == 4


def test_prompts_are_added_by_their_ids(run):
    new = next(str(row) for row in range(64) if str(row) not in run.prompt_ids)
    before = run.prompt_ids
    sample(run, {"prompt_ids": (new,)})
    assert run.prompt_ids == [*before, new]
    assert len(run.rollouts(new)) == 24


def test_estimates_are_free(run):
    fit(run, {"level": 0.9, "seed": 3})
    table = cv(run, {"group_size": 4, "advantage": "rloo"})
    assert set(table["group_size"].dropna()) == {4}
    assert set(run.table("law")["level"]) == {0.9}


def test_a_fresh_sampling_gives_the_same_rollouts(run):
    before = contents(run, "rollouts")
    (run.path / "rollouts" / f"{run.prompt_ids[1]}.parquet").unlink()
    # By the command: another number of threads than the first process had may change the last bits.
    assert run_command("sample", run.path).returncode == 0
    assert contents(run, "rollouts") == before


def test_the_run_says_where_it_came_from(run):
    info = run.info
    assert len(info["model"]["weights_sha256"]) == 64
    assert info["stages"]["sample"]["packages"]["torch"]
    assert info["stages"]["sample"]["device"] == "cpu"
    assert info["stages"]["measure"]["attention"]
    assert run.config(SampleConfig).seed == 0
    assert (run.path / "log.jsonl").read_text().count("rollouts written") == 3


class Heard:
    """A listener that remembers what it was told."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    warn = say

    @contextlib.contextmanager
    def task(self, description, total, done=0):
        yield lambda _: None


def test_fewer_rollouts_take_none_away_and_are_told(run):
    heard = Heard()
    sample(run, {"rollouts": 8}, heard)
    assert any("holds 24 rollouts" in line for line in heard.lines)
    assert run.config(SampleConfig).rollouts == 24


def test_estimates_say_what_is_not_measured_yet(run):
    sample(run, {"rollouts": 32})
    heard = Heard()
    fit(run, {}, heard)
    assert any("not measured" in line and "gradvar sample" in line for line in heard.lines)


def test_lost_measures_are_made_again(run):
    path = run.file("measures", run.prompt_ids[1])
    before = path.read_bytes()
    path.unlink()
    assert run_command("measure", run.path).returncode == 0
    assert path.read_bytes() == before


def test_settings_bind_only_once_something_was_made(run, tmp_path):
    new = create_run(tmp_path / "new")
    new.begin("sample", run.config(SampleConfig))
    sample(new, {"temperature": 0.7, "n_prompts": 1, "rollouts": 2})
    with pytest.raises(GradvarError, match=r"temperature = 0\.7"):
        sample(new, {"temperature": 1.0})
