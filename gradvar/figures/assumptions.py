"""What the theory takes for granted: the audit at a glance, correlation between tokens, growth along responses."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gradvar.figures.estimates import plot_estimates
from gradvar.figures.style import BAND, COLOURS, INK, MUTED, plain_log_ticks

ASSUMPTIONS = {
    0: "rollouts come from this policy",
    1: "token gradients uncorrelated",
    2: "variance proportional to length",
    3: "independent given the baseline",
    4: "mean gradient independent of length",
}
"""Number of an assumption to what it says."""
VERDICT_COLOURS = {
    "supported": COLOURS[2],
    "proportional to length": COLOURS[2],
    "rejected": COLOURS[1],
    "not proportional": COLOURS[1],
}
"""Verdict to colour; others are open."""


def plot_audit(axes: Axes, rows: pd.DataFrame, *, title: str = "") -> None:
    """Plot every judged assumption in units of its margin: inside the band supported, wholly outside rejected.

    Args:
        axes: Where to draw.
        rows: Judged rows of the table `audit`, one a line: assumption, value, low, high, margin_low, margin_high,
            verdict, and `label` where the assumption's own words are not to be used. A margin with one end counts
            from 0.
        title: Above the panel.
    """
    low, high = rows["margin_low"].astype(float), rows["margin_high"].astype(float)
    centre = ((low + high) / 2).where(np.isfinite(low) & np.isfinite(high), 0.0)
    unit = (high - centre).where(np.isfinite(high), centre - low)
    scaled = rows.assign(**{name: (rows[name].astype(float) - centre) / unit for name in ("value", "low", "high")})
    if "label" not in scaled:
        scaled = scaled.assign(label=[f"{n} {ASSUMPTIONS.get(int(n), '')}" for n in scaled["assumption"]])
    verdicts = scaled["verdict"].fillna("").astype(str)
    colours = {name: VERDICT_COLOURS.get(v, MUTED) for name, v in zip(scaled["label"], verdicts, strict=True)}
    plot_estimates(
        axes, scaled, by="label", colours=colours, line=0.0, band=(-1.0, 1.0), label="distance from what is assumed, "
        "in margins", title=title,
    )  # fmt: skip


def plot_token_covariance(axes: Axes, rows: pd.DataFrame, *, margin: float = 0.1, title: str = "") -> None:
    """Plot the share of the squared score norm that comes from pairs of different tokens, by length and reward.

    Args:
        axes: Where to draw.
        rows: Rows of one prompt (or pooled) and target: scope ("all responses", "reward 1, length bin 1 of 2"), value,
            low, high, length_low, length_high in tokens.
        margin: The share is called 0 inside it.
        title: Above the panel.
    """
    axes.axhspan(-margin, margin, color=BAND, alpha=0.6, linewidth=0)
    axes.axhline(0.0, color=INK, linewidth=0.9, linestyle="--")
    classes = rows["scope"].astype(str).str.split(",").str[0]
    order = list(dict.fromkeys(classes))
    for name, part in rows.assign(of=classes).groupby("of", sort=False):
        colour = INK if name == "all responses" else COLOURS[order.index(str(name)) % len(COLOURS)]
        for place, row in enumerate(part.to_dict("records")):
            ends = [max(float(row["length_low"]), 1.0), max(float(row["length_high"]), 1.0)]
            middle = float(np.sqrt(ends[0] * ends[1])) * 1.06 ** order.index(str(name))
            label = str(name) if place == 0 else None
            axes.plot(ends, [row["value"]] * 2, color=colour, linewidth=1.6, label=label)
            axes.plot([middle] * 2, [row["low"], row["high"]], color=colour, linewidth=1.1)
            axes.plot([middle], [row["value"]], "o", color=colour, markersize=4.5)
    axes.set_xscale("log")
    plain_log_ticks(axes, float(rows["length_low"].min()), float(rows["length_high"].max()))
    axes.set_xlabel("response length (tokens)")
    axes.set_ylabel("share from pairs of tokens")
    axes.set_title(title, parse_math=False)


def plot_prefix_curves(
    axes: Axes,
    prefix_lengths: NDArray[np.float64],
    prefix_squares: NDArray[np.float64],
    *,
    most: int = 60,
    title: str = "",
    note: str = "",
) -> None:
    """Plot the squared score norm of each response's prefixes against their length, whole responses as points.

    Args:
        axes: Where to draw.
        prefix_lengths: (N, k) tokens, rising along each response; NaN where a response has fewer.
        prefix_squares: (N, k) ||s_i^(1..l)||^2, the last of the whole response; zeros are not drawn.
        most: Responses drawn, evenly by length.
        title: Above the panel.
        note: One line inside the panel: the exponents.
    """
    lengths, squares = np.asarray(prefix_lengths, dtype=np.float64), np.asarray(prefix_squares, dtype=np.float64)
    order = np.argsort(np.nanmax(lengths, axis=1))
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))]
    ends: list[tuple[float, float]] = []
    for place, i in enumerate(chosen):
        held = np.isfinite(squares[i]) & (squares[i] > 0) & np.isfinite(lengths[i])
        if not held.any():
            continue
        name = "along one response" if place == 0 else None
        axes.plot(lengths[i][held], squares[i][held], color=COLOURS[5], linewidth=0.8, alpha=0.55, label=name)
        ends.append((float(lengths[i][held][-1]), float(squares[i][held][-1])))
    if ends:
        axes.plot(
            *zip(*ends, strict=True), "o", color=COLOURS[0], markersize=3, linestyle="none", label="whole responses"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log_ticks(axes, float(np.nanmin(lengths)), float(np.nanmax(lengths)))
    axes.set_xlabel("tokens so far")
    axes.set_ylabel(r"$\|s_i^{(1..l)}\|^2$")
    axes.set_title(title, parse_math=False)
    if note:
        axes.text(0.03, 0.97, note, transform=axes.transAxes, va="top", fontsize=8)
