"""A quantity of every measured weight matrix, as a map of layers and projections."""

from __future__ import annotations

import re

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.patches import Rectangle

from gradvar.figures.estimates import UNDETERMINED
from gradvar.figures.style import MUTED

ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
INTERVALS_FIT = 12
"""Up to this many layers, the intervals are written in the cells."""


def layer_and_projection(target: str) -> tuple[int, str] | None:
    """Return a target's layer and projection: model.layers.3.self_attn.q_proj is (3, "q"); None for other matrices."""
    found = re.search(r"\.(\d+)\.(?:.*\.)?([^.]+)$", target)
    if found is None:
        return None
    name = found[2].split(":")[-1]
    return int(found[1]), name.removesuffix("_proj")


def plot_atlas(
    axes: Axes,
    rows: pd.DataFrame,
    *,
    centre: float | None = None,
    percent: bool = False,
    label: str = "",
    title: str = "",
) -> None:
    """Plot one quantity of every target as a heat map: layers downwards, projections across.

    Each cell holds the value, and below it the interval where there is room. Hatched: the verdict is open.

    Args:
        axes: Where to draw.
        rows: One row a target: target, value, low, high, verdict. Targets outside the layers are left out.
        centre: Value of the neutral colour, for a scale with two sides; None for one side.
        percent: Write values as parts of a hundred.
        label: Of the colour scale.
        title: Above the panel.
    """
    cells = {place: row for row in rows.to_dict("records") if (place := layer_and_projection(str(row["target"])))}
    layers = sorted({layer for layer, _ in cells})
    names = {name for _, name in cells}
    across = [name for name in ORDER if name in names] + sorted(names - set(ORDER))
    values = np.full((len(layers), len(across)), np.nan)
    for (layer, name), row in cells.items():
        values[layers.index(layer), across.index(name)] = float(row["value"])
    norm = _norm(values, centre)
    colours = mpl.colormaps["cividis" if centre is None else "PuOr"]
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto")
    room = len(layers) <= INTERVALS_FIT
    hatched = False
    for (layer, projection), row in cells.items():
        y, x = layers.index(layer), across.index(projection)
        if np.isnan(values[y, x]):
            continue
        red, green, blue, _ = colours(norm(values[y, x]))
        ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
        digits = ".1%" if percent else ".2f"
        text = f"{row['value']:{digits}}"
        if room and np.isfinite(row["low"]) and np.isfinite(row["high"]):
            text += f"\n{row['low']:{digits}} – {row['high']:{digits}}"
        axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=7)
        if str(row.get("verdict")) in UNDETERMINED:
            hatched = True
            axes.add_patch(
                Rectangle(
                    (x - 0.5, y - 0.5),
                    1,
                    1,
                    fill=False,
                    hatch="///",
                    edgecolor=ink,
                    alpha=0.3,
                    linewidth=0,
                )
            )
    for y, x in np.argwhere(np.isnan(values)):
        axes.text(x, y, "–", ha="center", va="center", color=MUTED)
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlabel("projection")
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    axes.set_title(title, parse_math=False)
    if hatched:  # for the legend alone
        axes.add_patch(
            Rectangle((0, 0), 0, 0, fill=False, hatch="////", edgecolor=MUTED, linewidth=0.5, label="undetermined")
        )
    figure = axes.figure
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(label, fontsize=8)


def _norm(values: np.ndarray, centre: float | None) -> Normalize:
    known = values[np.isfinite(values)]
    if not known.size:
        return Normalize(0.0, 1.0)
    if centre is None:
        return Normalize(0.0, max(float(known.max()), 1e-12))
    reach = max(float(np.abs(known - centre).max()), 0.25)
    return TwoSlopeNorm(centre, centre - reach, centre + reach)
