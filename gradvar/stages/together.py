"""Independent tables of one run, made on as many cores as there are."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gradvar.estimators.aggregation import RULES, Rule, register_rule
from gradvar.runs import PromptScores

Task = Callable[[], Any]
"""Makes one table; sent to another process, so made of functions and data."""

WORTH = 3000
"""Responses times targets from which on processes of their own are worth their start, about 1 s (as measured)."""


def together(tasks: Sequence[Task], groups: Sequence[PromptScores]) -> Iterator[Any]:
    """Yield what the tasks return, in their order, each as soon as it and those before it are done.

    Large runs have a process a core (`LOKY_MAX_CPU_COUNT` in the environment lowers the number). The results are the
    same to the last bit where BLAS has as many threads as it has there (`OMP_NUM_THREADS=1`), else to rounding. Rules
    that were registered are known there too. No process is left when the last result was taken, when this generator is
    closed, or when the caller's process is killed.

    Args:
        tasks: What to do, the longest first.
        groups: What they work on, which decides whether processes are worth their start.

    Raises:
        GradvarError: Of a task.
    """
    from joblib import Parallel, cpu_count, delayed
    from joblib.externals.loky import get_reusable_executor

    jobs = min(cpu_count(), len(tasks))
    if jobs < 2 or sum(len(group.lengths) for group in groups) < WORTH:
        yield from (task() for task in tasks)
        return
    known = dict(RULES)
    # With an initializer the executor is none that the caller's own use of joblib left idle.
    make = Parallel(n_jobs=jobs, return_as="generator", initializer=_end_with, initargs=(os.getpid(),))
    try:
        yield from make(delayed(_with_rules)(task, known) for task in tasks)
    finally:
        get_reusable_executor(reuse=True).shutdown(kill_workers=True)


def _end_with(parent: int) -> None:
    """End this process soon after its parent, which a signal may end before it can say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _with_rules(task: Task, rules: Mapping[str, Rule]) -> Any:
    """Run a task where all of these rules are registered."""
    for name, rule in rules.items():
        if name not in RULES:
            register_rule(rule)
    return task()
