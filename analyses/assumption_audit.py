"""The paper's assumptions, each with its figure, interval, margin and verdict, on the sum of targets."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analyses.script import main, overall, whole_target
from gradvar import Run
from gradvar.figures import ASSUMPTIONS, panels, plot_audit


def compute(run: Run) -> pd.DataFrame:
    """Return assumption, quantity, scope, value, low, high, margin_low, margin_high, verdict, n_needed, n, clusters."""
    table = run.table("audit")
    table = overall(table[table["target"] == whole_target(run)])
    columns = ["assumption", "quantity", "scope", "value", "low", "high", "margin_low", "margin_high", "verdict"]
    return table[[*columns, "n_needed", "n", "clusters"]].reset_index(drop=True)


def draw(data: pd.DataFrame) -> Figure:
    """Draw every judged assumption in units of its margin."""
    judged = data[data["margin_high"].notna() & data["value"].notna() & (data["scope"] == "all responses")]
    words = {"deviation_exponent": ", from the mean", "within_exponent": ", within length"}
    names = [
        f"{n} {ASSUMPTIONS[n]}{words.get(q, '')}" for n, q in zip(judged["assumption"], judged["quantity"], strict=True)
    ]
    figure = panels(1)
    figure.set_size_inches(7.5, 0.9 + 0.36 * len(judged))
    plot_audit(figure.axes[0], judged.assign(label=names))
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, compute, draw)
