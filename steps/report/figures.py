"""Figures of a grid, made from results alone so that they can be drawn again from results.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.report.compare import has_no_bound, headline_nats, speed_at
from steps.report.schema import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# one colour per row in table order; colour-blind safe (Okabe-Ito), markers tell the rows apart as well
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", ":", "-.")


def _style(results: Results) -> dict[str, tuple[str, str]]:
    names = list(dict.fromkeys(r.name for r in results.cells))
    return {n: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, n in enumerate(names)}


def _axes(title: str, x: str, y: str, size: tuple[float, float] = (7.0, 4.4)) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def quality_vs_speed(results: Results) -> Figure | None:
    """Likelihood against tokens per second. Hollow: exact (AR). Filled: a bound, so the true value is lower."""
    figure, axes = _axes(
        "Quality and speed", "tokens per second (batch 1)", "held-out nats per token (lower is better)"
    )
    style = _style(results)
    drawn = False
    for row in results.cells:
        headline = headline_nats(row)
        if row.bench is None or headline is None:
            continue
        nats, kind = headline
        colour, marker = style[row.name]
        for i, (steps, bench) in enumerate(row.bench.steps.items()):
            low, high = bench["tokens_per_s"]["ci95"]
            x = bench["tokens_per_s"]["median"]
            axes.errorbar(
                x,
                nats,
                xerr=[[max(0.0, x - low)], [max(0.0, high - x)]],
                color=colour,
                marker=marker,
                markersize=7,
                markerfacecolor="none" if kind == "exact" else colour,
                linestyle="none",
                label=f"{row.row_id} ({kind})" if i == 0 else None,
            )
            if steps != "ar":
                axes.annotate(steps, (x, nats), xytext=(4, 5), textcoords="offset points", fontsize=7, color=colour)
            drawn = True
    floor = next(
        (r.eval.unigram_nats_per_token for r in results.cells if r.eval and r.eval.unigram_nats_per_token), None
    )
    if floor is not None:
        axes.axhline(floor, color="grey", linewidth=1, linestyle="--")
        axes.annotate("unigram floor", (0.01, floor), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    boundless = [r.row_id for r in results.cells if has_no_bound(r)]
    if boundless:
        note = f"no bound: {', '.join(boundless)}\n(see text quality and speed)"
        axes.annotate(note, (0.99, 0.99), xycoords="axes fraction", fontsize=7, ha="right", va="top", color="grey")
    if not drawn:
        return None
    axes.set_xscale("log")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def text_quality_vs_speed(results: Results) -> Figure | None:
    """Judge perplexity of generated text against tokens per second, all rows: a panel of its own, no bound in it.

    Each point is a temperature with the text's unigram entropy beside it, since dull text pleases any judge. Hollow:
    the speed at the number of steps the text was written with was not measured but follows from others.
    """
    figure, axes = _axes("Generated text and speed", "tokens per second (batch 1)", _judge_label(results))
    style = _style(results)
    drawn = False
    for row in results.cells:
        colour, marker = style[row.name]
        label: str | None = row.row_id
        for point in row.eval.frontier if row.eval else []:
            speed = speed_at(row, point.get("steps")) if point.get("judge_ppl") else None
            if speed is None:
                continue
            x, measured = speed
            face = colour if measured else "none"
            axes.plot(x, point["judge_ppl"], marker, color=colour, markerfacecolor=face, markersize=7, label=label)
            entropy = point.get("unigram_entropy_nats")
            text = f"T={point['temperature']:g}" + ("" if entropy is None else f", H={entropy:.1f}")
            axes.annotate(text, (x, point["judge_ppl"]), xytext=(5, 3), textcoords="offset points", fontsize=6)
            label, drawn = None, True
    reference = results.data.get("reference_text") or {}
    if reference.get("judge_ppl"):
        axes.axhline(reference["judge_ppl"], color="grey", linewidth=1, linestyle="--")
        told = f"held-out text, H={reference.get('unigram_entropy_nats') or 0:.1f}"
        where = (0.01, reference["judge_ppl"])
        axes.annotate(told, where, xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    title = "H: unigram entropy, nats\nhollow: speed interpolated"
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title=title, title_fontsize=6)
    return figure if drawn else None


def latent_health(results: Results) -> Figure | None:
    """What rows without a bound are watched by while they train: accuracies, and squared errors beside them."""
    from matplotlib.figure import Figure

    rows = [
        r for r in results.cells if has_no_bound(r) and r.train and any(len(c) > 1 for c in r.train.health.values())
    ]
    if not rows:
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    style = _style(results)
    for axes, ending, title in zip(
        figure.subplots(1, 2), ("_accuracy", "_mse"), ("fraction of tokens right", "mean squared error"), strict=True
    ):
        axes.set_title(f"Latent rows in training: {title}", fontsize=11)
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.25)
        for row in rows:
            curves = {k: v for k, v in (row.train.health if row.train else {}).items() if k.endswith(ending)}
            for i, (name, points) in enumerate(sorted(curves.items())):
                smooth = _running_mean([y for _, y in points], max(1, len(points) // 20))
                label = f"{row.row_id}: {name.removesuffix(ending).replace('_', ' ')}"
                line, colour = _LINES[i % len(_LINES)], style[row.name][0]
                axes.plot([x for x, _ in points], smooth, line, color=colour, label=label, linewidth=1.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7, frameon=False)
        if ending == "_mse" and axes.lines:
            axes.set_yscale("log")
    return figure


def loss_curves(results: Results) -> Figure | None:
    """Training cross-entropy of each row over its optimiser steps (a running value on noisy masks)."""
    figure, axes = _axes("Training", "optimiser step", "cross-entropy, nats per masked (AR: next) token")
    style = _style(results)
    drawn = False
    for row in results.cells:
        curve = row.train.curve if row.train and not has_no_bound(row) else []
        points = [(p["step"], p["ce"]) for p in curve if "ce" in p]
        if len(points) < 2:
            continue
        smooth = _running_mean([y for _, y in points], max(1, len(points) // 20))
        axes.plot([x for x, _ in points], smooth, color=style[row.name][0], label=row.row_id, linewidth=1.4)
        drawn = True
    axes.legend(fontsize=8, frameon=False)
    return figure if drawn else None


def mask_ratio_vs_loss(results: Results) -> Figure | None:
    """Masked cross-entropy at fixed mask ratios on held-out text."""
    figure, axes = _axes("Held-out loss by mask ratio", "mask ratio", "nats per masked token")
    style = _style(results)
    drawn = False
    for row in results.cells:
        points = sorted((float(r), e) for r, e in (row.eval.masked_nll if row.eval else {}).items())
        if not points:
            continue
        colour, marker = style[row.name]
        axes.errorbar(
            [x for x, _ in points],
            [e.value for _, e in points],
            yerr=[2 * (e.se or 0.0) for _, e in points],
            color=colour,
            marker=marker,
            label=row.row_id,
            capsize=2,
            linewidth=1.2,
        )
        drawn = True
    axes.legend(fontsize=8, frameon=False, title="bars: 2 standard errors", title_fontsize=7)
    return figure if drawn else None


def frontier(results: Results) -> Figure | None:
    """Judge perplexity against unigram entropy over temperatures: text is good only on both axes at once."""
    figure, axes = _axes("Generation frontier", "unigram entropy of the generated text, nats", _judge_label(results))
    style = _style(results)
    drawn = False
    for row in results.cells:
        points = [p for p in (row.eval.frontier if row.eval else []) if p.get("judge_ppl")]
        points = [p for p in points if p.get("unigram_entropy_nats") is not None]
        if not points:
            continue
        colour, marker = style[row.name]
        points.sort(key=lambda p: p["temperature"])
        xs, ys = [p["unigram_entropy_nats"] for p in points], [p["judge_ppl"] for p in points]
        axes.plot(xs, ys, color=colour, marker=marker, label=row.row_id, linewidth=1.0)
        for p, x, y in zip(points, xs, ys, strict=True):
            axes.annotate(f"T={p['temperature']:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6)
        drawn = True
    reference = results.data.get("reference_text") or {}
    if drawn and reference.get("judge_ppl"):
        axes.plot(reference["unigram_entropy_nats"], reference["judge_ppl"], "k+", markersize=11, label="held-out text")
    axes.set_yscale("log")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure if drawn else None


def prediction_strips(strips: dict[str, dict[str, Any]]) -> Figure | None:
    """One strip of tokens per row: given, predicted right, predicted wrong, at one mask ratio."""
    from matplotlib.figure import Figure

    strips = {k: v for k, v in strips.items() if v}
    if not strips:
        return None
    colours = {"given": "#ECECEC", "right": "#009E73", "wrong": "#D55E00"}
    per_line, count = 16, max(len(s["tokens"]) for s in strips.values())
    lines = -(-count // per_line)
    figure = Figure(figsize=(12, 0.5 + len(strips) * (0.3 + 0.24 * lines)), layout="constrained")
    axes_list = figure.subplots(len(strips), squeeze=False)[:, 0]
    for axes, (name, strip) in zip(axes_list, strips.items(), strict=True):
        masked = [s for s in strip["state"] if s != "given"]
        right = sum(s == "right" for s in masked)
        axes.set_title(
            f"{name}: {right} of {len(masked)} masked tokens right at mask ratio {strip['mask_ratio']:g}",
            fontsize=9,
            loc="left",
        )
        for i, (token, state) in enumerate(zip(strip["tokens"], strip["state"], strict=True)):
            column, line = i % per_line, i // per_line
            axes.add_patch(_box(column, -line, colours[state]))
            axes.text(column + 0.5, -line + 0.5, _short(token), ha="center", va="center", fontsize=6)
        axes.set_xlim(0, per_line)
        axes.set_ylim(-lines + 1, 1)
        axes.axis("off")
    return figure


def commit_order(histories: dict[str, dict[str, Any]]) -> Figure | None:
    """Heat map of the denoising step at which each generated token was committed."""
    from matplotlib.figure import Figure

    histories = {k: v for k, v in histories.items() if v and v.get("commit_step")}
    if not histories:
        return None
    per_line = 16
    lines = [-(-len(h["commit_step"]) // per_line) for h in histories.values()]
    figure = Figure(figsize=(12, 0.6 + sum(0.35 + 0.26 * n for n in lines)), layout="constrained")
    axes_list = figure.subplots(len(histories), squeeze=False, height_ratios=lines)[:, 0]
    from matplotlib import colormaps

    palette = colormaps["viridis"]
    for axes, (name, history), n in zip(axes_list, histories.items(), lines, strict=True):
        last = max(history["commit_step"])
        axes.set_title(f"{name}: denoising step of each token, first (dark) to {last} (light)", fontsize=9, loc="left")
        for i, (token, step) in enumerate(zip(history["tokens"], history["commit_step"], strict=True)):
            shade = (step - 1) / max(1, last - 1)
            axes.add_patch(_box(i % per_line, -(i // per_line), palette(shade)))
            axes.text(
                i % per_line + 0.5,
                -(i // per_line) + 0.5,
                _short(token),
                ha="center",
                va="center",
                fontsize=6,
                color="white" if shade < 0.6 else "black",
            )
        axes.set_xlim(0, per_line)
        axes.set_ylim(-n + 1, 1)
        axes.axis("off")
    return figure


def draw_all(
    results: Results, strips: dict[str, dict[str, Any]], histories: dict[str, dict[str, Any]], directory: Path
) -> dict[str, Path]:
    """Write every figure that has something to show; return name -> path of the PNG."""
    makers: dict[str, Callable[[], Figure | None]] = {
        "quality_vs_speed": lambda: quality_vs_speed(results),
        "text_quality_vs_speed": lambda: text_quality_vs_speed(results),
        "loss_curves": lambda: loss_curves(results),
        "mask_ratio_vs_loss": lambda: mask_ratio_vs_loss(results),
        "frontier": lambda: frontier(results),
        "prediction_strip": lambda: prediction_strips(strips),
        "latent_health": lambda: latent_health(results),
        "commit_order": lambda: commit_order(histories),
    }
    written = {}
    for name, make in makers.items():
        figure = make()
        if figure is not None:
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=130)
            written[name] = path
    return written


def _judge_label(results: Results) -> str:
    judges = {p.get("judge") for r in results.cells if r.eval for p in r.eval.frontier}
    return "judge perplexity" + (f", {judges.pop()}" if len(judges) == 1 else "")


def _box(x: float, y: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, facecolor=colour, edgecolor="none")


def _short(token: str, limit: int = 11) -> str:
    text = token.replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$").strip() or "·"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _running_mean(values: list[float], window: int) -> list[float]:
    out = []
    for i in range(len(values)):
        start = max(0, i - window + 1)
        out.append(sum(values[start : i + 1]) / (i + 1 - start))
    return out
