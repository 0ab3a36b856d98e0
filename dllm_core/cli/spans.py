"""Styled text: how wide it is on a terminal, where its lines break, which codes draw it. Imports no torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import groupby
from typing import NamedTuple


class Style(Enum):
    """What a stretch of text is; the value is how a terminal draws it (SGR parameters)."""

    PLAIN = ""
    TITLE = "1"
    NOTE = "2"
    WRITTEN = "36"
    FRESH = "1;32"
    DRAFT = "2;3"
    OPEN = "2;36"
    WRONG = "31"


class Span(NamedTuple):
    """A stretch of text in one style."""

    text: str
    style: Style = Style.PLAIN


Line = list[Span]


def shown(text: str) -> str:
    """Return text without what would move the cursor or change the terminal: a model may write any character."""
    return "".join(_visible(char) for char in text.replace("\r\n", "\n").replace("\t", "    "))


def _visible(char: str) -> str:
    return "\ufffd" if char != "\n" and unicodedata.category(char) == "Cc" else char


def char_width(char: str) -> int:
    """Return the columns of a character: 2 for wide ones, 0 for marks on the one before."""
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def width(text: str) -> int:
    """Return the columns that text of one line takes."""
    return sum(map(char_width, text))


def wrap(spans: Iterable[Span], columns: int) -> list[Line]:
    """Break text into lines of at most `columns`, between words where there are any; joined, they are the text.

    A space at a break stays at the end of its line, also beyond the last column but one.
    """
    lines, line, used = [], list[tuple[str, Style]](), 0
    for char, style in ((char, span.style) for span in spans for char in shown(span.text)):
        if char == "\n":
            lines.append(line)
            line, used = [], 0
            continue
        wide = char_width(char)
        room = columns if char == " " else columns - 1
        if line and used + wide > room:
            line, rest = _break(line)
            lines.append(line)
            line, used = rest, width("".join(c for c, _ in rest))
        line.append((char, style))
        used += wide
    return [_spans(found) for found in [*lines, line]]


def _break(line: list[tuple[str, Style]]) -> tuple[list[tuple[str, Style]], list[tuple[str, Style]]]:
    """Return a full line cut after its last space, or whole where it has none."""
    spaces = [i for i, (char, _) in enumerate(line) if char == " "]
    cut = spaces[-1] + 1 if spaces else len(line)
    return line[:cut], line[cut:]


def _spans(chars: Sequence[tuple[str, Style]]) -> Line:
    return [Span("".join(c for c, _ in run), style) for style, run in groupby(chars, key=lambda pair: pair[1])]


def paint(line: Sequence[Span], *, colour: bool) -> str:
    """Return a line with the codes that draw it, or its text alone."""
    if not colour:
        return "".join(span.text for span in line)
    return "".join(f"\x1b[{s.style.value}m{s.text}\x1b[0m" if s.style.value and s.text else s.text for s in line)


def padded(line: Sequence[Span], columns: int) -> Line:
    """Return a line filled up with spaces."""
    return [*line, Span(" " * max(0, columns - sum(width(span.text) for span in line)))]


def beside(blocks: Sequence[Sequence[Line]], columns: int, gap: int = 3) -> list[Line]:
    """Return blocks of lines next to each other, each in `columns`."""
    tallest = max(map(len, blocks), default=0)
    lines = []
    for i in range(tallest):
        cells = [padded(block[i] if i < len(block) else [], columns) for block in blocks]
        lines.append([span for k, cell in enumerate(cells) for span in ([Span(" " * gap)] if k else []) + cell])
    return lines
