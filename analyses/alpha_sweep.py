"""CV, bias and efficiency of VL Norm against alpha: what the paper's table 3 asks of training, asked of gradients."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analyses.script import main, overall, whole_target
from gradvar import Run
from gradvar.estimators import cv_table
from gradvar.estimators.alpha_tables import ALPHA_GRID
from gradvar.figures import panels
from gradvar.figures.aggregators import RULE_COLOURS
from gradvar.figures.style import MUTED

SHOWN = {"cv": "total CV", "bias": r"bias: $1 - \cos(E\hat g, \nabla J)$", "eta": "efficiency"}


def compute(run: Run) -> pd.DataFrame:
    """Return quantity ("cv", "bias", "eta"), rule, alpha, value, low, high, over all prompts."""
    config = run.options("alpha")
    target = whole_target(run)
    noise = cv_table(
        run.scores(target),
        rules=config.rules,
        alphas=ALPHA_GRID,
        group_size=config.group_size,
        advantage=config.advantage,
        level=config.level,
        seed=config.seed,
    )
    table = pd.concat([overall(noise), overall(run.table("alpha").query("target == @target"))], ignore_index=True)
    rows = table[table["quantity"].isin(["cv", "cosine", "eta"]) & table["rule"].notna()]
    rows = rows[["quantity", "rule", "alpha", "value", "low", "high"]].reset_index(drop=True)
    angle = rows["quantity"] == "cosine"
    rows.loc[angle, ["value", "low", "high"]] = 1 - rows.loc[angle, ["value", "high", "low"]].to_numpy()
    return rows.replace({"quantity": {"cosine": "bias"}})


def draw(data: pd.DataFrame) -> Figure:
    """Draw a panel a quantity: VL Norm as a curve with its band, the other rules as level lines."""
    figure = panels(len(SHOWN), columns=3)
    for axes, (quantity, label) in zip(figure.axes, SHOWN.items(), strict=True):
        rows = data[data["quantity"] == quantity]
        curve = rows[rows["rule"] == "vl_norm"].sort_values("alpha")
        colour = RULE_COLOURS["vl_norm"]
        axes.plot(curve["alpha"], curve["value"], color=colour, linewidth=1.6, label="vl_norm")
        axes.fill_between(curve["alpha"], curve["low"], curve["high"], color=colour, alpha=0.18, linewidth=0)
        for _, row in rows[rows["alpha"].isna()].iterrows():
            shade = RULE_COLOURS.get(str(row["rule"]), MUTED)
            axes.axhline(row["value"], color=shade, linestyle="--", linewidth=1.2, label=str(row["rule"]))
        ends = rows[["value", "low", "high"]].replace(np.inf, np.nan).to_numpy()
        if curve["value"].notna().any():
            axes.set_ylim(min(0.0, float(np.nanmin(ends))), 1.05 * float(np.nanmax(ends)))
        else:
            axes.text(0.5, 0.5, "unresolved:\nno signal above the noise", ha="center", transform=axes.transAxes)
        axes.set_xlabel("alpha")
        axes.set_ylabel(label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, compute, draw)
