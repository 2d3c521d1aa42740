"""The process around vLLM, with a stand-in for vLLM itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradvar.errors import GradvarError
from gradvar.models import find_model
from gradvar.rollouts.engines import SamplingRequest, SamplingSettings, vllm_engine
from gradvar.runs.records import Prompt

ROOT = Path(__file__).resolve().parents[2]
FAKE = "tests.rollouts.fake_vllm_worker"


def run(folder, how, monkeypatch, on_prompt=None, **options):
    """Sample two prompts with the stand-in; returns what was handed over."""
    monkeypatch.setattr(vllm_engine, "WORKER_MODULE", FAKE)
    monkeypatch.setenv("FAKE_WORKER", how)
    requests = [
        SamplingRequest(prompt=Prompt(prompt_id=name, text="", token_ids=(2,)), count=2, first_rollout_id=5, seed=1)
        for name in ("0", "1")
    ]
    settings = SamplingSettings(model=find_model(str(folder)), max_tokens=5, **options)
    found, progress = {}, []
    keep = on_prompt or (lambda one, rollouts: found.update({one.prompt.prompt_id: rollouts}))
    try:
        vllm_engine.sample_requests(settings, requests, keep, progress.append)
    finally:
        run.found = found
    return found, sum(progress)


def gone(pid, seconds=20):
    for _ in range(seconds * 20):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return True
        time.sleep(0.05)
    return False


def test_messages_become_rollouts(tiny_folder, monkeypatch):
    found, progress = run(tiny_folder, "well", monkeypatch)
    assert progress == 4
    assert [rollout.rollout_id for rollout in found["1"]] == [5, 6]
    (rollout, _) = found["0"]
    assert (rollout.token_ids, rollout.text, rollout.finish_reason) == ((2, 3, 0), "ab", "stop")
    assert rollout.sampler_logprobs == (-1.0, -0.1, -2.5)


def test_a_killed_worker_is_named_with_the_end_of_its_log(tiny_folder, monkeypatch):
    with pytest.raises(GradvarError, match=r"was killed \(SIGKILL; often for memory") as caught:
        run(tiny_folder, "killed", monkeypatch)
    assert "all is well so far" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(run.found) == ["0"], "the finished prompt was handed over"


def test_a_worker_that_dies_while_it_writes(tiny_folder, monkeypatch, tmp_path):
    log = tmp_path / "vllm.log"
    with pytest.raises(GradvarError, match=f"ended with exit code 3.*the whole log: {log}"):
        run(tiny_folder, "torn", monkeypatch, log_file=log)
    assert list(run.found) == ["0"]


def test_a_workers_own_error_is_passed_on(tiny_folder, monkeypatch):
    with pytest.raises(GradvarError, match="--engine vllm: ValueError: no room for the cache"):
        run(tiny_folder, "error", monkeypatch)


def test_the_cause_is_looked_up_where_vllm_only_points_at_it(tiny_folder, monkeypatch):
    with pytest.raises(GradvarError, match=r"See root cause above\.; the cause: ValueError: No memory for blocks"):
        run(tiny_folder, "pointer", monkeypatch)


def test_a_callers_exception_ends_the_worker_at_once(tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_PID", str(tmp_path / "pid"))

    def full_disk(one, rollouts):
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left") as caught:
        run(tiny_folder, "hangs", monkeypatch, on_prompt=full_disk)
    assert caught.traceback, "the traceback is still held"
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_worker_that_lingers_after_its_work_is_ended(tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_PID", str(tmp_path / "pid"))
    found, _ = run(tiny_folder, "lingers", monkeypatch)
    assert len(found) == 2
    if (tmp_path / "pid").exists():
        assert gone(int((tmp_path / "pid").read_text()))


def test_the_worker_ends_when_its_parent_is_killed(tiny_folder, tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "import sys; from pathlib import Path; from tests.rollouts import test_vllm_process as t; "
        "import pytest; t.run(Path(sys.argv[1]), 'hangs', pytest.MonkeyPatch())"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_folder)], cwd=ROOT, env={**os.environ, "FAKE_PID": str(pid_file)}
    )
    try:
        for _ in range(1200):
            if pid_file.exists() and pid_file.read_text():
                break
            time.sleep(0.05)
        worker = int(pid_file.read_text())
        os.kill(worker, 0)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert gone(worker), "the worker outlived its parent"


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_temperatures_vllm_would_change_or_refuse(tiny_folder, monkeypatch, temperature):
    with pytest.raises(GradvarError, match=r"vLLM samples at 0.01 to 2; use --engine transformers"):
        run(tiny_folder, "well", monkeypatch, temperature=temperature)
