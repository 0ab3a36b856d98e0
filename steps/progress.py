"""How far a piece of work has come: a line every so many seconds, or a bar when somebody watches.

A Metaflow task writes into a pipe and cannot draw. On a terminal the launcher therefore sets `DLLM_PROGRESS=watched`:
tasks then write their line every second, and the launcher shows the latest as a bar (`parse`).
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from typing import TextIO

LINE_EVERY_S = 10.0
WATCHED_EVERY_S = 1.0
BAR_EVERY_S = 0.2
BAR_WIDTH = 24
UNKNOWN_WIDTH = 100
"""Columns of a terminal that does not say: a fresh pseudo-terminal claims to have 0."""


def duration(seconds: float) -> str:
    """Return seconds as `42s`, `6m`, `1h05m`."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def number(value: float) -> str:
    """Return a number with about three digits: 0.0123, 4.31, 1.2k, 3.4M."""
    if isinstance(value, int) and abs(value) < 10_000:
        return str(value)
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def mode(stream: TextIO) -> str:
    """Return "watched", "bar" or "lines"."""
    if os.environ.get("DLLM_PROGRESS") == "watched" and not stream.isatty():
        return "watched"
    return "bar" if stream.isatty() and os.environ.get("TERM") != "dumb" else "lines"


def bar(name: str, done: int, total: int | None, text: str, width: int) -> str:
    """Return one line of at most `width` characters; plain ASCII, so that it is the same with NO_COLOR."""
    filled = round(BAR_WIDTH * done / total) if total else 0
    drawn = f"[{name}] {'#' * min(filled, BAR_WIDTH):-<{BAR_WIDTH}} {text}"
    return drawn[: max(20, width - 1)]


_LINE = re.compile(r"\[(?P<name>[\w.-]+)\] (?P<text>\w+ (?P<done>\d+)/(?P<total>\d+)\b.*)")


def parse(line: str) -> tuple[str, int, int, str] | None:
    """Return (name, done, total, text) of a progress line, whatever stands before it; None for other lines."""
    found = _LINE.search(line)
    return (found["name"], int(found["done"]), int(found["total"]), found["text"].strip()) if found else None


class Progress:
    """Reports on one piece of work. Call it as often as you like: it throttles itself.

    Example:
        report = ctx.progress("random_mask")
        report(120, 600, loss=4.31, unit_loss="nats/tok", tokens_s=1200.0)

    Args:
        name: shown in brackets.
        unit: what `done` counts.
        every_s: seconds between lines where nobody watches; a screen is refreshed at its own pace.
        stream: where to; stdout when None.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        name: str,
        *,
        unit: str = "step",
        every_s: float = LINE_EVERY_S,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.unit = unit
        self._stream = stream or sys.stdout
        self._clock = clock
        self._mode = mode(self._stream)
        self._every = {"lines": every_s, "watched": WATCHED_EVERY_S, "bar": BAR_EVERY_S}[self._mode]
        self._start = clock()
        self._first: int | None = None
        self._last = -1e9
        self._drawn = 0

    def __call__(self, done: int, total: int | None = None, /, **values: float | str) -> None:
        """Report that `done` of `total` units are finished.

        Args:
            done: units finished.
            total: units in all, None when unknown.
            **values: shown as `name value`; underscores become spaces, and strings stand as they are.
        """
        now = self._clock()
        if self._first is None:
            self._first = done  # work resumed from a checkpoint says nothing about the pace
        finished = total is not None and done >= total
        pause = self._every
        if finished:  # a screen must see the end; a log is spared a burst of lines
            pause = min(1.0, self._every) if self._mode == "lines" else 0.0
        if now - self._last < pause:
            return
        self._last = now
        self._emit(done, total, self._text(done, total, values, now))
        if finished and self._mode == "bar":
            self.close()

    def _text(self, done: int, total: int | None, values: dict[str, float | str], now: float) -> str:
        parts = [f"{self.unit} {done}" + (f"/{total}" if total is not None else "")]
        parts += [f"{k.replace('_', ' ')} {v if isinstance(v, str) else number(v)}" for k, v in values.items()]
        fresh = done - (self._first or 0)
        if total is not None and fresh > 0 and done < total:
            parts.append(f"eta {duration((now - self._start) / fresh * (total - done))}")
        return " ".join(parts)

    def _emit(self, done: int, total: int | None, text: str) -> None:
        if self._mode == "bar":
            line = bar(self.name, done, total, text, _columns())
            print("\r" + line.ljust(self._drawn), end="", file=self._stream, flush=True)
            self._drawn = len(line)
        else:
            print(f"[{self.name}] {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """End the bar's line."""
        if self._mode == "bar" and self._drawn:
            print(file=self._stream, flush=True)
            self._drawn = 0


def _columns() -> int:
    try:
        return os.get_terminal_size().columns or UNKNOWN_WIDTH
    except OSError:
        return UNKNOWN_WIDTH
