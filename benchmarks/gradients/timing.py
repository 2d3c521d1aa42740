"""CPU time and memory of every rival on every cell, interleaved: each repeat runs all rivals once, in turned order."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.gradients.common import Grams
from benchmarks.gradients.process import RivalError, RivalProcess
from benchmarks.gradients.rivals import REFERENCE, RIVALS
from benchmarks.gradients.shapes import Cell, draw_lengths

_CHECKED = 4
"""Responses whose Gram is compared before anything is timed."""


@dataclass(kw_only=True)
class Timing:
    """One rival on one cell."""

    cell: Cell
    rival: str
    cpu: list[float] = field(default_factory=list)
    """Seconds of each repeat."""
    wall: list[float] = field(default_factory=list)
    memory: int = 0
    """Peak resident bytes less those resident with the model built."""
    error: float = float("nan")
    """Largest difference of a Gram's entry from the reference's, relative to its largest entry."""
    deviation_error: float = float("nan")
    """Largest relative error of ||g_i - mean g||^2, over responses and targets."""
    failure: str = ""

    def add(self, message: dict[str, Any], baseline: int) -> None:
        """Add a repeat."""
        self.cpu.append(message["cpu"])
        self.wall.append(message["wall"])
        self.memory = max(self.memory, message["peak"] - baseline)

    @property
    def seconds(self) -> float:
        """Median CPU seconds."""
        return statistics.median(self.cpu) if self.cpu else float("nan")


def gram_error(grams: Grams, reference: Grams) -> float:
    """Return the largest difference of an entry, relative to the reference's largest, over the targets."""
    if grams.keys() != reference.keys():
        raise RivalError(f"expected the targets {sorted(reference)}, received {sorted(grams)}")
    return max(float(np.abs(grams[k] - reference[k]).max() / np.abs(reference[k]).max()) for k in reference)


def deviation_error(grams: Grams, reference: Grams) -> float:
    """Return the largest relative error of D_i = ||g_i - mean g||^2."""
    from gradvar.estimators import deviations

    worst = 0.0
    for key, gram in reference.items():
        expected = deviations(gram)
        worst = max(worst, float((np.abs(deviations(grams[key]) - expected) / expected).max()))
    return worst


def measure_cell(
    cell: Cell, rivals: Sequence[str], *, repeats: int, threads: int, together: int, say: Callable[[str], None]
) -> list[Timing]:
    """Return the timings of one cell; a rival that is not installed or fails says so in its own.

    Args:
        cell: What is measured.
        rivals: Names in RIVALS; the reference runs in any case.
        repeats: How often each is timed.
        threads: Of each process.
        together: How many processes work at a time.
        say: Takes a line on the progress.

    Raises:
        RivalError: A rival's Grams are not the reference's.
    """
    found = {name: Timing(cell=cell, rival=name) for name in dict.fromkeys([REFERENCE, *rivals])}
    with ExitStack() as stack:
        processes = dict(_started(stack, cell, found, threads))
        order = sorted(range(cell.count), key=draw_lengths(cell).__getitem__)
        _compare(processes, found, order[:_CHECKED])
        for repeat in range(repeats):
            names = [name for name in processes if repeat == 0 or not RIVALS[name].once]
            turned = names[repeat % len(names) :] + names[: repeat % len(names)]
            grams: dict[str, Grams] = {}
            with ThreadPoolExecutor(together) as pool:
                for name, (message, each) in zip(
                    turned, pool.map(lambda n: _try(processes[n], None), turned), strict=True
                ):
                    if isinstance(message, str):
                        found[name].failure = message
                        del processes[name]
                        continue
                    grams[name] = each
                    found[name].add(message, processes[name].baseline)
                    say(f"{cell.name}: {name} {message['cpu']:.2f} s")
            for name, each in grams.items():
                _accept(found[name], each, grams[REFERENCE])
    return [found[name] for name in rivals]


def _started(
    stack: ExitStack, cell: Cell, found: dict[str, Timing], threads: int
) -> Iterator[tuple[str, RivalProcess]]:
    """Start all processes, then wait for each; yield those that are ready."""
    started = {}
    for name, timing in found.items():
        package = RIVALS[name].package
        if package is not None and find_spec(package) is None:
            timing.failure = "not installed"
        else:
            started[name] = stack.enter_context(RivalProcess(name, cell, threads))
    for name, process in started.items():
        try:
            process.wait_ready()
        except RivalError as error:
            found[name].failure = str(error)
        else:
            yield name, process


def _try(process: RivalProcess, members: Sequence[int] | None) -> tuple[dict[str, Any] | str, Grams]:
    """Return what the rival found, or its error's message."""
    try:
        return process.run(members)
    except RivalError as error:
        return str(error), {}


def _compare(processes: dict[str, RivalProcess], found: dict[str, Timing], members: Sequence[int]) -> None:
    _, reference = processes[REFERENCE].run(members)
    for name in list(processes):
        message, grams = _try(processes[name], members)
        if isinstance(message, str):
            found[name].failure = message
            del processes[name]
        else:
            _accept(found[name], grams, reference)


def _accept(timing: Timing, grams: Grams, reference: Grams) -> None:
    timing.error = gram_error(grams, reference)
    timing.deviation_error = deviation_error(grams, reference)
    if not timing.error <= RIVALS[timing.rival].tolerance:
        raise RivalError(
            f"{timing.rival} on {timing.cell.name}: its Gram is off by {timing.error:.1e} of the largest entry, more "
            f"than {RIVALS[timing.rival].tolerance:.0e}"
        )
