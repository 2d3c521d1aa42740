"""Processes that run math-verify under a hard deadline, shared by all prompts.

math-verify's own time limits are signal handlers: they raise off the main thread, and cannot interrupt a power that
is being computed inside the C of Python's integers (Math-Verify issue 65). Here each check runs in another process,
which is killed at the deadline and replaced. POSIX only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from gradvar.errors import GradvarError

TIME_LIMIT = 10.0
"""Default deadline of one response [seconds]; a usual check takes some hundredths."""
MEMORY_LIMIT = 2 * 2**30
"""Resident memory at which a process is killed [bytes], where /proc tells it. No address space limit: math-verify takes
the MemoryError for "not equal", which would make an undecided response a wrong one."""
START_LIMIT = 120.0
"""How long a process may take to import math-verify [seconds]."""
MOST_WORKERS = 8
"""Upper end of the default number of processes."""

_POLL = 0.1
"""How often the memory of a busy process is looked at [seconds]."""
_SCRIPT = Path(__file__).with_name("math_worker.py")


@dataclass(frozen=True, kw_only=True)
class MathTask:
    """One question to math-verify."""

    gold: tuple[str, ...]
    """Accepted answers; one that matches is enough."""
    response: str | None
    """The response; None asks only whether the gold can be read."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to one task."""

    score: float
    """1 right (or the gold can be read), 0 wrong, NaN unverified."""
    reason: str | None = None
    """Why it is unverified."""


class MathPool:
    """Worker processes for math-verify, started when first needed; a context manager.

    Usable from any thread; calls from several threads take turns.

    Args:
        workers: Processes; None takes the cores this process may use, at least 2, at most 8.
        time_limit: Deadline of one response [seconds].

    Raises:
        GradvarError: If `workers` or `time_limit` is not positive.
    """

    def __init__(self, *, workers: int | None = None, time_limit: float = TIME_LIMIT) -> None:
        if workers is not None and workers < 1:
            raise GradvarError(f"reward workers: expected 1 or more, received {workers}")
        if not (math.isfinite(time_limit) and time_limit > 0):
            raise GradvarError(f"reward time limit: expected seconds above 0, received {time_limit}")
        self.time_limit = float(time_limit)
        self._most = workers if workers is not None else min(MOST_WORKERS, max(2, _cores()))
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that have been started."""
        return tuple(worker.process.pid for worker in self._workers)

    def close(self) -> None:
        """End all processes; a later `run` starts new ones."""
        with self._lock:
            self._stop_all()

    def run(
        self, tasks: Sequence[MathTask], *, on_verdict: Callable[[int, Verdict], None] | None = None
    ) -> list[Verdict]:
        """Answer all tasks.

        Args:
            tasks: The tasks.
            on_verdict: Called with a task's index and its verdict, in the order in which they are reached.

        Returns:
            One verdict a task, in the tasks' order.

        Raises:
            GradvarError: If the processes cannot be started.
        """
        verdicts: dict[int, Verdict] = {}
        with self._lock:
            try:
                self._serve(tasks, verdicts, on_verdict)
            except BaseException:
                self._stop_all()  # a check may be under way; its verdict must not be read as another's
                raise
        return [verdicts[index] for index in range(len(tasks))]

    def _serve(
        self,
        tasks: Sequence[MathTask],
        verdicts: dict[int, Verdict],
        on_verdict: Callable[[int, Verdict], None] | None,
    ) -> None:
        left = list(range(len(tasks)))[::-1]
        while len(verdicts) < len(tasks):
            self._replace_dead()
            while len(self._workers) < min(self._most, len(tasks) - len(verdicts)):
                self._workers.append(_Worker())
            for worker in self._workers:
                if worker.idle and left:
                    worker.begin(left.pop(), tasks, self.time_limit)
            for index, verdict in self._listen():
                verdicts[index] = verdict
                if on_verdict is not None:
                    on_verdict(index, verdict)

    def _listen(self) -> list[tuple[int, Verdict]]:
        """Wait until a worker speaks, ends or is late; return the verdicts that follow."""
        busy = [worker for worker in self._workers if not worker.idle]
        first = min(worker.expires for worker in busy) - time.monotonic()
        heard = wait([worker.output.fileno() for worker in busy], timeout=min(_POLL, max(0.0, first)))
        reached = []
        for worker in busy:
            index = worker.task
            if worker.output.fileno() in heard:
                verdict = worker.hear()
            elif time.monotonic() >= worker.expires:
                limit = self.time_limit if worker.ready else START_LIMIT
                verdict = worker.give_up(f"did not finish within {limit:g} s")
            elif worker.memory() > MEMORY_LIMIT:
                verdict = worker.give_up(f"used more than {MEMORY_LIMIT / 2**30:.2g} GiB of memory")
            else:
                continue
            if verdict is not None and index is not None:
                reached.append((index, verdict))
        self._workers = [worker for worker in self._workers if not worker.ended]
        return reached

    def _replace_dead(self) -> None:
        for worker in self._workers:
            if worker.idle and worker.process.poll() is not None:
                worker.stop()
        self._workers = [worker for worker in self._workers if not worker.ended]

    def _stop_all(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []


class _Worker:
    """One process, and what it is doing."""

    def __init__(self) -> None:
        # -P keeps this folder off the path. Not multiprocessing: its spawn imports the caller's __main__ again.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("a worker process was started without pipes")
        self.input: IO[bytes] = self.process.stdin
        self.output: IO[bytes] = self.process.stdout
        self.ready = False
        self.ended = False
        self.task: int | None = None
        self.expires = time.monotonic() + START_LIMIT
        self._line = b""

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None

    def begin(self, index: int, tasks: Sequence[MathTask], limit: float) -> None:
        """Hand over a task; the deadline runs from here."""
        task = tasks[index]
        self.task = index
        self.expires = time.monotonic() + limit
        line = json.dumps({"gold": task.gold, "response": task.response, "limit": limit}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it died just now: its output's end says so
            self.input.write(line.encode())
            self.input.flush()

    def hear(self) -> Verdict | None:
        """Take in what the process has written; return the verdict if that is complete."""
        data = os.read(self.output.fileno(), 65536)
        if not data:
            return self._died()
        self._line += data
        if not self._line.endswith(b"\n"):
            return None
        message: dict[str, Any] = json.loads(self._line)
        self._line = b""
        if "failed" in message:
            self.stop()
            raise _cannot_start(message["failed"])
        if not self.ready:
            self.ready = True
            return None
        self.task = None
        if "score" in message:
            return Verdict(score=float(message["score"]))
        return Verdict(score=math.nan, reason=message["unverified"])

    def memory(self) -> int:
        """Return the process's resident memory in bytes, 0 where the system does not tell."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def give_up(self, why: str) -> Verdict:
        """Kill the process."""
        self.stop()
        if not self.ready:
            raise _cannot_start(f"the process {why}")
        return Verdict(score=math.nan, reason=f"math-verify {why}")

    def stop(self) -> int:
        """End the process, leaving no zombie, and return its exit status."""
        self.ended = True
        self.process.kill()
        status = self.process.wait()
        for stream in (self.input, self.output):
            with contextlib.suppress(OSError):
                stream.close()
        return status

    def _died(self) -> Verdict:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        status = self.stop()
        name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        if not self.ready:
            raise _cannot_start(f"the process ended ({name})")
        return Verdict(score=math.nan, reason=f"math-verify's process died ({name})")


def _cannot_start(reason: str) -> GradvarError:
    return GradvarError(
        f"math reward: expected a process of {sys.executable} that imports math-verify, received: {reason}; "
        "see whether `python -c 'import math_verify'` works there"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
