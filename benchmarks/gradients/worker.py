"""One rival on one cell, in a process of its own, which keeps its model between the repeats.

`python -m benchmarks.gradients.worker SETTINGS` speaks JSON, one line a message: "ready" once the model is built. It
then runs all responses (or those named) for each line it reads and answers with the time it took. Grams go to the file
that the message names. An error ends in a message too.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gradients.common import Grams
from benchmarks.gradients.rivals import BOUNDED, RIVALS, Rival
from benchmarks.gradients.shapes import Cell, Work, make_work


def resident(name: str) -> int:
    """Return VmRSS or VmHWM (the peak since `forget_peak`) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Let VmHWM begin again at the present size."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """Let the C library give freed blocks back, where it is glibc: what an earlier run left is not this one's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def answer(request: dict[str, Any], rival: Rival, work: Work) -> tuple[dict[str, Any], Grams]:
    """Run all responses, or the members that the request names."""
    members = request.get("members")
    part = work if members is None else work.part(members)
    give_back()
    forget_peak()
    before = resident("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    grams = rival.run(part, int(request.get("token_budget", rival.token_budget)))
    found = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return {**found, "before": before, "peak": resident("VmHWM"), "now": resident("VmRSS")}, grams


def serve(settings: dict[str, Any], replies: Any) -> None:
    """Answer requests until there are no more."""

    def say(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        rival = {**RIVALS, BOUNDED.name: BOUNDED}[settings["rival"]]
        cell = Cell(**{**settings["cell"], "targets": tuple(settings["cell"]["targets"])})
        torch.set_num_threads(int(settings["threads"]))
        work = make_work(cell)
        forget_peak()
        say({"ready": True, "now": resident("VmRSS"), "threads": torch.get_num_threads()})
        for line in sys.stdin:
            request = json.loads(line)
            found, grams = answer(request, rival, work)
            if "save" in request:
                np.savez(request["save"], **grams)  # type: ignore[arg-type]
            say(found)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        raise


def main() -> None:
    """Keep standard output for the messages: libraries print too."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    serve(json.loads(sys.argv[1]), replies)


if __name__ == "__main__":
    main()
