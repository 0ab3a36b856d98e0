"""Where text goes: a terminal that lines are drawn on again in place, or a file that gets the result alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self, TextIO

from dllm_core.cli.spans import Line, Span, Style, paint, wrap

_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"
_WIDEST = 100
"""Text in longer lines is hard to read."""


class Terminal:
    """Standard output.

    Args:
        stream: None is `sys.stdout`, as it is now.

    Attributes:
        is_live: lines can be drawn again in place.
        colour: and in colours; not with `NO_COLOR`.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.is_live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.is_live and not os.environ.get("NO_COLOR")

    @property
    def columns(self) -> int:
        """Width that is used for running text."""
        return min(_WIDEST, self.full_columns)

    @property
    def full_columns(self) -> int:
        """Width of the terminal."""
        return max(20, shutil.get_terminal_size().columns)

    @property
    def rows(self) -> int:
        """Height of the terminal."""
        return max(4, shutil.get_terminal_size().lines)

    @property
    def open_place(self) -> str:
        """How a place is drawn that has no token yet: as wide as a short word."""
        try:
            "░".encode(getattr(self.stream, "encoding", None) or "ascii")
        except UnicodeEncodeError:
            return " ___"
        return " ░░░"

    def lines(self, lines: Sequence[Line]) -> None:
        """Print finished lines."""
        drawn = (paint(line, colour=self.colour) for line in lines)
        self.stream.write("".join(f"{line if self.is_live else line.rstrip()}\n" for line in drawn))
        self.stream.flush()

    def text(self, *spans: Span) -> None:
        """Print running text: in lines on a terminal, as it is elsewhere."""
        if self.is_live:
            self.lines(wrap(spans, self.columns))
        else:
            self.stream.write("".join(span.text for span in spans) + "\n")
            self.stream.flush()

    def note(self, text: str) -> None:
        """Print what is not the result: below it on a terminal, on standard error elsewhere."""
        if self.is_live:
            self.lines(wrap([Span(text, Style.NOTE)], self.columns))
        else:
            print(text, file=sys.stderr)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show a line on a live terminal for the length of a `with` block."""
        if not self.is_live:
            yield
            return
        self.stream.write(paint([Span(what[: self.full_columns - 1], Style.NOTE)], colour=self.colour))
        self.stream.flush()
        try:
            yield
        finally:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


class Region:
    """Lines at the bottom of a terminal, drawn again in place; the cursor is hidden in the meantime.

    What was drawn last stays when the block is left with an error, so that an interrupted text can be read.

    Args:
        terminal: where.
    """

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._drawn = terminal, 0

    def __enter__(self) -> Self:
        self._terminal.stream.write(_HIDE)
        return self

    def __exit__(self, *exception: object) -> None:
        self._terminal.stream.write(_SHOW)
        self._terminal.stream.flush()

    def draw(self, lines: Sequence[Line]) -> None:
        """Replace what was drawn before; of more lines than the terminal has, the last are seen."""
        seen = lines[-(self._terminal.rows - 1) :]
        body = "".join(paint(line, colour=self._terminal.colour) + "\x1b[K\n" for line in seen)
        self._terminal.stream.write(self._home() + body + "\x1b[J")
        self._terminal.stream.flush()
        self._drawn = len(seen)

    def erase(self) -> None:
        """Remove what was drawn."""
        self._terminal.stream.write(self._home() + "\x1b[J")
        self._drawn = 0

    def _home(self) -> str:
        return "\r" + (f"\x1b[{self._drawn}A" if self._drawn else "")
