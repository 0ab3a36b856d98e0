"""The area under each curve of accuracy against parallelism, which takes all rows: y_max is the best among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dllm_core.evals.aup import CurvePoint, aup_estimate

if TYPE_CHECKING:
    from steps.report.build import RowResult

Task = tuple[str, str | None]
"""What curves have to share to be compared: the task, and what a row sees around the gaps."""


def best_accuracies(found: Iterable[Mapping[str, Any]]) -> dict[Task, float]:
    """Return the best accuracy in percent at any setting of any row, by task.

    Args:
        found: what `dllm_core.evals.parallelism` measured of each row.
    """
    best: dict[Task, float] = {}
    for row in found:
        for curve in row["curves"]:
            task = (curve["task"], row["context"])
            values = [100.0 * point["accuracy"]["value"] for point in curve["points"]]
            best[task] = max([best.get(task, 0.0), *values])
    return best


def concluded(row: Mapping[str, Any], best: Mapping[Task, float]) -> dict[str, Any]:
    """Return a row's curves with their AUP, and without the figures of single sequences that it took.

    Args:
        row: what was measured.
        best: y_max by task.
    """
    curves = []
    for curve in row["curves"]:
        y_max = best[curve["task"], row["context"]]
        found = aup_estimate([CurvePoint.from_json(point["per_sequence"]) for point in curve["points"]], y_max)
        points = [{k: v for k, v in point.items() if k != "per_sequence"} for point in curve["points"]]
        area = None if found is None else found.as_json()
        curves.append({**curve, "points": points, "aup": area, "best_accuracy": y_max})
    return {**row, "curves": curves}


def with_areas(rows: Sequence[RowResult]) -> list[RowResult]:
    """Return the rows of a grid with the areas under their curves, where curves were measured."""
    measured = [(r.evaluation or {}).get("parallelism") for r in rows]
    best = best_accuracies(found for found in measured if found)
    return [
        replace(row, evaluation={**(row.evaluation or {}), "parallelism": concluded(found, best)}) if found else row
        for row, found in zip(rows, measured, strict=True)
    ]
