"""Figures of quality beside speed: by number of steps, and against tokens per forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steps.report.cells import Cell, gather
from steps.report.drawing import dress, style
from steps.report.schema import Results
from steps.report.sweeps import (
    TASKS,
    CurveKey,
    curve_points,
    curves_of,
    infill_accuracy,
    rule_name,
    steps_of,
    text_points,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (
    ("judge_ppl", "judge perplexity of generated text"),
    ("unigram_entropy_nats", "unigram entropy of generated text, nats"),
    ("infill", "infill: tokens right, %"),
)


def quality_by_steps(results: Results) -> Figure | None:
    """Judge perplexity, entropy and infill accuracy over the number of steps; a level line for rows without steps."""
    from matplotlib.figure import Figure

    cells = [c for c in gather(results) if steps_of(c)]
    if not cells:
        return None
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    drawn_as = style(results)
    reference = results.data.get("reference_text") or {}
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        dress(axes, title, "denoising steps of a whole response", "")
        axes.set_xscale("log", base=2)
        for cell in cells:
            _by_steps(axes, cell, name, drawn_as[cell.name])
        if reference.get(name):
            axes.axhline(reference[name], color="black", linewidth=0.8, linestyle=":", label="held-out text")
        ticks = sorted({int(s) for c in cells for s in steps_of(c) if s.isdigit()})
        if ticks:
            axes.set_xticks(ticks, [str(t) for t in ticks])
            axes.minorticks_off()
        if name == "judge_ppl":
            axes.set_yscale("log")
            axes.legend(fontsize=7, frameon=False)
    return figure


def _by_steps(axes: Axes, cell: Cell, name: str, drawn_as: tuple[str, str]) -> None:
    """Draw one cell in a panel, at its lowest temperature."""
    colour, marker = drawn_as
    points = [(s, *_value(cell, s, name)) for s in steps_of(cell)]
    token_by_token = [value for s, value, _ in points if s == "ar" and value is not None]
    for value in token_by_token:
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=f"{cell.name} (no steps)")
    swept = [(int(s), value, error) for s, value, error in points if s != "ar" and value is not None]
    if swept:
        axes.errorbar(
            [s for s, *_ in swept],
            [value for _, value, _ in swept],
            yerr=[error for *_, error in swept],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=cell.name,
        )


def _value(cell: Cell, steps: str, name: str) -> tuple[float | None, float]:
    """Return (figure, its standard error)."""
    if name == "infill":
        found = infill_accuracy(cell, steps)
        return (None, 0.0) if found is None else (100 * found.mean, 100 * (found.se or 0.0))
    points = text_points(cell, steps)
    return (points[0].get(name) if points else None), 0.0


def parallelism_curves(results: Results) -> Figure | None:
    """Accuracy against tokens per forward: a column a rule, a line a cell, a row a task."""
    from matplotlib.figure import Figure

    curves = {cell.name: curves_of(cell) for cell in gather(results)}
    keys = list(dict.fromkeys(key for found in curves.values() for key in found))
    if not keys:
        return None
    tasks = [task for task in TASKS if any(key[1] == task for key in keys)]
    rules = list(dict.fromkeys(_rule(key) for key in keys))
    figure = Figure(figsize=(1.0 + 3.3 * len(rules), 0.6 + 3.0 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(rules), squeeze=False, sharey="row", sharex="col")
    drawn_as = style(results)
    for row, task in enumerate(tasks):
        for column, rule in enumerate(rules):
            axes = panels[row][column]
            title = rule_name((rule[0], task, *rule[1:])).replace(", ", "\n", 1) if row == 0 else ""
            dress(axes, title, "tokens per forward" if row == len(tasks) - 1 else "", "")
            axes.title.set_fontsize(9)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            for name, found in curves.items():
                for key, seeds in found.items():
                    if key[1] == task and _rule(key) == rule:
                        _curve(axes, curve_points(seeds), name, drawn_as[name])
        panels[row][0].set_ylabel(f"{TASKS[task]}: right, %")
    names = {line.get_label(): line for axes in panels.flat for line in axes.containers}
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def _rule(key: CurveKey) -> tuple[str, int | None, float | None]:
    rule, _, block_size, joins = key
    return rule, block_size, joins


def _curve(axes: Axes, points: list[Any], name: str, drawn_as: tuple[str, str]) -> None:
    colour, marker = drawn_as
    axes.errorbar(
        [rho.mean for _, rho, _ in points],
        [100 * accuracy.mean for *_, accuracy in points],
        yerr=[100 * (accuracy.se or 0.0) for *_, accuracy in points],
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.2,
        capsize=2,
        label=name,
    )
