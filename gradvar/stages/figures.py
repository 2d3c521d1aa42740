"""Stage figures: the run's numbers drawn, as png and pdf."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.optimize import brentq

from gradvar.estimators import advantages, deviations
from gradvar.estimators.intervals import THESE_PROMPTS
from gradvar.estimators.law_samples import ALL_RESPONSES
from gradvar.figures import panels, plot_aggregator_cv, plot_alpha_curve, plot_length_law, save, style
from gradvar.runs import SUM, EstimateConfig, PromptScores, Run, target_label
from gradvar.stages.listener import Listener, Silent

SHOWN_PROMPTS = 3
"""Prompts that get a figure of their own."""


def draw_figures(run: Run, listener: Listener | None = None) -> list[Path]:
    """Draw every figure the run has data for and return the files' paths.

    `length_law_score` and `length_law_<advantage>`: deviation against length, one panel a target, all prompts (aligned
    by their mean deviations) and the first prompts alone; `aggregator_cv`: the aggregators' CV, and `alpha_curve`:
    efficiency over alpha, both pooled and for the first prompts.

    Raises:
        GradvarError: Nothing was measured or fitted yet.
    """
    listener = listener or Silent()
    config = run.config(EstimateConfig)
    law = run.table("law")
    targets = [*run.targets, SUM] if len(run.targets) > 1 else run.targets or [SUM]
    scores = {target: run.scores(target) for target in targets}
    folder = run.path / "figures"
    paths: list[Path] = []
    kinds = ["score", config.advantage] if config.advantage != "score" else ["score"]
    shown = [group.prompt_id for group in scores[targets[0]]][:SHOWN_PROMPTS]
    with listener.task("figures", len(kinds) * (1 + len(shown)) + 1) as advance, style():
        for kind in kinds:
            paths += _length_law(folder, f"length_law_{kind}", scores, kind, law)
            advance(1)
            for prompt_id in shown if len(scores[targets[0]]) > 1 else []:
                one = {t: [group for group in groups if group.prompt_id == prompt_id] for t, groups in scores.items()}
                paths += _length_law(folder, f"length_law_{kind}_prompt_{prompt_id}", one, kind, law)
                advance(1)
        if (run.path / "tables" / "cv.parquet").exists():
            paths += _aggregators(folder, run.table("cv"), targets[-1], shown)
        else:
            listener.say(f"no figure of the aggregators: run `gradvar cv {run.path}` first")
        if (run.path / "tables" / "alpha.parquet").exists():
            paths += _alpha_curves(folder, run.table("alpha"), targets[-1], shown)
        else:
            listener.say(f"no figure of alpha: run `gradvar alpha {run.path}` first")
        advance(1)
    return paths


def _length_law(
    folder: Path, stem: str, scores: dict[str, list[PromptScores]], kind: str, law: pd.DataFrame
) -> list[Path]:
    everyone = [group for groups in scores.values() for group in groups]
    if all(_deviations(group if kind == "score" else group.verified(), kind).sum() == 0 for group in everyone):
        return []  # every advantage is zero: there is nothing to draw
    figure = panels(len(scores), columns=4)
    for axes, (target, groups) in zip(figure.axes, scores.items(), strict=False):
        chosen = law[(law["target"] == target) & (law["advantage"] == kind) & (law["scope"] == ALL_RESPONSES)]
        if len(groups) > 1:
            chosen = chosen[chosen["prompt_id"].isna() & (chosen["estimand"] == THESE_PROMPTS)]
        else:
            chosen = chosen[chosen["prompt_id"] == groups[0].prompt_id]
        _length_panel(axes, target, groups, kind, chosen.set_index("quantity"))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return save(figure, folder, stem)


def _length_panel(axes: Axes, target: str, groups: Sequence[PromptScores], kind: str, law: pd.DataFrame) -> None:
    kept = [group if kind == "score" else group.verified() for group in groups]
    rows = [(group, _deviations(group, kind)) for group in kept if len(group.lengths) >= 3]
    rows = [(group, squares) for group, squares in rows if squares.sum() > 0]
    if not rows:
        axes.set_title(target_label(target))
        axes.text(0.5, 0.5, "every advantage is zero", ha="center", transform=axes.transAxes)
        return
    lengths = np.concatenate([group.lengths for group, _ in rows])
    curve, note = None, ""
    scales = [1.0] * len(rows)
    fitted = law[law["value"].notna()]
    if {"deviation_exponent", "deviation_level"} <= set(fitted.index):
        exponent, level = (fitted.loc[[name]].iloc[0] for name in ("deviation_exponent", "deviation_level"))
        # Prompts differ by a constant each: they are brought together where the law has the pooled level.
        constants = [_constant(group.lengths, squares, exponent, level) for group, squares in rows]
        scales = [float(level["value"]) / constant for constant in constants]
        floor = float(
            np.exp(np.mean([np.log(_floor(squares) * s) for (_, squares), s in zip(rows, scales, strict=True)]))
        )
        grid = np.geomspace(lengths.min(), lengths.max(), 60)
        curve = _curve(exponent, level, grid, shrink=1 - 2 * len(rows) / len(lengths), floor=floor)
        note = (
            f"exponent {exponent['value']:.2f} [{exponent['low']:.2f}, {exponent['high']:.2f}]\n{exponent['verdict']}"
        )
    symbol = "s" if kind == "score" else "g"
    plot_length_law(
        axes,
        lengths,
        np.concatenate([squares * scale for (_, squares), scale in zip(rows, scales, strict=True)]),
        curve=curve,
        rewards=np.concatenate([group.rewards for group, _ in rows]),
        truncated=np.concatenate([group.truncated for group, _ in rows]),
        label=rf"$\|{symbol}_i - \bar {symbol}\|^2$"
        + ("" if kind == "score" else f", {kind} advantages")
        + (", prompts aligned" if len(groups) > 1 else ""),
        title=target_label(target),
        note=note,
    )


def _floor(squares: NDArray[np.float64]) -> float:
    """Return vbar/N: what the noise of the mean gradient adds to every deviation; sum D = (N - 1) vbar."""
    return float(squares.sum() / (len(squares) - 1) / len(squares))


def _constant(lengths: NDArray[np.float64], squares: NDArray[np.float64], exponent: Any, level: Any) -> float:
    """Return one prompt's v at the reference length under the pooled exponent: mean of D / fitted D is 1."""
    shape = (1 - 2 / len(lengths)) * (lengths / float(level["reference_length"])) ** float(exponent["value"])
    floor = _floor(squares)
    ratio = squares / shape
    if np.mean(squares / floor) <= 1:
        return float(ratio.mean())
    top = 2 * float(ratio.max())
    return float(brentq(lambda c: float(np.mean(squares / (c * shape + floor))) - 1, 0.0, top))


def _curve(exponent: Any, level: Any, grid: NDArray[np.float64], *, shrink: float, floor: float) -> pd.DataFrame:
    """Return the fitted mean of D, (1 - 2/N) v(L) + vbar/N, and its pointwise band.

    Level and exponent have uncorrelated errors, so those of log v(L) add in squares.
    """
    steps = np.log(grid / float(level["reference_length"]))
    middle = np.log(float(level["value"])) + float(exponent["value"]) * steps
    half = np.hypot(
        np.log(float(level["high"]) / float(level["value"])),
        (float(exponent["high"]) - float(exponent["value"])) * steps,
    )
    columns = {"value": middle, "low": middle - half, "high": middle + half}
    return pd.DataFrame({"length": grid, **{name: shrink * np.exp(v) + floor for name, v in columns.items()}})


def _deviations(group: PromptScores, kind: str) -> NDArray[np.float64]:
    if kind == "score":
        return deviations(group.gram)
    return deviations(group.gram, advantages(group.rewards, kind, lengths=group.lengths))


def _aggregators(folder: Path, table: pd.DataFrame, target: str, shown: Sequence[str]) -> list[Path]:
    rows = table[(table["quantity"] == "cv") & (table["target"] == target)]
    pooled = rows[rows["prompt_id"].isna() & (rows["estimand"] == THESE_PROMPTS)]
    rows = rows[rows["rule"].notna()]
    parts = [("all prompts", pooled)] if len(pooled) else []
    parts += [(f"prompt {prompt_id}", rows[rows["prompt_id"] == prompt_id]) for prompt_id in shown]
    parts = [(title, part) for title, part in parts if len(part)]
    if not parts:
        return []
    figure = panels(len(parts), columns=4)
    for axes, (title, part) in zip(figure.axes, parts, strict=False):
        plot_aggregator_cv(axes, part, title=f"{title}: {target_label(target)}, n = {part['group_size'].iloc[0]}")
    return save(figure, folder, "aggregator_cv")


def _alpha_curves(folder: Path, table: pd.DataFrame, target: str, shown: Sequence[str]) -> list[Path]:
    rows = table[table["target"] == target]
    parts = [("all prompts", rows[rows["prompt_id"].isna() & (rows["estimand"] == THESE_PROMPTS)])]
    parts += [(f"prompt {prompt_id}", rows[rows["prompt_id"] == prompt_id]) for prompt_id in shown]
    parts = [(title, part) for title, part in parts if (part["quantity"].eq("eta") & part["alpha"].notna()).any()]
    if not parts:
        return []
    figure = panels(len(parts), columns=4)
    for axes, (title, part) in zip(figure.axes, parts, strict=False):
        plot_alpha_curve(axes, part, title=f"{title}: {target_label(target)}, n = {part['group_size'].iloc[0]}")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return save(figure, folder, "alpha_curve")
