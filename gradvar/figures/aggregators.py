"""The coefficient of variation of each aggregator, with intervals; unresolved ones shown as open-ended."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gradvar.figures.style import COLOURS, MUTED

RULE_COLOURS = {"grpo": COLOURS[0], "dapo": COLOURS[1], "dr_grpo": COLOURS[3], "vl_norm": COLOURS[2]}


def rule_label(rule: str, alpha: float | None) -> str:
    """Return an aggregator's name for people, with alpha where it has one."""
    return rule if alpha is None or np.isnan(alpha) else f"{rule} α={alpha:g}"


def plot_aggregator_cv(axes: Axes, rows: pd.DataFrame, *, title: str = "") -> None:
    """Plot the CV of each aggregator of one target with its interval.

    Args:
        axes: Where to draw.
        rows: Rows of the table `cv` with one quantity, prompt and target: rule, alpha, value, low, high. A NaN value is
            unresolved: an arrow from its lower bound says that the CV lies above it.
        title: Above the panel.
    """
    rows = rows.reset_index(drop=True)
    finite = rows["value"].dropna()
    ends = [*finite, *rows["low"].dropna(), *rows["high"].replace(np.inf, np.nan).dropna()]
    right = 1.08 * max(ends) if ends else 1.0
    for index, row in rows.iterrows():
        position = float(str(index))
        colour = RULE_COLOURS.get(str(row["rule"]), MUTED)
        low = float(row["low"]) if np.isfinite(row["low"]) else float("nan")
        if np.isfinite(row["value"]):
            high = float(row["high"]) if np.isfinite(row["high"]) else right
            axes.plot([low, high], [position, position], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot([row["value"]], [position], "o", color=colour, markersize=5.5)
            if not np.isfinite(row["high"]) and np.isfinite(low):
                axes.plot([right], [position], ">", color=colour, markersize=5, clip_on=False)
        elif np.isfinite(low):
            axes.plot([low, right], [position, position], color=colour, linewidth=1.2, linestyle=":")
            axes.plot([low], [position], "|", color=colour, markersize=9)
            axes.text(right, position, "unresolved ", ha="right", va="bottom", fontsize=7, color=MUTED)
        else:
            axes.text(0.5, position, "unresolved", va="center", fontsize=7, color=MUTED)
    labels = [rule_label(str(r), a) for r, a in zip(rows["rule"], rows["alpha"], strict=True)]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, right)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("total CV of the aggregated update")
    axes.set_title(title)


def plot_alpha_curve(axes: Axes, rows: pd.DataFrame, *, title: str = "") -> None:
    """Plot the efficiency of vl_norm over alpha with its band, the other rules as level lines.

    Args:
        axes: Where to draw.
        rows: Rows of the table `alpha` of one target and prompt (or pooled): quantity, rule, alpha, value, low, high.
            The alphas not told apart from the best are shaded.
        title: Above the panel.
    """
    eta = rows[(rows["quantity"] == "eta") & rows["rule"].notna()]
    curve = eta[eta["alpha"].notna()].sort_values("alpha")
    axes.set_title(title)
    axes.set_xlabel("alpha")
    axes.set_ylabel("efficiency of one update")
    if curve["value"].isna().all():
        axes.text(0.5, 0.5, "unresolved:\nno signal above the noise", ha="center", transform=axes.transAxes, fontsize=8)
        return
    best = rows[(rows["quantity"] == "alpha_star_eta") & rows["value"].notna()]
    if len(best):
        low, high = float(best["low"].iloc[0]), float(best["high"].iloc[0])
        axes.axvspan(low, high, color="#dddddd", alpha=0.6, linewidth=0, label="not told apart from the best")
    axes.plot(curve["alpha"], curve["value"], color=RULE_COLOURS["vl_norm"], linewidth=1.6, label="vl_norm")
    axes.fill_between(
        curve["alpha"], curve["low"], curve["high"], color=RULE_COLOURS["vl_norm"], alpha=0.18, linewidth=0
    )
    for _, row in eta[eta["alpha"].isna()].iterrows():
        colour = RULE_COLOURS.get(str(row["rule"]), MUTED)
        axes.axhline(row["value"], color=colour, linewidth=1.2, linestyle="--", label=str(row["rule"]))
    axes.set_ylim(bottom=min(0.0, *curve["low"].dropna()))
