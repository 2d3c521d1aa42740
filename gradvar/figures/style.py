"""One look for every figure: colours that colour-blind readers can tell apart, vector text, sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
"""Okabe and Ito's palette (yellow replaced by olive, which shows on white), in the order of use."""
MUTED = "#8a8a8a"
INK = "#222222"
"""Text, axes and fitted lines."""
GRID = "#e6e6e6"
BAND = "#dddddd"
"""Margins and ranges behind the data."""
PANEL = (3.4, 2.9)
"""Width and height of one panel in inches."""

_SETTINGS: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply gradvar's look inside the block; the caller's settings come back after it."""
    with mpl.rc_context(_SETTINGS):
        yield


def panels(count: int, *, columns: int = 4) -> Figure:
    """Return a figure with `count` panels in rows of at most `columns`, laid out without overlap."""
    wide = min(count, columns)
    rows = -(-count // wide)
    figure = Figure(figsize=(PANEL[0] * wide, PANEL[1] * rows), layout="constrained")
    axes = figure.subplots(rows, wide, squeeze=False).ravel()
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """Save a figure as png and pdf and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.png", folder / f"{stem}.pdf"]
    with style():
        for path in paths:
            dated = {"CreationDate": None} if path.suffix == ".pdf" else {}
            figure.savefig(path, metadata=dated)
    return paths


def plain_log_ticks(axes: Axes, low: float, high: float) -> None:
    """Label a logarithmic x axis with plain numbers."""
    ticks = [m * 10.0**e for e in range(7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(ticks) > 6:
        ticks = ticks[::2]
    if len(ticks) >= 2:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
