"""Estimates with their intervals, one line each: the body of most figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gradvar.figures.style import BAND, COLOURS, INK, MUTED

FAR = 2.0
"""Intervals are drawn at most this many times the values' own extent beyond them; an arrow says they go on."""
UNDETERMINED = ("undetermined", "unresolved", "extrapolated")


def plot_estimates(
    axes: Axes,
    rows: pd.DataFrame,
    *,
    by: str,
    series: str | None = None,
    colours: Mapping[str, str] | None = None,
    line: float | None = None,
    band: tuple[float, float] | None = None,
    bottom: float | None = None,
    label: str = "",
    title: str = "",
) -> None:
    """Plot estimates as points with intervals, one below the other.

    A point is hollow where the verdict is open. A NaN value with a finite lower end is unresolved: a dotted line from
    that end. An interval that goes beyond the panel ends in an arrow.

    Args:
        axes: Where to draw.
        rows: Columns value, low, high, the columns `by` and `series`, and verdict where there is one.
        by: Column whose values stand on the y axis, in the rows' order.
        series: Column whose values are told apart by colour, beside each other on one line.
        colours: Colour of each series, or of each line where there is no series.
        line: A reference value.
        band: A margin, shaded.
        bottom: Where the x axis starts; None chooses.
        label: Of the x axis.
        title: Above the panel.
    """
    lines = list(dict.fromkeys(rows[by].astype(str)))
    groups = [""] if series is None else list(dict.fromkeys(rows[series].astype(str)))
    left, right = _span(rows, [v for v in (line, *(band or ())) if v is not None], bottom)
    if band is not None:
        axes.axvspan(max(band[0], left), min(band[1], right), color=BAND, alpha=0.6, linewidth=0)
    if line is not None:
        axes.axvline(line, color=INK, linewidth=0.9, linestyle="--")
    for place, group in enumerate(groups if series is not None else []):
        colour = (colours or {}).get(group, COLOURS[place % len(COLOURS)])
        axes.plot([], [], "o-", color=colour, markersize=5.5, linewidth=2.2, label=group)
    for row in rows.to_dict("records"):
        group = "" if series is None else str(row[series])
        key = str(row[by]) if series is None else group
        place = groups.index(group)
        colour = (colours or {}).get(key, COLOURS[place % len(COLOURS)])
        shift = 0.0 if len(groups) == 1 else 0.5 * (place / (len(groups) - 1) - 0.5)
        _one(axes, row, lines.index(str(row[by])) + shift, colour, (left, right))
    axes.set_yticks(range(len(lines)), lines, parse_math=False)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(left, right)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    axes.set_title(title, parse_math=False)


def _one(axes: Axes, row: Mapping[Any, Any], at: float, colour: str, span: tuple[float, float]) -> None:
    left, right = span
    value, low, high = (float(str(row[k])) for k in ("value", "low", "high"))
    if np.isnan(value):
        if np.isfinite(low):
            axes.plot([max(low, left), right], [at, at], color=colour, linewidth=1.2, linestyle=":")
            axes.plot([max(low, left)], [at], "|", color=colour, markersize=9)
            _arrow(axes, right, at, ">", colour)
            words = "unresolved  " if str(row.get("verdict")) in (*UNDETERMINED, "None", "nan") else "at least this  "
            axes.text(right, at, words, ha="right", va="bottom", fontsize=7, color=MUTED)
        else:
            words = "unresolved" if str(row.get("verdict")).startswith("unresolved") else "not estimated"
            axes.text((left + right) / 2, at, words, ha="center", va="center", fontsize=7, color=MUTED)
        return
    ends = [value if np.isnan(low) else max(low, left), value if np.isnan(high) else min(high, right)]
    axes.plot(ends, [at, at], color=colour, linewidth=2.2, solid_capstyle="butt")
    face = "none" if str(row.get("verdict")) in UNDETERMINED else colour
    inside = min(max(value, left), right)
    axes.plot([inside], [at], "o", color=colour, markerfacecolor=face, markersize=5.5, clip_on=False)
    if high > right:
        _arrow(axes, right, at, ">", colour)
    if low < left:
        _arrow(axes, left, at, "<", colour)


def _arrow(axes: Axes, x: float, y: float, marker: str, colour: str) -> None:
    axes.plot([x], [y], marker, color=colour, markersize=5, clip_on=False)


def _span(rows: pd.DataFrame, marks: Sequence[float], bottom: float | None) -> tuple[float, float]:
    """Return the x axis' ends: all values and marks, intervals as far as they do not squeeze the rest."""
    values = [*rows["value"].dropna(), *rows.loc[rows["value"].isna(), "low"].dropna(), *marks]
    values = [float(v) for v in values if np.isfinite(v)]
    if not values:
        return (0.0, 1.0) if bottom is None else (bottom, bottom + 1.0)
    middle = (min(values), max(values))
    extent = max(middle[1] - middle[0], 0.3 * max(abs(middle[0]), abs(middle[1])), 1e-12)
    ends = rows[["low", "high"]].replace([np.inf, -np.inf], np.nan)
    low = np.nanmin([middle[0], max(ends["low"].min(), middle[0] - FAR * extent)])
    high = np.nanmax([middle[1], min(ends["high"].max(), middle[1] + FAR * extent)])
    pad = 0.06 * (high - low if high > low else extent)
    return (float(low - pad) if bottom is None else bottom), float(high + pad)
