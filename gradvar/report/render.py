"""Material to one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gradvar.figures import Drawing, NotDrawn, compose, style
from gradvar.report.answer import findings
from gradvar.report.numbers import number
from gradvar.report.records import Material, Section, Table
from gradvar.report.sections import sections
from gradvar.report.svg import inline_svg
from gradvar.report.tables import numbers_table
from gradvar.report.text import one_line, shown, whole

TEXT_BUDGET = 1_200_000
"""Characters of rollouts in one report."""
WIDE = 5.0
"""Inches beyond which a panel takes a row of its own."""
LONGEST = 4000
SHORTEST = 300
"""Characters of one response: at most and at least."""


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """One drawing, ready for the page."""

    key: str
    title: str
    why: str
    """Why it is not drawn; empty where it is."""
    panels: tuple[tuple[bool, Markup], ...]
    """Whether a panel takes a row of its own, and its SVG."""
    table: Table | None
    text: str
    """The numbers as comma-separated text, where they are many."""


def render_report(material: Material) -> str:
    """Return the report as an HTML page: no network, images inline, every text of models and data escaped."""
    environment = Environment(
        loader=PackageLoader("gradvar.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, one_line=one_line, whole=whole)
    count = sum(len(sample.responses) + 1 for sample in material.samples)
    most = max(SHORTEST, min(LONGEST, TEXT_BUDGET // max(count, 1)))
    page = environment.get_template("report.html.j2")
    parts = [(section, list(_figures(section))) for section in sections(material)]
    return page.render(
        material=material,
        findings=findings(material),
        parts=parts,
        shown=lambda text: shown(text, most),
    )


def _figures(section: Section) -> Iterator[_Figure]:
    for drawing in section.drawings:
        if isinstance(drawing, NotDrawn):
            yield _Figure(key=drawing.stem, title=drawing.title, why=drawing.why, panels=(), table=None, text="")
            continue
        numbers = numbers_table(drawing.numbers, f"Numbers: {drawing.title}")
        yield _Figure(
            key=drawing.stem,
            title=drawing.title,
            why="",
            panels=tuple(_panels(drawing, section.most_panels)),
            table=numbers if isinstance(numbers, Table) else None,
            text=whole(numbers) if isinstance(numbers, str) else "",
        )


def _panels(drawing: Drawing, most: int | None) -> Iterator[tuple[bool, Markup]]:
    for place, panel in enumerate(drawing.panels[:most]):
        with style():
            figure = compose([panel])
        title = figure.axes[0].get_title()
        alt = f"{drawing.alt} Panel: {title}" if title else drawing.alt
        yield panel.width > WIDE, inline_svg(figure, f"{drawing.stem}-{place}", alt)
