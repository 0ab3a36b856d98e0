"""Figures of a grid, made from results alone so that they can be drawn again from results.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.report.cells import gather, spread
from steps.report.drawing import LINES, dress, plain_axes, style
from steps.report.schema import Results
from steps.report.strips import commit_order, prediction_strips
from steps.report.sweep_figures import parallelism_curves, quality_by_steps
from steps.report.tradeoff import judge_label, quality_vs_speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def latent_health(results: Results) -> Figure | None:
    """What cells without a bound are watched by while they train: accuracies, and squared errors beside them."""
    from matplotlib.figure import Figure

    curves = [
        (cell.name, name, points)
        for cell in gather(results)
        for row in cell.done
        if cell.latent and row.train
        for name, points in sorted(row.train.health.items())
        if len(points) > 1
    ]
    if not curves:
        return None
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    drawn_as = style(results)
    for axes, ending, title in zip(
        figure.subplots(1, 2), ("_accuracy", "_mse"), ("fraction of tokens right", "mean squared error"), strict=True
    ):
        dress(axes, f"Latent rows in training: {title}", "optimiser step", "")
        lines: dict[tuple[str, str], str] = {}
        for cell, name, points in curves:
            if not name.endswith(ending):
                continue
            known = (cell, name) in lines
            line = lines.setdefault((cell, name), LINES[sum(c == cell for c, _ in lines) % len(LINES)])
            label = None if known else f"{cell}: {name.removesuffix(ending).replace('_', ' ')}"
            smooth = _running_mean([y for _, y in points], max(1, len(points) // 20))
            axes.plot([x for x, _ in points], smooth, line, color=drawn_as[cell][0], label=label, linewidth=1.3)
        if lines:
            axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        if ending == "_mse" and axes.lines:
            axes.set_yscale("log")
    return figure


def loss_curves(results: Results) -> Figure | None:
    """Training cross-entropy over optimiser steps (a running value on noisy masks), a line a seed."""
    figure, axes = plain_axes("Training", "optimiser step", "cross-entropy, nats per masked (AR: next) token")
    drawn_as = style(results)
    drawn = False
    for cell in gather(results):
        label: str | None = cell.name
        for row in cell.done if not cell.latent else ():
            points = [(p["step"], p["ce"]) for p in (row.train.curve if row.train else []) if "ce" in p]
            if len(points) < 2:
                continue
            smooth = _running_mean([y for _, y in points], max(1, len(points) // 20))
            axes.plot([x for x, _ in points], smooth, color=drawn_as[cell.name][0], label=label, linewidth=1.3)
            label, drawn = None, True
    if drawn:
        axes.legend(fontsize=8, frameon=False)
    return figure if drawn else None


def mask_ratio_vs_loss(results: Results) -> Figure | None:
    """Masked cross-entropy at fixed mask ratios on held-out text, means over the seeds."""
    figure, axes = plain_axes("Held-out loss by mask ratio", "mask ratio", "nats per masked token")
    drawn_as = style(results)
    drawn = False
    for cell in gather(results):
        evals = [r.eval for r in cell.measured if r.eval]
        ratios = sorted({float(r): r for e in evals for r in e.masked_nll}.items())
        points = [(x, s) for x, r in ratios if (s := spread((e.masked_nll.get(r) for e in evals), cell.clusters))]
        if not points:
            continue
        colour, marker = drawn_as[cell.name]
        axes.errorbar(
            [x for x, _ in points],
            [s.mean for _, s in points],
            yerr=[s.half_width() or 0.0 for _, s in points],
            color=colour,
            marker=marker,
            label=cell.name,
            capsize=2,
            linewidth=1.2,
        )
        drawn = True
    if drawn:
        axes.legend(fontsize=8, frameon=False, title="bars: 95 % intervals", title_fontsize=7)
    return figure if drawn else None


def frontier(results: Results) -> Figure | None:
    """Judge perplexity against unigram entropy over temperatures: text is good only on both axes at once."""
    figure, axes = plain_axes(
        "Generation frontier", "unigram entropy of the generated text, nats", judge_label(results)
    )
    drawn_as = style(results)
    drawn = False
    for cell in gather(results):
        points = [p for p in cell.frontier if p.get("judge_ppl") and p.get("unigram_entropy_nats") is not None]
        if not points:
            continue
        colour, marker = drawn_as[cell.name]
        xs, ys = [p["unigram_entropy_nats"] for p in points], [p["judge_ppl"] for p in points]
        axes.plot(xs, ys, color=colour, marker=marker, label=cell.name, linewidth=1.0)
        for p, x, y in zip(points, xs, ys, strict=True):
            axes.annotate(f"T={p['temperature']:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6)
        drawn = True
    reference = results.data.get("reference_text") or {}
    if drawn and reference.get("judge_ppl"):
        axes.plot(reference["unigram_entropy_nats"], reference["judge_ppl"], "k+", markersize=11, label="held-out text")
    axes.set_yscale("log")
    if drawn:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure if drawn else None


def draw_all(
    results: Results, strips: dict[str, dict[str, Any]], histories: dict[str, dict[str, Any]], directory: Path
) -> dict[str, Path]:
    """Write every figure that has something to show; return name -> path of the PNG."""
    makers: dict[str, Callable[[], Figure | None]] = {
        "quality_vs_speed": lambda: quality_vs_speed(results),
        "loss_curves": lambda: loss_curves(results),
        "mask_ratio_vs_loss": lambda: mask_ratio_vs_loss(results),
        "frontier": lambda: frontier(results),
        "prediction_strip": lambda: prediction_strips(strips),
        "latent_health": lambda: latent_health(results),
        "commit_order": lambda: commit_order(histories),
        "quality_by_steps": lambda: quality_by_steps(results),
        "parallelism": lambda: parallelism_curves(results),
    }
    written = {}
    for name, make in makers.items():
        figure = make()
        if figure is not None:
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=130)
            written[name] = path
    return written


def _running_mean(values: list[float], window: int) -> list[float]:
    out = []
    for i in range(len(values)):
        start = max(0, i - window + 1)
        out.append(sum(values[start : i + 1]) / (i + 1 - start))
    return out
