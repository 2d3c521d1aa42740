"""Deviation against length: the paper's figure 4, with the fitted law and its band."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gradvar.figures.style import COLOURS, INK, MUTED, plain_log_ticks


def plot_length_law(
    axes: Axes,
    lengths: NDArray[np.float64],
    squares: NDArray[np.float64],
    *,
    curve: pd.DataFrame | None = None,
    rewards: NDArray[np.float64] | None = None,
    truncated: NDArray[np.bool_] | None = None,
    label: str = "deviation",
    title: str = "",
    note: str = "",
) -> None:
    """Plot one quantity of each response against its length, on logarithmic axes.

    Args:
        axes: Where to draw.
        lengths: (N,) tokens.
        squares: (N,) squared norms, for example ||g_i - mean g||^2; points at 0 or below cannot be drawn and are
            counted in the panel.
        curve: The fitted mean of the quantity: columns length, value, low, high.
        rewards: (N,) colours the points by right (above 0) and wrong; NaN is unverified.
        truncated: (N,) responses cut by the limit are drawn hollow.
        label: Name of the quantity on the y axis.
        title: Above the panel.
        note: One line inside the panel: the exponent and its interval.
    """
    drawn = np.isfinite(squares) & (squares > 0)
    classes = reward_classes(rewards, len(lengths))
    cut = np.zeros(len(lengths), dtype=bool) if truncated is None else truncated
    for name, (members, colour, marker) in classes.items():
        for hollow in (False, True):
            rows = drawn & members & (cut == hollow)
            if not rows.any():
                continue
            axes.scatter(
                lengths[rows],
                squares[rows],
                s=13,
                marker=marker,
                alpha=0.65,
                linewidths=0.8,
                facecolors="none" if hollow else colour,
                edgecolors=colour if hollow else "none",
                label=f"{name}, truncated" if hollow else name,
            )
    if curve is not None and len(curve):
        axes.plot(curve["length"], curve["value"], color=INK, linewidth=1.4, label="fitted mean and band")
        axes.fill_between(curve["length"], curve["low"], curve["high"], color=INK, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log_ticks(axes, float(lengths.min()), float(lengths.max()))
    axes.set_xlabel("response length (tokens)")
    axes.set_ylabel(label)
    axes.set_title(title, parse_math=False)
    left_out = int(np.sum(~drawn))
    lines = [note] if note else []
    if left_out:
        lines.append(f"{left_out} responses at 0 not drawn")
    if lines:
        axes.text(0.03, 0.97, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=8)


def reward_classes(rewards: NDArray[np.float64] | None, count: int) -> dict[str, tuple[NDArray[np.bool_], str, str]]:
    """Return members, colour and marker of each reward class: above 0, not above 0, unverified."""
    if rewards is None:
        return {"responses": (np.ones(count, dtype=bool), COLOURS[0], "o")}
    return {
        "rewarded": (rewards > 0, COLOURS[0], "o"),
        "not rewarded": (rewards <= 0, COLOURS[1], "^"),
        "unverified": (np.isnan(rewards), MUTED, "s"),
    }
