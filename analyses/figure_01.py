"""Figure 1: lengths and what they do to the variance (left); bias against CV of every aggregator, measured (right)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from analyses.script import concat, main, overall, spread_of, whole_target
from gradvar import Run
from gradvar.figures import panels, plot_bias_noise
from gradvar.figures.style import COLOURS, MUTED

BINS = 10


def compute(run: Run) -> pd.DataFrame:
    """Return responses in `BINS` classes of length, and every rule with its CV and its bias.

    Columns: series ("histogram", "length class", "aggregator"); for the first two length_low, length_high (tokens) and
    responses, for a class value (mean deviation of the score over its prompt's mean) with low and high (1.96 standard
    errors); for an aggregator quantity ("cv", "cosine" of E ghat and grad J: 1 is unbiased in direction), rule, alpha,
    value, low, high.
    """
    target = whole_target(run)
    groups = run.scores(target)
    lengths = np.concatenate([scores.lengths for scores in groups])
    spread = np.concatenate([(d := spread_of(scores, "score")) / d.mean() for scores in groups])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, BINS + 1)))
    place = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, len(edges) - 2)
    rows = []
    for index in range(len(edges) - 1):
        mine = spread[place == index]
        if len(mine) < 2:
            continue
        half = 1.96 * mine.std(ddof=1) / np.sqrt(len(mine))
        rows.append(
            {
                "series": "length class",
                "length_low": edges[index],
                "length_high": edges[index + 1],
                "length": lengths[place == index].mean(),
                "responses": len(mine),
                "value": mine.mean(),
                "low": mine.mean() - half,
                "high": mine.mean() + half,
            }
        )
    counts, sides = np.histogram(np.log(lengths), bins=24)
    histogram = pd.DataFrame(
        {
            "series": "histogram",
            "length_low": np.exp(sides[:-1]),
            "length_high": np.exp(sides[1:]),
            "responses": counts,
        }
    )
    return concat([histogram, pd.DataFrame(rows), _aggregators(run, target)])


def _aggregators(run: Run, target: str) -> pd.DataFrame:
    parts = [("cv", run.table("cv")), ("cosine", run.table("alpha"))]
    rows = [overall(table[(table["target"] == target) & (table["quantity"] == name)]) for name, table in parts]
    kept = pd.concat(rows, ignore_index=True)
    kept = kept[kept["rule"].notna()]
    return kept[["quantity", "rule", "alpha", "value", "low", "high"]].assign(series="aggregator")


def draw(data: pd.DataFrame) -> Figure:
    """Draw both panels."""
    figure = panels(2, columns=2)
    figure.set_size_inches(9.4, 3.7)
    left, right = figure.axes
    classes = data[data["series"] == "length class"]
    middle = classes["length"]
    left.errorbar(
        middle,
        classes["value"],
        yerr=[classes["value"] - classes["low"], classes["high"] - classes["value"]],
        fmt="o",
        color=COLOURS[0],
        markersize=4,
        linewidth=1.2,
        label="mean of a tenth of the responses",
    )
    grid = np.geomspace(middle.min(), middle.max(), 50)
    total = (classes["value"] * classes["responses"]).sum() / (middle * classes["responses"]).sum()
    left.plot(grid, total * grid, color=MUTED, linestyle="--", linewidth=1.2, label="proportional to length")
    bars = data[data["series"] == "histogram"]
    under = left.twinx()
    under.bar(
        bars["length_low"],
        bars["responses"],
        width=bars["length_high"] - bars["length_low"],
        align="edge",
        color="#dddddd",
        linewidth=0,
    )
    under.set_ylim(0, 3.5 * bars["responses"].max())
    under.set_yticks([])
    under.spines["right"].set_visible(False)
    under.grid(visible=False)
    left.set_zorder(under.get_zorder() + 1)
    left.patch.set_visible(False)
    left.set_xlim(0.8 * middle.min(), 1.3 * bars["length_high"].max())
    left.set_xscale("log")
    left.set_yscale("log")
    for axis, values in ((left.xaxis, middle), (left.yaxis, classes[["low", "high"]].stack())):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 100 * values.min() else (1,)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    left.set_xlabel("response length (tokens)")
    left.set_ylabel(r"$\|s_i - \bar s\|^2$ over its prompt's mean")
    left.set_title("variance of the score gradient; grey: number of responses")
    left.legend(loc="upper left")
    rules = data[data["series"] == "aggregator"]
    cosines, noise = (rows.drop(columns="quantity") for _, rows in rules.groupby("quantity"))
    plot_bias_noise(right, cosines, noise, title="bias and noise of one update; lines of equal efficiency")
    right.legend(loc="lower left")
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, compute, draw)
