"""Every figure and table of the paper from one run: `python -m analyses RUN [--out FOLDER]`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from analyses.script import arguments, make
from gradvar import GradvarError, open_run

SCRIPTS = (
    "figure_01",
    "figure_04",
    "figure_05",
    "figure_10",
    "figure_11",
    "table_01",
    "alpha_sweep",
    "length_law",
    "assumption_audit",
    "claims",
)


def main() -> None:
    """Make what the run has the data for; name the command that is missing for the rest."""
    run, out = arguments("python -m analyses", __doc__)
    missing = 0
    for stem in SCRIPTS:
        script = importlib.import_module(f"analyses.{stem}")
        try:
            draw = getattr(script, "draw", None)
            for path in make(stem, script.compute, draw, open_run(run), out or Path(run) / "analyses"):
                print(path)
        except GradvarError as error:
            missing += 1
            print(f"{stem}: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2 if missing else 0)


if __name__ == "__main__":
    main()
