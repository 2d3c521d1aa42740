"""Time every estimate on simulated runs, and write what was measured to estimators.md.

Run from the root: `python -m benchmarks.estimators`. 8 and 64 prompts x 128 rollouts x 6 targets and their sum; every
stage is a process of its own, as the commands are, so reading the run counts too. Limits: 8 prompts in 20 s, 64 in 180
s, on two cores; memory linear in prompts.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.synthetic import simulated_prompt, write_run, write_sketches

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path(__file__).with_suffix(".md")
TARGETS = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(6)]
ROLLOUTS = 128
LIMITS = {8: 20.0, 64: 180.0}
"""Prompts to seconds."""
STAGES = ("fit", "cv", "alpha", "audit")
CODE = """
import sys
from gradvar import stages
from gradvar.runs import open_run
name, *further = sys.argv[1].split()
getattr(stages, name)(open_run(sys.argv[2]), {}, **dict.fromkeys(further, True))
"""


def timed(stage: str, run: Path) -> tuple[float, float, float]:
    """Run one stage in a process: wall seconds, processor seconds with its workers, peak GiB of the largest.

    Args:
        stage: Its name, and after spaces what it is asked for further.
        run: A run's folder.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, stage, str(run)]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=list(LIMITS))
    counts = parser.parse_args(arguments).prompts
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            prompts = [simulated_prompt(f"p{q}", ROLLOUTS, TARGETS, rng=np.random.default_rng(q)) for q in range(count)]
            made = write_run(run, prompts)
            found = {stage: timed(stage, run) for stage in STAGES}
            beside = {"`cv --extras`, in its place": timed("cv extras", run)}
            write_sketches(made, prompts)
            beside["`cv` again, with batches of several prompts (`--cross sketch`)"] = timed("cv", run)
        for stage, (wall, cpu, peak) in found.items():
            rows.append(f"| {count} | `{stage}` | {wall:.1f} s | {cpu:.1f} s | {peak:.2f} GiB |")
        for what, (wall, cpu, peak) in beside.items():
            rows.append(f"| {count} | {what} | {wall:.1f} s | {cpu:.1f} s | {peak:.2f} GiB |")
        total, cpu = sum(f[0] for f in found.values()), sum(f[1] for f in found.values())
        limit = f", limit {LIMITS[count]:.0f} s" if count in LIMITS else ""
        largest = max(f[2] for f in found.values())
        rows.append(f"| {count} | all, one after another{limit} | {total:.1f} s | {cpu:.1f} s | {largest:.2f} GiB |")
    load = os.getloadavg()[0]
    lines = [
        "# Estimates",
        "",
        f"Measured by `python -m benchmarks.estimators` on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}: "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; load of the machine at the "
        f"end {load:.1f} (above its cores: other work ran too).",
        f"{ROLLOUTS} rollouts a prompt, {len(TARGETS)} targets and their sum, 512 permutations; one process a stage. "
        "`fit`, `alpha` and `cv --extras` make their tables in a process a core, each with one thread; memory of the "
        "largest.",
        "",
        "| prompts | stage | wall | processor | peak memory |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    OUTPUT.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
