"""A rival's process, asked over pipes: it keeps its model between the repeats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks.gradients.common import Grams
from benchmarks.gradients.shapes import Cell

ROOT = Path(__file__).resolve().parents[2]


class RivalError(RuntimeError):
    """The rival could not do it; the message is its own error."""


class RivalProcess:
    """A worker for one rival and one cell."""

    def __init__(self, rival: str, cell: Cell, threads: int) -> None:
        self.name = rival
        settings = json.dumps({"rival": rival, "cell": asdict(cell), "threads": threads})
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        self._folder = tempfile.TemporaryDirectory()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed on leaving
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gradients.worker", settings],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.baseline = 0
        """Bytes resident once the model is built."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def wait_ready(self) -> None:
        """Wait until its model is built."""
        self.baseline = int(self._read()["now"])

    def run(
        self, members: Sequence[int] | None = None, token_budget: int | None = None
    ) -> tuple[dict[str, Any], Grams]:
        """Return CPU and wall seconds, resident bytes at the peak, and the Grams, of all responses or the members.

        Raises:
            RivalError: It failed.
        """
        path = Path(self._folder.name) / "grams.npz"
        request: dict[str, Any] = {"save": str(path)}
        if members is not None:
            request["members"] = list(members)
        if token_budget is not None:
            request["token_budget"] = token_budget
        if self._process.stdin is None:
            raise RivalError("not started")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RivalError(self._last_words()) from None
        found = self._read()
        with np.load(path, allow_pickle=False) as saved:
            return found, {key: saved[key] for key in saved.files}

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise RivalError(self._last_words())
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise RivalError(message["error"])
        return message

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "ended without a word"
