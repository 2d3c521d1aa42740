"""How a stage talks while it works: words and progress, shown by whoever called it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

Advance = Callable[[int], None]
"""Call with how many more units are done."""


class Listener(Protocol):
    """What a stage reports to; the command line shows it, notebooks may ignore it."""

    def say(self, text: str) -> None:
        """Take one line about what was decided or found."""

    def warn(self, text: str) -> None:
        """Take one line that the user must not miss."""

    def task(self, description: str, total: int, done: int = 0) -> contextlib.AbstractContextManager[Advance]:
        """Show progress over `total` units, `done` of them from an earlier run."""


class Silent:
    """A listener that keeps quiet."""

    def say(self, text: str) -> None:
        """Drop the line."""

    def warn(self, text: str) -> None:
        """Drop the line."""

    @contextlib.contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show nothing."""
        yield lambda _: None
