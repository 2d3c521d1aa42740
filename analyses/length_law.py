"""The exponent of the variance against length, across targets, layers and prompts."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analyses.script import main
from gradvar import Run
from gradvar.figures import panels, plot_exponents
from gradvar.figures.style import PANEL
from gradvar.runs import target_label

QUANTITIES = ("deviation_exponent", "within_exponent")


def compute(run: Run) -> pd.DataFrame:
    """Return prompt_id (empty: all), target, advantage, quantity, value, low, high, verdict, n, clusters."""
    law = run.table("law")
    rows = law[law["quantity"].isin(QUANTITIES) & (law["scope"] == "all responses")]
    rows = rows[rows["prompt_id"].notna() | (rows["estimand"] == "these prompts")]
    columns = ["prompt_id", "target", "advantage", "quantity", "value", "low", "high", "verdict", "n", "clusters"]
    return rows[columns].sort_values(["target", "advantage", "quantity"], kind="stable", ignore_index=True)


def draw(data: pd.DataFrame) -> Figure:
    """Draw targets over all prompts (left), and prompts on all targets together (right); a row a gradient."""
    kinds = data["advantage"].unique()
    sides = {"target": data[data["prompt_id"].isna()], "prompt_id": data[data["prompt_id"].notna()]}
    last = data["target"].iloc[-1] if "sum" not in set(data["target"]) else "sum"
    sides["prompt_id"] = sides["prompt_id"][sides["prompt_id"]["target"] == last]
    if sides["target"].empty:  # one prompt alone
        sides["target"] = data
    figure = panels(2 * len(kinds), columns=2)
    tallest = max(rows[by].nunique() for by, rows in sides.items())
    figure.set_size_inches(2.4 * PANEL[0], len(kinds) * (0.9 + 0.34 * tallest))
    places = iter(figure.axes)
    for kind in kinds:
        name = "score" if kind == "score" else f"{kind} advantages"
        for by, rows in sides.items():
            title = f"{name}, all prompts" if by == "target" else f"{name}, {target_label(last)}, by prompt"
            plot_exponents(next(places), rows[rows["advantage"] == kind], by=by, title=title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, compute, draw)
