"""Independent tables of one run, made on as many cores as there are."""

from __future__ import annotations

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

    Large runs have a process a core (`LOKY_MAX_CPU_COUNT` in the environment sets another number); the results are the
    same. Rules that were registered are known there too.

    Args:
        tasks: What to do, the longest first.
        groups: What they work on, which decides whether processes are worth their start.

    Raises:
        GradvarError: Of a task.
    """
    if sum(len(group.lengths) for group in groups) < WORTH:
        yield from (task() for task in tasks)
        return
    from joblib import Parallel, cpu_count, delayed

    known = dict(RULES)
    make = Parallel(n_jobs=min(cpu_count(), len(tasks)), return_as="generator")
    yield from make(delayed(_with_rules)(task, known) for task in tasks)


def _with_rules(task: Task, rules: Mapping[str, Rule]) -> Any:
    """Run a task where all of these rules are registered."""
    for name, rule in rules.items():
        if name not in RULES:
            register_rule(rule)
    return task()
