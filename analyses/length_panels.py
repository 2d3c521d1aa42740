"""Deviation against length for some prompts and targets: what figures 4, 10 and 11 of the paper share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analyses.script import advantage_of, concat, one_prompt, spread_of
from gradvar import Run, fit_variance_law
from gradvar.figures import panels, plot_length_law
from gradvar.runs import target_label

GRID = 40


def length_data(run: Run, prompt_ids: Sequence[str], targets: Sequence[str]) -> pd.DataFrame:
    """Return responses and fitted curves, one row a response or a point of a curve.

    Columns: prompt_id, target, gradient ("score" or the advantage), series ("response", "fitted mean of the
    deviation"), rollout_id, length (tokens), reward, truncated, value (squared norm), low, high (band), exponent,
    exponent_low, exponent_high, verdict.
    """
    parts = []
    for prompt_id in prompt_ids:
        for target in targets:
            for kind in dict.fromkeys(("score", advantage_of(run))):
                parts += _panel(run, prompt_id, target, kind)
    return concat(parts)


def _panel(run: Run, prompt_id: str, target: str, kind: str) -> list[pd.DataFrame]:
    scores = one_prompt(run, target, prompt_id)
    ids = np.arange(len(scores.lengths))
    if kind != "score":
        ids, scores = ids[~np.isnan(scores.rewards)], scores.verified()
    values, n = spread_of(scores, kind), len(scores.lengths)
    law = fit_variance_law(scores.lengths, values, n_centred=n)
    grid = np.geomspace(scores.lengths.min(), scores.lengths.max(), GRID)
    floor = values.sum() / (n - 1) / n  # the noise of the mean gradient: mu = (1 - 2/N) v(L) + vbar/N
    middle, low, high = ((1 - 2 / n) * part + floor for part in law.mean(grid))
    labels = {"prompt_id": prompt_id, "target": target, "gradient": kind}
    points = {
        "series": "response",
        "rollout_id": ids,
        "length": scores.lengths,
        "reward": scores.rewards,
        "truncated": scores.truncated,
        "value": values,
    }
    fitted = {"series": "fitted mean of the deviation", "length": grid, "value": middle, "low": low, "high": high}
    beta = law.exponent
    found = {
        "exponent": beta.value,
        "exponent_low": beta.low,
        "exponent_high": beta.high,
        "verdict": law.verdict,
    }
    return [pd.DataFrame({**labels, **points}), pd.DataFrame({**labels, **fitted, **found})]


def draw_lengths(data: pd.DataFrame, *, columns: int) -> Figure:
    """Draw one panel for every prompt, gradient and target, `columns` in a row."""
    kinds = data["gradient"].unique()
    prompts = data["prompt_id"].unique()
    shown = [(prompt, kind, target) for prompt in prompts for kind in kinds for target in data["target"].unique()]
    figure = panels(len(shown), columns=columns)
    for axes, (prompt, kind, target) in zip(figure.axes, shown, strict=False):
        rows = data[(data["prompt_id"] == prompt) & (data["gradient"] == kind) & (data["target"] == target)]
        points, curve = rows[rows["series"] == "response"], rows[rows["series"] != "response"]
        fit = curve.iloc[0]
        symbol = "s" if kind == "score" else "g"
        plot_length_law(
            axes,
            points["length"].to_numpy(),
            points["value"].to_numpy(),
            curve=curve,
            rewards=points["reward"].to_numpy(),
            truncated=points["truncated"].to_numpy(dtype=bool),
            label=rf"$\|{symbol}_i - \bar {symbol}\|^2$" + ("" if kind == "score" else f", {kind} advantages"),
            title=f"prompt {prompt}, {target_label(target)}",
            note=f"exponent {fit['exponent']:.2f} [{fit['exponent_low']:.2f}, {fit['exponent_high']:.2f}]\n"
            f"{fit['verdict']}",
        )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return figure
