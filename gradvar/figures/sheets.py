"""Panels put together on one sheet, with the numbers they draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradvar.figures.style import PANEL


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel: a function that draws it, and its size."""

    draw: Callable[[Axes], None]
    width: float = PANEL[0]
    """Inches."""
    height: float = PANEL[1]
    """Inches."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One figure of a run: its panels, and the numbers beside it."""

    stem: str
    """Name of its files."""
    title: str
    """What it shows, in a few words."""
    alt: str
    """What one sees, for readers who cannot."""
    panels: Sequence[Panel]
    numbers: pd.DataFrame = field(default_factory=pd.DataFrame)
    """What is drawn, one row a number."""


@dataclass(frozen=True, kw_only=True)
class NotDrawn:
    """A figure whose data the run does not hold."""

    stem: str
    title: str
    why: str
    """What is missing and what makes it, for example "no table `cv`: run `gradvar cv RUN`"."""


def compose(panels: Sequence[Panel], *, columns: int = 4) -> Figure:
    """Return a figure of the panels in rows of at most `columns`, with one legend for all below them."""
    wide = min(len(panels), columns)
    rows = [panels[start : start + wide] for start in range(0, len(panels), wide)]
    heights = [max(panel.height for panel in row) for row in rows]
    widths = [max(row[place].width for row in rows if place < len(row)) for place in range(wide)]
    figure = Figure(figsize=(sum(widths), sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(rows), wide, width_ratios=widths, height_ratios=heights)
    named: dict[str, Artist] = {}
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            axes = figure.add_subplot(grid[r, c])
            panel.draw(axes)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(label, handle)
    if named:
        fitting = max(1, int(sum(widths) / 1.6))
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=min(len(named), fitting))
    return figure


def tall(lines: int, *, least: float = PANEL[1]) -> float:
    """Return the height in inches of a panel with so many lines."""
    return max(least, 0.8 + 0.24 * lines)
