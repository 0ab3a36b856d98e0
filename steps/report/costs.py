"""What a conversion costs, in a sentence: new parameters, teacher, memory, time, and who left the common budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steps.report.cells import Cell
from steps.report.schema import Results

OVER_BUDGET = 1.1
"""Times the common budget beyond which a row is named: the last batch is whole, so a little more is usual."""
SPENT = {"flops": "flops", "tokens": "response_tokens", "seconds": "train_s"}
"""Kind of budget -> the cost that it holds equal."""


def amount(value: float, kind: str) -> str:
    """Return a budget in words: 23 TFLOP, 26,000 tokens, 1.5 epochs."""
    if kind == "flops":
        return f"{value / 1e12:,.3g} TFLOP"
    return f"{value:,.0f} {kind}" if value == round(value) else f"{value:,} {kind}"


def plain_recipes(cells: Sequence[Cell]) -> list[str]:
    """Return the cells that add no parameters and read no teacher."""
    return [c.name for c in cells if not _mean(c, "new_params", 1) and not _mean(c, "teacher_flops", 1)]


def cost_line(results: Results, cells: Sequence[Cell]) -> str:
    """Return the least and the most of every cost among the converted cells."""
    paid = [c for c in cells if c.cost("flops")]
    if not paid:
        return ""
    budget = amount(results.budget["value"], str(results.budget["kind"]))
    new = _grouped(paid, lambda c: _mean(c, "new_params"), lambda v: "none" if not v else f"{v / 1e6:,.1f} M")
    share = {c.name: _mean(c, "teacher_flops") / max(_mean(c, "flops"), 1.0) for c in paid}
    teacher = _grouped(
        paid, lambda c: round(share[c.name], 2), lambda v: "none" if not v else f"{100 * v:.0f} % of FLOPs"
    )
    parts = [
        f"new parameters {new}",
        f"teacher {teacher}",
        f"training memory {_extremes(paid, 'peak_memory_gb', '.1f', ' GB')}",
        f"training time {_extremes(paid, 'train_s', ',.0f', ' s')}",
    ]
    key = SPENT.get(results.budget["kind"])
    over = [c for c in paid if key and _mean(c, key) > OVER_BUDGET * results.budget["value"]]
    if key and over:
        told = [f"{c.name} {amount(_mean(c, key), results.budget['kind'])}" for c in over]
        parts.append(f"beyond the budget of {budget}: {', '.join(told)}")
    else:
        parts.append(f"budget of each {budget}")
    return f"Cost: {'; '.join(p for p in parts if p)}."


def _mean(cell: Cell, name: str, missing: float = 0.0) -> float:
    found = cell.cost(name)
    return missing if found is None else found.mean


def _grouped(cells: Sequence[Cell], value: Callable[[Cell], float], text: Callable[[float], str]) -> str:
    """Name the cells behind each value, the smallest first; one value of all cells needs no names."""
    groups: dict[str, list[str]] = {}
    for cell in sorted(cells, key=value):
        groups.setdefault(text(value(cell)), []).append(cell.name)
    if len(groups) == 1:
        return next(iter(groups))
    return ", ".join(f"{shown} ({', '.join(names)})" for shown, names in groups.items())


def _extremes(cells: Sequence[Cell], name: str, spec: str, unit: str) -> str:
    found = sorted((s.mean, c.name) for c in cells if (s := c.cost(name)))
    if not found:
        return "not measured"
    (low, least), (high, most) = found[0], found[-1]
    if format(low, spec) == format(high, spec):
        return f"{low:{spec}}{unit}"
    return f"{low:{spec}}{unit} ({least}) to {high:{spec}}{unit} ({most})"
