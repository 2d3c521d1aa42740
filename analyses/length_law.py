"""The exponent of the variance against length, across targets, layers and prompts."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analyses.script import main
from gradvar import Run
from gradvar.figures import panels
from gradvar.figures.style import COLOURS, MUTED, PANEL
from gradvar.runs import target_label

SHOWN = {"deviation_exponent": "deviation from the mean", "within_exponent": "within-length variance"}


def compute(run: Run) -> pd.DataFrame:
    """Return prompt_id (empty: all), target, advantage, quantity, value, low, high, verdict, n, clusters."""
    law = run.table("law")
    rows = law[law["quantity"].isin(SHOWN) & (law["scope"] == "all responses")]
    rows = rows[rows["prompt_id"].notna() | (rows["estimand"] == "these prompts")]
    columns = ["prompt_id", "target", "advantage", "quantity", "value", "low", "high", "verdict", "n", "clusters"]
    return rows[columns].sort_values(["target", "advantage", "quantity"], kind="stable", ignore_index=True)


def draw(data: pd.DataFrame) -> Figure:
    """Draw a panel a quantity and gradient: a line a target, prompts as small marks beside the pooled exponent."""
    kinds = [(quantity, kind) for quantity in SHOWN for kind in data["advantage"].unique()]
    targets = list(data["target"].unique())[::-1]
    figure = panels(len(kinds), columns=len(kinds))
    figure.set_size_inches(PANEL[0] * len(kinds), 1.2 + 0.3 * len(targets))
    for axes, (quantity, kind) in zip(figure.axes, kinds, strict=True):
        rows = data[(data["quantity"] == quantity) & (data["advantage"] == kind)]
        for place, target in enumerate(targets):
            mine = rows[rows["target"] == target]
            singles = mine[mine["prompt_id"].notna()]
            axes.plot(singles["value"], [place] * len(singles), "|", color=MUTED, markersize=7)
            for _, row in mine[mine["prompt_id"].isna()].iterrows():
                axes.plot([row["low"], row["high"]], [place, place], color=COLOURS[0], linewidth=2)
                axes.plot(row["value"], place, "o", color=COLOURS[0], markersize=4.5)
        axes.axvspan(0.75, 1.25, color="#dddddd", alpha=0.6, linewidth=0)
        axes.axvline(1, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(targets)), [target_label(t) for t in targets] if axes is figure.axes[0] else [])
        middle = data["value"].dropna()
        axes.set_xlim(min(0.0, float(middle.quantile(0.02))), max(2.0, float(middle.quantile(0.98))))
        axes.set_xlabel("exponent")
        gradient = "score" if kind == "score" else f"{kind} advantages"
        axes.set_title(f"{SHOWN[quantity]}, {gradient}")
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, compute, draw)
