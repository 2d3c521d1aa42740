"""What was measured, as a CSV with one row a rival and cell and as the Markdown page made from the same rows."""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gradients.memory import Growth
from benchmarks.gradients.rivals import REFERENCE, RIVALS
from benchmarks.gradients.shapes import MODELS, SETS, draw_lengths, parameter_count
from benchmarks.gradients.timing import Timing

OURS = "gradvar"
COLUMNS = (
    "model", "responses", "targets", "prompt", "n", "tokens", "rival", "repeats", "cpu_s", "cpu_min_s", "cpu_max_s",
    "wall_s", "times_ours", "memory_mib", "gram_error", "deviation_error", "failure",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "numpy", "opacus", "backpack-for-pytorch", "bergson")
AIMS = {"autograd.grad": {"mixed": 1.0, "short": 1.5}, "full backward": {"mixed": 2.0, "short": 2.0}}
"""How many times our CPU time a rival should take, at least; 1 for those not named."""

_HOW = """
Every way gives the N x N Gram of the same targets' weights and biases, in float32 (ours sums in float64). Each runs in
a process of its own that keeps its model; a repeat runs all of them once (the second not what is timed once), in
turned order, after their Grams of four responses were found the same. CPU time is the process's, the median of the
repeats; "times ours" is the median of the ratio within a repeat. Memory is the peak beyond what is resident with the
model built. Gram error: the largest
difference of an entry from autograd.grad's, relative to the largest entry (more than the tolerance stops the run); D
error: the largest relative difference of ||g_i - mean g||^2.
"""

GROWTH_TITLE = "## Memory as N P grows"
_GROWTH = """
Peak resident memory beyond that after one response, short responses, a first run at each N. The loop keeps N
gradients of P float32 numbers; gradvar keeps the factors of each gradient, or the gradients where those are smaller,
and tiles; within a budget it takes as many passes as that needs.
"""


def times_ours(timing: Timing, ours: Timing) -> float:
    """Return the median over the repeats of the rival's CPU time over ours in the same repeat."""
    pairs = list(zip(timing.cpu, ours.cpu, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else math.nan


def rows_of(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Return the CSV's rows."""
    ours = {timing.cell: timing for timing in timings if timing.rival == OURS}
    rows = []
    for timing in timings:
        cell = timing.cell
        rows.append(
            {
                "model": cell.model,
                "responses": cell.responses,
                "targets": " + ".join(cell.targets),
                "prompt": cell.prompt,
                "n": cell.count,
                "tokens": sum(draw_lengths(cell)),
                "rival": timing.rival,
                "repeats": len(timing.cpu),
                "cpu_s": _rounded(timing.seconds, 3),
                "cpu_min_s": _rounded(min(timing.cpu, default=math.nan), 3),
                "cpu_max_s": _rounded(max(timing.cpu, default=math.nan), 3),
                "wall_s": _rounded(statistics.median(timing.wall) if timing.wall else math.nan, 3),
                "times_ours": _rounded(times_ours(timing, ours[cell]) if cell in ours else math.nan, 3),
                "memory_mib": round(timing.memory / 2**20),
                "gram_error": f"{timing.error:.1e}",
                "deviation_error": f"{timing.deviation_error:.1e}",
                "failure": timing.failure,
            }
        )
    return rows


def _rounded(value: float, digits: int) -> float | str:
    return round(value, digits) if math.isfinite(value) else ""


def write_csv(path: Path, timings: Sequence[Timing]) -> None:
    """Write the CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows_of(timings))


def machine(threads: int, together: int) -> str:
    """Return one line on where this was measured."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.machine()
    parts = []
    for package in PACKAGES:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} not installed")
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"{processor}, {os.cpu_count()} cores, load average at the end {load} (of it {together} from this run), "
        f"{threads} thread{'s' * (threads > 1)} a process, {together} processes at a time, "
        f"Python {platform.python_version()}, " + ", ".join(parts)
    )


def _number(value: Any, digits: int = 2) -> str:
    return "" if value == "" else f"{value:.{digits}f}"


def cell_table(timings: Sequence[Timing]) -> list[str]:
    """Return the lines of one cell's table."""
    lines = [
        "| | CPU s | range | times ours | memory, MiB | Gram error | D error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows_of(timings):
        if not row["repeats"]:
            lines.append(f"| {row['rival']} | {row['failure']} | | | | | |")
            continue
        span = f"{_number(row['cpu_min_s'])} to {_number(row['cpu_max_s'])}"
        error = "reference" if row["rival"] == REFERENCE else row["gram_error"]
        deviation = "reference" if row["rival"] == REFERENCE else row["deviation_error"]
        lines.append(
            f"| {row['rival']} | {_number(row['cpu_s'])} | {span} | {_number(row['times_ours'])} | {row['memory_mib']} "
            f"| {error} | {deviation} |"
        )
    return lines


def misses(timings: Sequence[Timing]) -> list[str]:
    """Return a line for every aim that was missed, with by how much."""
    found = []
    for row in rows_of(timings):
        if row["rival"] in (OURS, "gradvar bfloat16") or row["times_ours"] == "":
            continue
        aim = AIMS.get(row["rival"], {}).get(row["responses"], 1.0)
        if row["times_ours"] < aim:
            found.append(
                f"- {row['model']}, {row['responses']}, {row['targets']}: {row['rival']} took "
                f"{row['times_ours']:.2f} times our CPU time, aim {aim:g}"
            )
    return found


def growth_table(growth: Sequence[Growth]) -> list[str]:
    """Return the lines of the memory table."""
    names = list(dict.fromkeys(each.rival for each in growth))
    head = " | ".join(f"{name}, MiB | CPU s" for name in names)
    lines = [f"| targets | N | N P, millions | {head} |", "|---|---:|---:|" + "---:|---:|" * len(names)]
    for cell in dict.fromkeys(each.cell for each in growth):
        found = {each.rival: each for each in growth if each.cell == cell}
        size = cell.count * found[names[0]].parameters / 1e6
        cost = " | ".join(f"{found[name].memory / 2**20:.0f} | {found[name].cpu:.1f}" for name in names)
        lines.append(f"| {cell.targets[0]} | {cell.count} | {size:.1f} | {cost} |")
    return lines


def growth_lines(growth: Sequence[Growth], *, made: str) -> list[str]:
    """Return the page's section on memory."""
    first = {each.rival: each.first_call for each in growth}
    said = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in first.items())
    return [
        GROWTH_TITLE,
        "",
        made,
        "",
        *_GROWTH.strip().splitlines(),
        "What one response left is not in the table (libraries' code and workspaces; MiB beyond the built model: "
        f"{said}).",
        "",
        *growth_table(growth),
    ]


def replace_growth(path: Path, growth: Sequence[Growth], *, made: str) -> None:
    """Put a new section on memory, the last one, into a page that is there."""
    kept, _, _ = path.read_text().partition(GROWTH_TITLE)
    path.write_text(kept + "\n".join(growth_lines(growth, made=made)) + "\n")


def made_by(command: str, where: str, note: str = "") -> str:
    """Return the line that says how, when and where."""
    when = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    return f"Made by `{command}` on {when}. {where}." + (f" **{note}**" if note else "")


def write_page(
    path: Path, timings: Sequence[Timing], growth: Sequence[Growth], *, command: str, where: str, note: str
) -> None:
    """Write the Markdown page."""
    cells = list(dict.fromkeys(timing.cell for timing in timings))
    models = dict.fromkeys([*(cell.model for cell in cells), *(each.cell.model for each in growth)])
    lines = [
        "# Score Grams on the CPU, gradvar and others",
        "",
        made_by(command, where, note),
        "",
        *_HOW.strip().splitlines(),
        "",
        "Models (Qwen2's architecture, random weights, embedding tied):",
        "",
        *[
            f"- {name}: {parameter_count(name):,} parameters, "
            + ", ".join(f"{key} {value}" for key, value in MODELS[name].items())
            for name in models
        ],
        "",
        "Rivals:",
        "",
        *[
            f"- {rival.name}: {rival.what}"
            + (f" of {rival.token_budget} padded tokens, sorted by length" if rival.token_budget else "")
            + f"; agreement within {rival.tolerance:.0e}"
            for rival in RIVALS.values()
        ],
    ]
    for cell in cells:
        lengths = draw_lengths(cell)
        lines += [
            "",
            f"## {cell.model}, {cell.responses} responses, {' + '.join(cell.targets)}",
            "",
            f"{cell.count} responses of {SETS[cell.responses]}, {sum(lengths):,} tokens in all, behind one prompt of "
            f"{cell.prompt}.",
            "",
            *cell_table([timing for timing in timings if timing.cell == cell]),
        ]
    missed = misses(timings)
    lines += ["", "## Aims", "", *(missed or ["None of the aims was missed."])]
    if growth:
        lines += ["", *growth_lines(growth, made="In the same run as the tables above.")]
    path.write_text("\n".join(lines) + "\n")
