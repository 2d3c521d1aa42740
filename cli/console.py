"""One look for what people read: words and progress on standard error, results and JSON on standard output."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gradvar.report.numbers import tone
from gradvar.stages.listener import Advance

_WORDS = ("measure", "responses", "target", "A", "quantity", "verdict", "aggregator", "prompt", "proxy", "#", "extra")
"""Columns that hold words and stand to the left."""

_GAP = 2
"""Blanks between the columns of a table."""

result = Console(highlight=False, soft_wrap=False)
notes = Console(stderr=True, highlight=False)


class Terminal:
    """Shows what a stage says and how far it is."""

    def say(self, text: str) -> None:
        """Print one line."""
        notes.print(text, style="dim", markup=False)

    def warn(self, text: str) -> None:
        """Print one line that must not be missed."""
        notes.print(f"warning: {text}", style="bold yellow", markup=False)

    @contextlib.contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show a bar with the time left; a line at the end where no terminal is there."""
        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=notes, transient=False) as progress:
            task = progress.add_task(description, total=total, completed=done)

            def advance(units: int) -> None:
                progress.advance(task, units)

            try:
                yield advance
            except BaseException:
                progress.live.transient = True  # a refusal is one line, without the bar that never moved
                raise


def print_json(value: Any) -> None:
    """Print one JSON document; numbers that are not finite become null or "inf"."""
    print(json.dumps(_jsonable(value), indent=2, ensure_ascii=False))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows as JSON-ready records."""
    return [{str(name): value for name, value in row.items()} for row in table.astype(object).to_dict("records")]


def count(value: Any, most: int = 100_000) -> str:
    """Return a number of responses for people; beyond `most` only that it is beyond."""
    if value is None or pd.isna(value):
        return "–"
    return f">{most}" if value > most else f"{value:.0f}"


def verdict(text: Any, *, short: bool = False) -> str:
    """Return a verdict in its colour; short for tables."""
    if text is None or pd.isna(text):
        return ""
    style = {"good": "green", "bad": "red"}.get(tone(text), "yellow")
    words = str(text).removesuffix(" to length") if short else str(text)
    return f"[{style}]{words}[/{style}]"


def table(title: str, columns: list[str], rows: list[list[str]], *, caption: str = "") -> None:
    """Print one table."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        shown.add_column(column, justify="left" if column in _WORDS else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    # Title and caption as lines of their own: inside the table they would wrap at its width.
    if title:
        result.print(title, style="bold")
    result.print(shown)
    if caption:
        result.print(caption, style="italic dim")


def wide_table(title: str, columns: list[str], rows: list[list[str]], *, caption: str = "") -> None:
    """Print one table of many columns, in parts one below the other where no line holds them all.

    The first column heads every part, and no word of a heading or cell is broken.
    """
    widths = [
        max((len(word) for text in (column, *(row[k] for row in rows)) for word in text.split()), default=0) + _GAP
        for k, column in enumerate(columns)
    ]
    parts: list[list[int]] = [[]]
    for k in range(1, len(columns)):
        if parts[-1] and sum(widths[j] for j in (0, *parts[-1], k)) - _GAP > result.width:
            parts.append([])
        parts[-1].append(k)
    for part in parts:
        chosen = [0, *part]
        table(
            title if part is parts[0] else "",
            [columns[k] for k in chosen],
            [[row[k] for k in chosen] for row in rows],
            caption=caption if part is parts[-1] else "",
        )


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if value is pd.NA or value is None:
        return None
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return None if math.isnan(value) else (value if math.isfinite(value) else ("inf" if value > 0 else "-inf"))
    return value


def at_least(needed: str, only: Any) -> str:
    """Return a number of responses, marked where it is a lower bound only."""
    return f"≥ {needed}" if only is not None and bool(only) and needed[:1].isdigit() else needed
