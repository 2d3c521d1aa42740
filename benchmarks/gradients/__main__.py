"""Measure and write benchmarks/gradients.csv and .md: `python -m benchmarks.gradients` (at most 20 minutes on 2 cores).

`make bench` installs the rivals in an environment of their own first. A rival that is not installed says so in the
table. `--tiny` runs everything on a model of a few thousand parameters in a minute.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gradients.memory import COUNTS, TARGETS, Growth, measure_growth
from benchmarks.gradients.process import RivalError
from benchmarks.gradients.rivals import RIVALS
from benchmarks.gradients.shapes import Cell
from benchmarks.gradients.tables import machine, made_by, replace_growth, write_csv, write_page
from benchmarks.gradients.timing import Timing, measure_cell

CELLS = {
    "27M-short": Cell(model="27M", responses="short", targets=("last:qkv",)),
    "27M-short-prompt-20": Cell(model="27M", responses="short", targets=("last:qkv",), prompt=20),
    "27M-mixed": Cell(model="27M", responses="mixed", targets=("last:qkv",)),
    "27M-middle": Cell(model="27M", responses="mixed", targets=("middle:qkv,mlp",)),
    "150M-short": Cell(model="150M", responses="short", targets=("last:qkv",)),
    "150M-mixed": Cell(model="150M", responses="mixed", targets=("last:qkv",)),
}
TINY = {
    "tiny": Cell(model="tiny", responses="tiny", targets=("last:qkv",), count=6, prompt=8),
    "tiny-middle": Cell(model="tiny", responses="tiny", targets=("middle:qkv,mlp",), count=6, prompt=8),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; a mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradients", description=__doc__)
    parser.add_argument("--cells", nargs="+", help=f"of {', '.join(CELLS)} (all)")
    parser.add_argument("--rivals", nargs="+", help=f"of {', '.join(RIVALS)} (all)")
    parser.add_argument("--repeats", type=int, default=2, help="of every cell (2; 150M cells at most 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (1)")
    parser.add_argument("--together", type=int, default=2, help="processes that work at a time (2)")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters")
    parser.add_argument("--no-memory", action="store_true", help="leave out memory as N P grows")
    parser.add_argument(
        "--only-memory", action="store_true", help="do that alone, and put it into the page that is there"
    )
    parser.add_argument("--note", default="", help="a line for the page, for example that the machine was busy")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1], help="folder of the tables")
    options = parser.parse_args(arguments)
    known = TINY if options.tiny else CELLS
    options.cells = options.cells or list(known)
    options.rivals = options.rivals or list(RIVALS)
    for name, given, allowed in (("--cells", options.cells, known), ("--rivals", options.rivals, RIVALS)):
        for value in given:
            if value not in allowed:
                parser.error(f"argument {name}: expected one of {', '.join(allowed)}, received {value!r}")
    for name in ("repeats", "threads", "together"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected at least 1, received {getattr(options, name)}")
    if options.only_memory and options.no_memory:
        parser.error("argument --only-memory: not with --no-memory")
    if options.only_memory and not (options.out / "gradients.md").is_file():
        parser.error(f"argument --only-memory: {options.out / 'gradients.md'} is not there; make the whole page first")
    if not options.out.is_dir():
        parser.error(f"argument --out: expected a folder, received {str(options.out)!r}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure and write the tables."""
    options = parse(arguments)
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True)

    command = " ".join(["python -m benchmarks.gradients", *arguments])
    timings: list[Timing] = []
    growth: list[Growth] = []

    def write() -> None:
        """Write what there is: what a long run has measured is kept when it is broken off."""
        spent = f"{(time.monotonic() - start) / 60:.0f} minutes in all"
        where = f"{machine(options.threads, options.together)}; {spent}"
        if options.only_memory:
            replace_growth(options.out / "gradients.md", growth, made=made_by(command, where, options.note))
            return
        write_csv(options.out / "gradients.csv", timings)
        write_page(options.out / "gradients.md", timings, growth, command=command, where=where, note=options.note)

    try:
        for name in [] if options.only_memory else options.cells:
            cell = (TINY if options.tiny else CELLS)[name]
            repeats = min(options.repeats, 2) if cell.model == "150M" else options.repeats
            timings += measure_cell(
                cell, options.rivals, repeats=repeats, threads=options.threads, together=options.together, say=say
            )
            write()
        if not options.no_memory:
            counts = COUNTS[:2] if options.tiny else COUNTS
            model, targets = ("tiny", TARGETS[:1]) if options.tiny else ("27M", TARGETS)
            growth += measure_growth(
                model, counts, targets, threads=options.threads, together=options.together, say=say
            )
            write()
    except RivalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((options.out / "gradients.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
