"""Text of models and data, made safe to look at: what cannot be seen is named, what is too long is cut and said.

Escaping for HTML is the template's work; here text stays text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST_NAME = 600
"""Characters of a name, a path or a line of the report's own words."""
_UNSEEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls but tab and newline
    "\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # zero width, direction, separators
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"  # no characters at all
    "\U000e0000-\U000e0fff"  # tags
    "]"
)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of text, or the name of one character that cannot be seen."""

    text: str
    hidden: bool


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Text as it is shown."""

    pieces: tuple[Piece, ...]
    length: int
    """Characters of the whole text."""
    left_out: int
    """Characters cut out of its middle."""


def shown(text: str, most: int) -> Shown:
    """Cut a text to `most` characters, its beginning and its end, and name the characters that cannot be seen.

    Args:
        text: Any text.
        most: Characters kept, at least 2; the end, where an answer stands, gets a third of them.
    """
    length = len(text)
    if length <= most:
        return Shown(pieces=_pieces(text), length=length, left_out=0)
    tail = most // 3
    head = most - tail
    gap = Piece(text=f" … {length - most} of {length} characters left out … ", hidden=True)
    pieces = (*_pieces(text[:head]), gap, *_pieces(text[length - tail :]))
    return Shown(pieces=pieces, length=length, left_out=length - most)


def _pieces(text: str) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    at = 0
    for found in _UNSEEN.finditer(text):
        if found.start() > at:
            pieces.append(Piece(text=text[at : found.start()], hidden=False))
        pieces.append(Piece(text=_name(found[0]), hidden=True))
        at = found.end()
    if at < len(text):
        pieces.append(Piece(text=text[at:], hidden=False))
    return tuple(pieces)


def _name(character: str) -> str:
    return f"U+{ord(character):04X}"  # control pictures are in few fonts


def whole(text: str) -> str:
    """Return all of a text with the characters that cannot be seen named."""
    return "".join(f"⟨{piece.text}⟩" if piece.hidden else piece.text for piece in _pieces(text))


def one_line(text: str) -> str:
    """Return a short text (a name, a path) with what cannot be seen named, on one line."""
    kept = text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"
    return " ".join(whole(kept).split("\n"))
