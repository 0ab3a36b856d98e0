"""On a terminal the tasks' progress lines become one bar below the log; everywhere else nothing is touched."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from steps.progress import UNKNOWN_WIDTH, bar, parse

CLEAR = "\r\x1b[K"


class Screen:
    """Passes lines on to a terminal and keeps the latest progress as its last line.

    Args:
        stream: the terminal.
        columns: width; asked of the terminal when None.
    """

    def __init__(self, stream: TextIO, columns: int | None = None) -> None:
        self._stream = stream
        self._columns = columns
        self._partial = ""
        self._bar = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Return whether what writes here may use colours."""
        return not os.environ.get("NO_COLOR")

    def write(self, text: str) -> int:
        """Write text; whole lines that report progress are drawn instead."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            progress = parse(line)
            if progress is None:
                self._draw(line + "\n" + self._bar)
            else:
                name, done, total, report = progress
                self._bar = bar(name, done, total, report, self._width()) if done < total else ""
                self._draw(self._bar or line + "\n")
        return len(text)

    def _draw(self, text: str) -> None:
        self._stream.write(CLEAR + text)
        self._stream.flush()

    def _width(self) -> int:
        if self._columns is not None:
            return self._columns
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or UNKNOWN_WIDTH
        except (OSError, ValueError):
            return UNKNOWN_WIDTH

    def close(self) -> None:
        """Remove the bar and write what has no line end yet."""
        self._draw(self._partial)
        self._partial = self._bar = ""


class Colourless:
    """A terminal that what writes to it takes for a file, so that it leaves out colours."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Return False."""
        return False


@contextmanager
def watch() -> Iterator[None]:
    """Show progress as a bar while the flow runs, when stdout is a terminal that can; heed NO_COLOR."""
    out, err = sys.stdout, sys.stderr
    screen = Screen(out) if out.isatty() and os.environ.get("TERM") not in (None, "dumb") else None
    if screen is not None:
        os.environ["DLLM_PROGRESS"] = "watched"
        sys.stdout = screen  # type: ignore[assignment]
    if os.environ.get("NO_COLOR"):
        sys.stderr = Colourless(err)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        if screen is not None:
            screen.close()
