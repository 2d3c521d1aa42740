"""What the scripts share: one command line, where data and figures go, and how a run's rows are chosen.

A script computes one tidy table from a run and draws from that table alone; both take the script's name.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradvar import GradvarError, Run, advantages, deviations, open_run
from gradvar.figures import save, style
from gradvar.runs import SUM, PromptScores

Compute = Callable[[Run], pd.DataFrame]
Draw = Callable[[pd.DataFrame], Figure]

DIGITS = "%.6g"


def make(stem: str, compute: Compute, draw: Draw | None, run: Run, out: Path) -> list[Path]:
    """Write `stem`.csv and, where there is something to draw, `stem`.png and .pdf; return their paths."""
    data = compute(run)
    out.mkdir(parents=True, exist_ok=True)
    table = out / f"{stem}.csv"
    data.to_csv(table, index=False, float_format=DIGITS)
    if draw is None:
        return [table]
    with style():
        return [table, *save(draw(pd.read_csv(table, dtype={"prompt_id": str})), out, stem)]


def main(file: str, about: str | None, compute: Compute, draw: Draw | None = None) -> None:
    """Run one script from the command line: `python -m analyses.NAME RUN [--out FOLDER]`."""
    stem = Path(file).stem
    run, out = arguments(f"python -m analyses.{stem}", about)
    try:
        for path in make(stem, compute, draw, open_run(run), out or Path(run) / "analyses"):
            print(path)
    except GradvarError as error:
        print(f"{stem}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def arguments(program: str, about: str | None) -> tuple[str, Path | None]:
    """Return the run and the output folder given on the command line."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("run", metavar="RUN", help="a run directory with Grams and estimates")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where data and figures go (default: RUN/analyses)")
    given = parser.parse_args()
    return given.run, given.out


def whole_target(run: Run) -> str:
    """Return the sum of all targets, or the only one."""
    return SUM if len(run.targets) > 1 else run.targets[0] if run.targets else SUM


def overall(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows over all prompts, for these prompts; of the one prompt where there is only one."""
    pooled = table[table["prompt_id"].isna()]
    if pooled.empty:
        return table
    return pooled[pooled["estimand"] == "these prompts"] if "estimand" in pooled else pooled


def layers(run: Run) -> dict[int, list[str]]:
    """Return the measured targets of each decoder layer, in order."""
    found: dict[int, list[str]] = {}
    for key in run.targets:
        number = re.search(r"\.(\d+)\.", key)
        if number is not None:
            found.setdefault(int(number[1]), []).append(key)
    return dict(sorted(found.items()))


def is_attention(target: str) -> bool:
    """Whether a target's path names an attention module."""
    return re.search(r"attn|attention", target) is not None


def mixed_prompts(run: Run, count: int, skip: int = 0) -> list[str]:
    """Return the first prompts whose verified rewards are not all equal, some skipped.

    Raises:
        GradvarError: The run holds fewer.
    """
    mixed = []
    for scores in run.scores(run.targets[0] if run.targets else SUM):
        rewards = scores.verified().rewards
        if len(rewards) > 1 and np.ptp(rewards) > 0:
            mixed.append(scores.prompt_id)
    if len(mixed) < skip + count:
        raise GradvarError(
            f"{run.path} holds {len(mixed)} measured prompts with more than one reward, expected {skip + count}: "
            f"sample more prompts (`gradvar sample {run.path} --n-prompts N`)"
        )
    return mixed[skip : skip + count]


def advantage_of(run: Run) -> str:
    """Return the advantage the run's law was fitted with."""
    return run.options("fit").advantage


def spread_of(scores: PromptScores, kind: str) -> NDArray[np.float64]:
    """Return ||g_i - mean g||^2 of verified responses (of all for the score), (N,)."""
    if kind == "score":
        return deviations(scores.gram)
    return deviations(scores.gram, advantages(scores.rewards, kind, lengths=scores.lengths))


def one_prompt(run: Run, target: str, prompt_id: str) -> PromptScores:
    """Return one prompt's scores on one target."""
    return next(scores for scores in run.scores(target) if scores.prompt_id == prompt_id)


def concat(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return tables one below the other, columns in the order of their first appearance."""
    return pd.concat([part for part in parts if len(part)], ignore_index=True)
