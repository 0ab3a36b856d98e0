"""A canvas that fills in before one's eyes. C canvas length."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from dllm_core.cli.detokenizer import Detokenizer
from dllm_core.cli.spans import Line, Span, Style, wrap
from dllm_core.cli.terminal import Region, Terminal

if TYPE_CHECKING:
    from torch import Tensor


def canvas_spans(
    ids: Sequence[int], styles: Sequence[Style], detokenizer: Detokenizer, open_place: str
) -> Iterator[Span]:
    """Yield a canvas as styled text.

    Args:
        ids: tokens; those of open places are not read.
        styles: of each token; `OPEN` where there is none yet.
        detokenizer: of the cell.
        open_place: what an open place looks like.
    """
    place = 0
    for is_open, run in groupby(styles, key=lambda style: style is Style.OPEN):
        stretch = list(run)
        if is_open:
            yield Span(open_place * len(stretch), Style.OPEN)
        else:
            cuts = [i for i in range(1, len(stretch)) if stretch[i] is not stretch[i - 1]]
            pieces = detokenizer.pieces(ids[place : place + len(stretch)], cuts)
            yield from (Span(p, stretch[i]) for p, i in zip(pieces, [0, *cuts], strict=True))
        place += len(stretch)


class CanvasView:
    """Draws a decode after each of its passes. Give its `on_draft` to `generate`.

    Args:
        terminal: a live one.
        region: where on it.
        detokenizer: of the cell.
        given: bool of each place of the canvas: given tokens, never highlighted.
        title: shown in the line below the text.
        drafts: show what the model would say at open places, in place of blocks.
        pace: least seconds between two pictures; quick models wait for the eye.

    Attributes:
        seconds: spent on drawing and waiting, which is not the model's time.
    """

    def __init__(
        self,
        terminal: Terminal,
        region: Region,
        detokenizer: Detokenizer,
        given: Sequence[bool],
        *,
        title: str,
        drafts: bool = False,
        pace: float = 0.0,
    ) -> None:
        self._terminal, self._region, self._detokenizer = terminal, region, detokenizer
        self._given, self._title, self._drafts, self._pace = list(given), title, drafts, pace
        self._stood = list(given)
        self._passes, self._last_drawn = 0, float("-inf")
        self.seconds = 0.0

    def start(self, ids: Sequence[int]) -> None:
        """Draw the canvas before the first pass."""
        self._draw(ids, [Style.PLAIN if g else Style.OPEN for g in self._given], "writing")
        self._last_drawn = time.perf_counter()

    def on_draft(self, canvas_1C: Tensor, committed_1C: Tensor) -> None:
        """Draw the canvas after a pass."""
        begin = time.perf_counter()
        if (early := self._pace - (begin - self._last_drawn)) > 0:
            time.sleep(early)
        self._passes += 1
        ids, stands = canvas_1C[0].tolist(), committed_1C[0].tolist()
        styles = [self._style(i, stands[i]) for i in range(len(ids))]
        written = sum(s and not g for s, g in zip(stands, self._given, strict=True))
        places = len(ids) - sum(self._given)
        self._draw(ids, styles, f"step {self._passes}, {written} of {places} tokens")
        self._stood = stands
        self._last_drawn = time.perf_counter()
        self.seconds += self._last_drawn - begin

    def _style(self, place: int, stands: bool) -> Style:
        if self._given[place]:
            return Style.PLAIN
        if not stands:
            return Style.DRAFT if self._drafts else Style.OPEN
        return Style.WRITTEN if self._stood[place] else Style.FRESH

    def _draw(self, ids: Sequence[int], styles: Sequence[Style], progress: str) -> None:
        spans = canvas_spans(ids, styles, self._detokenizer, self._terminal.open_place)
        self._region.draw([*wrap(spans, self._terminal.columns), *self._status(progress)])

    def _status(self, progress: str) -> list[Line]:
        return [[], [Span(f"{self._title}: {progress}"[: self._terminal.columns - 1], Style.NOTE)]]
