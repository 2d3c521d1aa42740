"""Noise and efficiency against group size."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gradvar.figures.style import COLOURS, INK, MUTED

_Y = {"cv": "CV of one update", "eta": "efficiency η of one update"}


def plot_group_size(axes: Axes, rows: pd.DataFrame, *, quantity: str = "cv", title: str = "") -> None:
    """Plot one rule's CV or efficiency against the size of the group; extrapolated sizes hollow, joined by dashes.

    Args:
        axes: Where to draw.
        rows: Rows of the table `planning` of one prompt (or pooled) and target. An unresolved CV is an arrow up from
            its lower end.
        quantity: "cv" or "eta".
        title: Above the panel.
    """
    chosen = rows[(rows["quantity"] == quantity) & rows["group_size"].notna()].sort_values("group_size")
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("responses in the group")
    axes.set_ylabel(_Y[quantity])
    if chosen["value"].isna().all() and chosen["low"].isna().all():
        axes.text(0.5, 0.5, "unresolved:\nno signal above the noise", ha="center", transform=axes.transAxes, fontsize=8)
        return
    axes.set_xscale("log", base=2)
    if quantity == "cv":
        axes.set_yscale("log")
        axes.axhline(1.0, color=INK, linewidth=0.9, linestyle="--", label="CV 1: noise as large as the signal")
    finite = [*chosen["value"].dropna(), *chosen["low"].replace(-np.inf, np.nan).dropna()]
    top = 1.6 * max(finite)
    for far, part in chosen.groupby(chosen["verdict"] == "extrapolated"):
        colour = MUTED if far else COLOURS[0]
        known = part[part["value"].notna()]
        low = (known["value"] - known["low"]).fillna(0).clip(lower=0)
        high = (known["high"].replace(np.inf, np.nan).fillna(top) - known["value"]).clip(lower=0)
        if len(known):
            axes.errorbar(
                known["group_size"].astype(float),
                known["value"],
                yerr=[low, high],
                color=colour,
                marker="o",
                markerfacecolor="none" if far else colour,
                linestyle="--" if far else "-",
                linewidth=1.3,
                capsize=2.5,
                label="extrapolated" if far else "estimated",
            )
        for row in part[part["value"].isna() & np.isfinite(part["low"])].to_dict("records"):
            at = float(row["group_size"])
            axes.plot([at, at], [row["low"], top], color=colour, linestyle=":", linewidth=1.3)
            axes.plot([at], [top], "^", color=colour, markersize=5)
    sizes = [int(size) for size in chosen["group_size"]]
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    if quantity == "cv":
        _plain_ticks(axes)
    else:
        axes.set_ylim(bottom=0.0)


def _plain_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    ticks = [m * 10.0**e for e in range(-3, 5) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
