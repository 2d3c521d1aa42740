"""Memory against the loop of `autograd.grad` as N x P grows: peak resident bytes beyond those with the model built.

One process a way and a choice of targets measures the first N responses, N growing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Bytes."""
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
    model: str, counts: Sequence[int], targets: Sequence[str], *, threads: int, say: Callable[[str], None]
) -> list[Growth]:
    """Return the memory of both at every N, for every choice of targets; each in a process of its own."""
    found = []
    responses = "tiny" if MODELS[model]["vocab_size"] < 100 else "short"
    for target in targets:
        cell = Cell(model=model, responses=responses, targets=(target,), count=max(counts))
        parameters = target_parameters(cell)
        for name in NAMES:
            with RivalProcess(name, cell, threads) as process:
                process.wait_ready()
                for count in counts:
                    message, _ = process.run(range(count))
                    memory = message["peak"] - process.baseline
                    found.append(
                        Growth(
                            cell=replace(cell, count=count),
                            rival=name,
                            parameters=parameters,
                            memory=memory,
                            cpu=message["cpu"],
                        )
                    )
                    say(f"memory, {target}, N = {count}: {name} {memory / 2**20:.0f} MiB")
    return found
