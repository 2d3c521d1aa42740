"""The paper's assumptions, each with its figure, interval, margin and verdict, on the sum of targets."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analyses.script import main, overall, whole_target
from gradvar import Run
from gradvar.figures import panels
from gradvar.figures.style import COLOURS, MUTED

JUDGED = {
    "identity_signal": "0  rollouts come from this policy\nshare of E s in the noise",
    "token_covariance_share": "1  token gradients uncorrelated\nshare off the diagonal",
    "deviation_exponent": "2  variance proportional to length\nexponent of the deviation",
    "within_exponent": "2  variance proportional to length\nexponent within length",
    "baseline_ratio": "3  responses independent\nvariance ratio",
    "between_length_share": "4  mean gradient free of length\nshare between lengths",
}
"""Judged quantities, and how they are shown."""


def compute(run: Run) -> pd.DataFrame:
    """Return assumption, quantity, scope, value, low, high, margin_low, margin_high, verdict, n_needed, n, clusters."""
    table = run.table("audit")
    table = overall(table[table["target"] == whole_target(run)])
    columns = ["assumption", "quantity", "scope", "value", "low", "high", "margin_low", "margin_high", "verdict"]
    return table[[*columns, "n_needed", "n", "clusters"]].reset_index(drop=True)


def draw(data: pd.DataFrame) -> Figure:
    """Draw a panel an assumption: the interval against the margin."""
    shown = [name for name in JUDGED if data.loc[data["quantity"] == name, "value"].notna().any()]
    figure = panels(len(shown), columns=1)
    figure.set_size_inches(7, 0.95 * len(shown) + 0.3)
    for axes, name in zip(figure.axes, shown, strict=True):
        rows = data[(data["quantity"] == name) & data["value"].notna()]
        row = rows.iloc[0]
        ends = [row["low"], row["high"], row["margin_low"], row["margin_high"], row["value"]]
        finite = [end for end in ends if pd.notna(end) and abs(end) < 1e6]
        pad = 0.15 * (max(finite) - min(finite)) or 1.0
        axes.set_xlim(min(finite) - pad, max(finite) + pad)
        left, right = axes.get_xlim()
        axes.axvspan(
            max(row["margin_low"], left), min(row["margin_high"], right), color="#dddddd", alpha=0.7, linewidth=0
        )
        axes.plot([row["low"], row["high"]], [0, 0], color=COLOURS[0], linewidth=2.4)
        axes.plot(row["value"], 0, "o", color=COLOURS[0], markersize=5)
        axes.set_ylim(-1, 1)
        axes.set_yticks([0], [JUDGED[name]], fontsize=8)
        axes.text(1.01, 0.5, row["verdict"], transform=axes.transAxes, va="center", fontsize=8.5, color=MUTED)
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, compute, draw)
