"""Curves of a row's training, read from its metrics.jsonl and thinned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

MAX_CURVE_POINTS = 400
MAX_HEALTH_POINTS = 150
MIN_POINTS = 20
"""Of a curve that a trend is read from: a handful of batches is noise."""
HEALTH = ("_accuracy", "_mse")
"""Ends of the names of what a latent row is watched by while it trains."""

T = TypeVar("T")


def loss_curve(metrics_path: Path) -> list[dict[str, float]]:
    """Return step, total loss and cross-entropy, thinned to a few hundred points."""
    points = []
    for entry in _records(metrics_path):
        if "train/loss" in entry:
            point = {"step": float(entry["step"]), "loss": entry["train/loss"]}
            ce = entry.get("train/ce_nats")
            points.append(point if ce is None else {**point, "ce": ce})
    return _thinned(points, MAX_CURVE_POINTS)


def health_curves(metrics_path: Path) -> dict[str, list[tuple[float, float]]]:
    """Return (step, value) of everything logged as `train/*_accuracy` or `train/*_mse`, by name without `train/`."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in _records(metrics_path):
        for key, value in entry.items():
            if key.startswith("train/") and key.endswith(HEALTH) and isinstance(value, int | float):
                curves.setdefault(key.removeprefix("train/"), []).append((float(entry["step"]), float(value)))
    return {name: _thinned(points, MAX_HEALTH_POINTS) for name, points in curves.items()}


def still_rising(points: list[tuple[float, float]]) -> float:
    """Return by how much the mean of a curve's last fifth lies above that of the fifth before; 0 for a short curve."""
    size = len(points) // 5
    if len(points) < MIN_POINTS:
        return 0.0
    values = [value for _, value in points]
    return (sum(values[-size:]) - sum(values[-2 * size : -size])) / size


def _records(metrics_path: Path) -> list[dict[str, Any]]:
    """Return the records by step; the file of a resumed run may hold a step twice, and the later line counts."""
    if not metrics_path.is_file():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in metrics_path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "step" in entry:
            by_step.setdefault(int(entry["step"]), {}).update(entry)
    return [by_step[step] for step in sorted(by_step)]


def _thinned(points: list[T], limit: int) -> list[T]:
    return points[:: max(1, -(-len(points) // limit))]
