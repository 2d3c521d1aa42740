"""A matplotlib figure as inline SVG: no ids that clash, text as text, colours that follow light and dark."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

import numpy as np
from markupsafe import Markup
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from gradvar.figures.style import BAND, GRID, INK, MUTED, style
from gradvar.report.text import one_line

MOST_POINTS = 300
"""Scatters of more points are drawn as an image inside the SVG."""
_THEMED = {INK: "var(--ink)", GRID: "var(--grid)", BAND: "var(--band)", MUTED: "var(--muted)"}
_DROPPED = ("metadata", "style", "title", "desc")
_COLOUR = re.compile("|".join(re.escape(colour) for colour in _THEMED), re.IGNORECASE)


def inline_svg(figure: Figure, name: str, alt: str) -> Markup:
    """Return a figure as an SVG element for the inside of an HTML page.

    Args:
        figure: Drawn; its scatters of many points become images.
        name: Unique on the page; ids begin with it.
        alt: What one sees, for readers who cannot.
    """
    for axes in figure.axes:
        for collection in axes.collections:
            if isinstance(collection, PathCollection) and np.size(collection.get_offsets()) // 2 > MOST_POINTS:
                collection.set_rasterized(True)
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, dpi=110, metadata={"Date": None})
    # Our own figure: matplotlib wrote it, and it escapes the text in it.
    root = ET.fromstring(buffer.getvalue())  # noqa: S314
    width = float(root.attrib["viewBox"].split()[2])
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": one_line(alt),
        "style": f"max-width:{width * 96 / 72:.0f}px",
    }
    _clean(root, name)
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704


def _clean(element: ET.Element, name: str) -> None:
    for child in list(element):
        if child.tag.rpartition("}")[2] in _DROPPED:
            element.remove(child)
        else:
            _clean(child, name)
    if element.text is not None and element.text.strip():
        element.text = one_line(element.text)  # names of prompts are in it
    element.tag = element.tag.rpartition("}")[2]
    attributes = {}
    for key, value in element.attrib.items():
        plain = key.rpartition("}")[2]
        if plain == "id":
            value = f"{name}-{value}"
        elif plain == "href" and value.startswith("#"):
            value = f"#{name}-{value[1:]}"
        elif "url(#" in value:
            value = value.replace("url(#", f"url(#{name}-")
        if plain in ("style", "fill", "stroke"):
            value = _COLOUR.sub(lambda found: _THEMED[found[0].lower()], value)
        attributes[plain] = value
    element.attrib = attributes
