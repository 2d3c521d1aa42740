"""Time the demo, its stages, the estimates and `--help`, and write what was measured to end_to_end.md.

Run from the root: `python -m benchmarks.end_to_end`. Whole processes are timed; memory is the largest process.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path(__file__).with_suffix(".md")


def timed(*arguments: str) -> float:
    """Run the gradvar command and return its wall time in seconds."""
    start = time.perf_counter()
    code = "from cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "run")
        started = timed("--help")
        help_times = [timed("--help") for _ in range(5)]
        demo = timed("demo", run)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        stages = json.loads((Path(run) / "run.json").read_text())["stages"]
        spans = {
            name: (_time(stage["finished"]) - _time(stage["started"])).total_seconds() for name, stage in stages.items()
        }
        config = json.loads((Path(run) / "run.json").read_text())["config"]["sample"]
        small = str(Path(folder) / "small")
        timed("demo", small, "--n-prompts", "8")
        estimates = timed("fit", small) + timed("cv", small)
        resumed = timed("demo", small)
    rows = [
        ("`gradvar --help`, median of 5 (first " + f"{started:.2f} s)", f"{statistics.median(help_times):.2f} s"),
        (f"`gradvar demo`, {config['n_prompts']} prompts x {config['rollouts']} rollouts, all stages", f"{demo:.0f} s"),
        *[(f"of it: {name}", f"{seconds:.0f} s") for name, seconds in spans.items()],
        ("largest process of the demo", f"{peak:.2f} GiB"),
        ("`gradvar fit` and `gradvar cv`, 8 prompts x 128 rollouts, 3 targets and their sum", f"{estimates:.0f} s"),
        ("the demo once more on that run (8 prompts there, 8 missing)", f"{resumed:.0f} s"),
    ]
    lines = [
        "# End to end",
        "",
        f"Measured by `python -m benchmarks.end_to_end` on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}: "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, no GPU.",
        "",
        "| what | measured |",
        "|---|---|",
        *[f"| {what} | {value} |" for what, value in rows],
        "",
    ]
    OUTPUT.write_text("\n".join(lines))
    print("\n".join(lines))


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.UTC)


if __name__ == "__main__":
    main()
