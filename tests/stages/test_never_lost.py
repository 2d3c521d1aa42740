"""Killed at any moment, the same command goes on: finished files stay byte for byte, the rest comes out the same."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import gradvar
from tests.conftest import SMALL, command
from tests.conftest import gradvar as run_command

STATES = {
    "while the first prompt is sampled": lambda run: (run / "prompts.parquet").exists(),
    "between two prompts' rollouts": lambda run: len(list((run / "rollouts").glob("*.parquet"))) == 1,
    "before the first Gram": lambda run: len(list((run / "rewards").glob("*.parquet"))) == 3,
    "between two prompts' Grams": lambda run: len(list((run / "grams").glob("*.safetensors"))) == 1,
}


def data_files(run: Path) -> dict[str, bytes]:
    kinds = ("rollouts", "rewards", "grams", "measures")
    return {str(f.relative_to(run)): f.read_bytes() for kind in kinds for f in (run / kind).glob("[!.]*")}


def kill_when(run: Path, reached) -> None:
    process = command("demo", run, *SMALL)
    deadline = time.monotonic() + 120
    while not reached(run):
        assert process.poll() is None, "the command ended before the kill: " + process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def assert_same_run(run: Path, whole: Path) -> None:
    ours, theirs = data_files(run), data_files(whole)
    assert ours.keys() == theirs.keys()
    for prompt_id in gradvar.open_run(whole).prompt_ids:
        for kind in ("rollouts", "rewards", "measures"):
            name = f"{kind}/{prompt_id}.parquet"
            assert ours[name] == theirs[name], f"{name} differs from the uninterrupted run's"
        grams = gradvar.open_run(run).grams(prompt_id), gradvar.open_run(whole).grams(prompt_id)
        assert grams[0].keys() == grams[1].keys()
        for target in grams[0]:
            np.testing.assert_array_equal(grams[0][target].matrix, grams[1][target].matrix)
    for table in ("law", "identity", "cv", "alpha", "forms", "planning"):
        pd.testing.assert_frame_equal(gradvar.open_run(run).table(table), gradvar.open_run(whole).table(table))


@pytest.mark.slow
def test_killed_at_several_points_and_gone_on(finished_run, tmp_path):
    run = tmp_path / "run"
    kept: dict[str, bytes] = {}
    for point, reached in STATES.items():
        kill_when(run, reached)
        now = data_files(run)
        assert kept.items() <= now.items(), f"killed {point}: a finished file changed"
        kept = {name: content for name, content in now.items() if not name.startswith(".")}
        assert gradvar.open_run(run).info["status"].endswith("running")
    done = run_command("demo", run, *SMALL)
    assert done.returncode == 0, done.stderr
    assert kept.items() <= data_files(run).items()
    assert_same_run(run, finished_run)


@pytest.mark.slow
def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path):
    run = tmp_path / "run"
    process = command("demo", run, *SMALL)
    while not (run / "prompts.parquet").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("gradvar: interrupted")
    assert "Traceback" not in err
