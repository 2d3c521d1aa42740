"""Exponents of the variance law beside each other: targets, reward classes, prompts."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from gradvar.figures.estimates import plot_estimates
from gradvar.runs.records import target_label

WHAT = {"deviation_exponent": "deviation from the mean", "within_exponent": "within-length variance"}


def plot_exponents(
    axes: Axes, rows: pd.DataFrame, *, by: str = "target", margin: float = 0.25, title: str = ""
) -> None:
    """Plot fitted exponents with their intervals; the band is the margin around proportionality.

    Args:
        axes: Where to draw.
        rows: Rows of the table `law` that differ in `by` and in quantity ("deviation_exponent", "within_exponent").
        by: Column on the y axis: "target", "scope" (reward classes), "prompt_id", "advantage".
        margin: How far from 1 still counts as proportional.
        title: Above the panel.
    """
    chosen = rows[rows["quantity"].isin(WHAT)]
    labels = chosen[by].map(target_label) if by == "target" else chosen[by].astype(str)
    plot_estimates(
        axes,
        chosen.assign(label=labels, what=chosen["quantity"].map(WHAT)),
        by="label",
        series="what",
        line=1.0,
        band=(1 - margin, 1 + margin),
        label="exponent of variance against length",
        title=title,
    )
