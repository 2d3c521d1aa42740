"""What the tests of stages and commands share: the command as a process, and one small finished run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads, as the command does

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--n-prompts", "3", "--rollouts", "24"]
"""Options of a demo that takes seconds."""


def command(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start `gradvar ARGUMENTS` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from cli.main import main; main()", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "160", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def gradvar(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `gradvar ARGUMENTS` to its end."""
    process = command(*arguments, **environment)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A small demo run, made by the command, never written to by tests."""
    path = tmp_path_factory.mktemp("finished") / "run"
    done = gradvar("demo", path, *SMALL)
    assert done.returncode == 0, done.stderr
    return path


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` loads the tests for a GPU alone: a machine with one need not have what the others use."""
    if config.option.markexpr != "gpu" or not collection_path.name.startswith("test_"):
        return None
    return True if collection_path.is_file() and "mark.gpu" not in collection_path.read_text("utf-8") else None
