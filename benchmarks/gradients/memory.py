"""Memory against the loop of `autograd.grad` as N x P grows: peak resident bytes beyond those before the first.

One process a way and a choice of targets measures one response, for what libraries load and keep at a first call, then
the first N responses, N growing. Before each the C library gives freed blocks back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from benchmarks.gradients.process import RivalProcess
from benchmarks.gradients.rivals import BOUNDED, REFERENCE
from benchmarks.gradients.shapes import MODELS, Cell

COUNTS = (8, 16, 32, 64)
TARGETS = ("last:qkv,mlp", "3-7:mlp")
NAMES = ("gradvar", BOUNDED.name, REFERENCE)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One rival at one N and P."""

    cell: Cell
    rival: str
    parameters: int
    """P, of all targets."""
    memory: int
    """Bytes beyond the built model and `first_call`."""
    first_call: int
    """Bytes that stay after one response: libraries' code and workspaces."""
    cpu: float
    """Seconds, a first run."""


def target_parameters(cell: Cell) -> int:
    """Return how many parameters the targets have."""
    import torch

    from benchmarks.gradients.shapes import build_model
    from gradvar.gradients import resolve_targets

    with torch.no_grad():
        targets = resolve_targets(build_model(cell.model), list(cell.targets))
    return sum(target.parameter_count() for target in targets)


def measure_growth(
    model: str,
    counts: Sequence[int],
    targets: Sequence[str],
    *,
    threads: int,
    together: int,
    say: Callable[[str], None],
) -> list[Growth]:
    """Return the memory of every way at every N, for every choice of targets; each in a process of its own.

    Args:
        model: A name in MODELS.
        counts: N, growing.
        targets: Choices of targets.
        threads: Of each process.
        together: How many processes work at a time.
        say: Takes a line on the progress.
    """
    responses = "tiny" if MODELS[model]["vocab_size"] < 100 else "short"
    cells = [Cell(model=model, responses=responses, targets=(target,), count=max(counts)) for target in targets]
    ways = [(cell, name, target_parameters(cell)) for cell in cells for name in NAMES]
    with ThreadPoolExecutor(together) as pool:
        # the longest first, so that no process is left to work alone at the end
        order = sorted(ways, key=lambda way: (way[1] != BOUNDED.name, -way[2]))
        grown = {way[:2]: pool.submit(_grow, *way, counts, threads, say) for way in order}
        return [growth for way in ways for growth in grown[way[:2]].result()]


def _grow(
    cell: Cell, name: str, parameters: int, counts: Sequence[int], threads: int, say: Callable[[str], None]
) -> list[Growth]:
    found: list[Growth] = []
    with RivalProcess(name, cell, threads) as process:
        process.wait_ready()
        process.run([0])
        before: int | None = None
        for count in counts:
            message, _ = process.run(range(count))
            before = int(message["before"]) if before is None else before
            memory = message["peak"] - before
            found.append(
                Growth(
                    cell=replace(cell, count=count),
                    rival=name,
                    parameters=parameters,
                    memory=memory,
                    first_call=before - process.baseline,
                    cpu=message["cpu"],
                )
            )
            say(f"memory, {cell.targets[0]}, N = {count}: {name} {memory / 2**20:.0f} MiB")
    return found
