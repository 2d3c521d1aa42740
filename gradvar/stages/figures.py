"""Stage figures: the run's numbers drawn, as png and pdf."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.estimators import advantages, deviations, fit_variance_law
from gradvar.estimators.intervals import THESE_PROMPTS
from gradvar.figures import panels, plot_aggregator_cv, plot_length_law, save, style
from gradvar.runs import SUM, EstimateConfig, PromptScores, Run, target_label
from gradvar.stages.listener import Listener, Silent

SHOWN_PROMPTS = 3
"""Prompts that get a figure of their own."""


def draw_figures(run: Run, listener: Listener | None = None) -> list[Path]:
    """Draw every figure the run has data for and return the files' paths.

    `length_law_score` and `length_law_<advantage>`: deviation against length, one panel a target, all prompts (each
    divided by its own mean deviation) and the first prompts alone; `aggregator_cv`: the aggregators' CV, pooled and for
    the first prompts.

    Raises:
        GradvarError: Nothing was measured.
    """
    listener = listener or Silent()
    config = run.config(EstimateConfig)
    targets = [*run.targets, SUM] if len(run.targets) > 1 else run.targets or [SUM]
    scores = {target: run.scores(target) for target in targets}
    folder = run.path / "figures"
    paths: list[Path] = []
    kinds = ["score", config.advantage] if config.advantage != "score" else ["score"]
    shown = [group.prompt_id for group in scores[targets[0]]][:SHOWN_PROMPTS]
    with listener.task("figures", len(kinds) * (1 + len(shown)) + 1) as advance, style():
        for kind in kinds:
            paths += _length_law(folder, f"length_law_{kind}", scores, kind, config)
            advance(1)
            for prompt_id in shown if len(scores[targets[0]]) > 1 else []:
                one = {t: [group for group in groups if group.prompt_id == prompt_id] for t, groups in scores.items()}
                paths += _length_law(folder, f"length_law_{kind}_prompt_{prompt_id}", one, kind, config)
                advance(1)
        if (run.path / "tables" / "cv.parquet").exists():
            paths += _aggregators(folder, run.table("cv"), targets[-1], shown)
        else:
            listener.say(f"no figure of the aggregators: run `gradvar cv {run.path}` first")
        advance(1)
    return paths


def _length_law(
    folder: Path, stem: str, scores: dict[str, list[PromptScores]], kind: str, config: EstimateConfig
) -> list[Path]:
    figure = panels(len(scores), columns=4)
    for axes, (target, groups) in zip(figure.axes, scores.items(), strict=False):
        _length_panel(axes, target, groups, kind, config)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return save(figure, folder, stem)


def _length_panel(axes: Axes, target: str, groups: Sequence[PromptScores], kind: str, config: EstimateConfig) -> None:
    kept = [group if kind == "score" else group.verified() for group in groups]
    rows = [(group, _deviations(group, kind)) for group in kept if len(group.lengths) >= 3]
    rows = [(group, squares) for group, squares in rows if squares.sum() > 0]
    if not rows:
        axes.set_title(target_label(target))
        axes.text(0.5, 0.5, "every advantage is zero", ha="center", transform=axes.transAxes)
        return
    pooled = len(groups) > 1
    squares = np.concatenate([s / s.mean() if pooled else s for _, s in rows])
    lengths = np.concatenate([group.lengths for group, _ in rows])
    counts = [len(group.lengths) for group, _ in rows]
    clusters = np.repeat(np.arange(len(rows)), counts)
    curve, note = None, ""
    try:
        law = fit_variance_law(
            lengths,
            squares,
            n_centred=np.repeat(counts, counts),
            clusters=clusters if pooled else None,
            margin=config.margin,
            level=config.level,
        )
    except GradvarError as error:
        note = f"no law: {error}"[:60]
    else:
        grid = np.geomspace(lengths.min(), lengths.max(), 60)
        value, low, high = law.mean(grid)
        curve = pd.DataFrame({"length": grid, "value": value, "low": low, "high": high})
        note = f"exponent {law.exponent.value:.2f} [{law.exponent.low:.2f}, {law.exponent.high:.2f}]\n{law.verdict}"
    symbol = "s" if kind == "score" else "g"
    unit = ", prompt mean = 1" if pooled else ""
    plot_length_law(
        axes,
        lengths,
        squares,
        curve=curve,
        rewards=np.concatenate([group.rewards for group, _ in rows]),
        truncated=np.concatenate([group.truncated for group, _ in rows]),
        label=rf"$\|{symbol}_i - \bar {symbol}\|^2${unit}",
        title=target_label(target),
        note=note,
    )


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
        plot_aggregator_cv(axes, part, title=f"{title}, group of {part['group_size'].iloc[0]}")
    return save(figure, folder, "aggregator_cv")
