"""What the Metaflow cards show: a live loss curve while a row trains, the table and the figures at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from metaflow import current
from metaflow.cards import Image, Markdown, VegaChart

REFRESH_EVERY_S = 20.0
"""A refresh is a process of its own, which takes most of a second from the training of a small machine."""
MAX_POINTS = 500


class LossCurve:
    """A listener of the step's context that keeps a chart on the task's card up to date.

    Args:
        row: title of the chart.
    """

    def __init__(self, row: str) -> None:
        self._points: list[dict[str, float]] = []
        self._every = 1
        self._last = time.monotonic()
        self._chart = VegaChart(_chart(row, self._points))
        current.card.append(Markdown(f"## {row}"))
        current.card.append(self._chart)

    def __call__(self, row: str, record: dict[str, Any]) -> None:
        """Add a record's training loss."""
        if "train/loss" not in record or record["step"] % self._every:
            return
        self._points.append({"step": record["step"], "loss": record["train/loss"]})
        if len(self._points) > MAX_POINTS:
            del self._points[::2]
            self._every *= 2
        self._chart.update(_chart(row, self._points))
        if time.monotonic() - self._last >= REFRESH_EVERY_S:
            self._last = time.monotonic()
            current.card.refresh()


def _chart(row: str, points: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": f"{row}: training loss",
        "width": 600,
        "data": {"values": list(points)},
        "mark": "line",
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "optimiser step"},
            "y": {"field": "loss", "type": "quantitative", "title": "loss", "scale": {"zero": False}},
        },
    }


def show_report(markdown_path: str, figures: dict[str, str]) -> None:
    """Put the report's text and figures on the card of the current task."""
    text = Path(markdown_path).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("![")]
    current.card.append(Markdown("\n".join(lines)))
    for name, path in figures.items():
        current.card.append(Image(Path(path).read_bytes(), label=name.replace("_", " ")))
