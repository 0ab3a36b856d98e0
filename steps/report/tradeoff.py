"""Quality against speed: likelihood beside generated text, each with the front of what nothing else beats on both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steps.report.cells import BLOCK_NELBO, EXACT, MIN_SEEDS_TO_RANK, NELBO, Cell, Speed, gather, spread
from steps.report.drawing import dress, style
from steps.report.schema import Estimate, Results
from steps.report.texts import TextVerdict, independent_texts, verdicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_GAP = 0.072
"""Least distance of two labels, as part of the panel's height."""
SPEED = "tokens per second, batch 1"
FRONTS = {EXACT: ("#555555", ":"), NELBO: ("#222222", "-"), BLOCK_NELBO: ("#222222", "-.")}
LEGEND = {
    EXACT: "exact likelihood (token by token)",
    NELBO: "NELBO, an upper bound",
    BLOCK_NELBO: "block NELBO, a bound",
}


@dataclass(frozen=True)
class Point:
    """A cell in a panel.

    Attributes:
        cell: the cell.
        speed: tokens per second.
        quality: lower is better.
        low: lower end of its 95 % interval; None where there is none.
        high: upper end.
        group: points of a group are comparable and share a front; None: on no front.
        label: text beside it.
        more: the same quality at other speeds.
    """

    cell: Cell
    speed: Speed
    quality: float
    low: float | None
    high: float | None
    group: str | None
    label: str
    more: tuple[tuple[str, Speed], ...] = ()


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one matches in both and beats in one of speed and quality, fastest first."""

    def beaten(p: Point) -> bool:
        return any(
            q.speed.value >= p.speed.value
            and q.quality <= p.quality
            and (q.speed.value, q.quality) != (p.speed.value, p.quality)
            for q in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: -p.speed.value)


def likelihood_points(results: Results) -> list[Point]:
    """Return the cells with a likelihood figure of their own kind, at the fewest steps they were timed with."""
    found = []
    for cell in gather(results):
        value = cell.likelihood(cell.kind) if cell.kind else None
        if value is None or not cell.speeds:
            continue
        first, *others = sorted(cell.speeds.items(), key=lambda item: -item[1].value)
        half = value.half_width()
        ends = (None, None) if half is None else (value.mean - half, value.mean + half)
        group = cell.kind if cell.trained or cell.causal else None
        found.append(Point(cell, first[1], value.mean, *ends, group, f"{cell.name} {value.mean:.2f}", tuple(others)))
    return found


def text_points(results: Results) -> list[Point]:
    """Return the cells with judged text, at the speed of the steps it was written with.

    Of each the lowest temperature that passes the checks, else the lowest; only texts that pass stand on the front.
    """
    found = []
    for verdict in verdicts(results).values():
        cell, point = verdict.cell, verdict.point
        speed = cell.speed_at(point.get("steps"))
        if speed is None or not point.get("judge_ppl"):
            continue
        group = "text" if verdict.passes and (cell.trained or cell.causal) else None
        entropy = point.get("unigram_entropy_nats")
        label = f"{cell.name} {perplexity(point['judge_ppl'])}" + ("" if entropy is None else f", H {entropy:.1f}")
        found.append(Point(cell, speed, point["judge_ppl"], *_judge_ends(verdict), group, label))
    return found


def perplexity(value: float) -> str:
    """Return a perplexity with about three digits."""
    return f"{value:,.{0 if value >= 100 else 1}f}"


def _judge_ends(verdict: TextVerdict) -> tuple[float | None, float | None]:
    told = [Estimate(**p["judge_nats_per_token"]) for p in verdict.point["by_seed"] if p.get("judge_nats_per_token")]
    nats = spread(told, independent_texts(verdict.point))
    half = nats.half_width() if nats else None
    ppl = verdict.point["judge_ppl"]
    return (None, None) if half is None else (ppl * math.exp(-half), ppl * math.exp(half))


def quality_vs_speed(results: Results) -> Figure | None:
    """Draw both panels, or the one that has anything to show."""
    from matplotlib.figure import Figure

    panels = [(draw, points) for draw, points in _panels(results) if points]
    if not panels:
        return None
    figure = Figure(figsize=(9.0, 4.6 * len(panels)), layout="constrained")
    for axes, (draw, points) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        draw(axes, results, points)
    return figure


def _panels(results: Results) -> list:
    return [(_likelihood_panel, likelihood_points(results)), (_text_panel, text_points(results))]


def _likelihood_panel(axes: Axes, results: Results, points: Sequence[Point]) -> None:
    fewest = sorted({steps for p in points for steps, v in p.cell.speeds.items() if v is p.speed and steps != "ar"})
    timed = f" in {', '.join(fewest)} steps" if fewest else ""
    title = f"Likelihood, and speed{timed}{_caveat(results)}"
    dress(axes, title, SPEED, "held-out nats per token, lower is better")
    axes.set_xscale("log")
    for point in points:
        _mark(axes, results, point, hollow=point.cell.kind == EXACT)
    floors = [r.eval.unigram_nats_per_token for p in points for r in p.cell.measured if r.eval]
    floor = next((f for f in floors if f), None)
    if floor is not None:
        _reference(axes, floor, f"unigram floor {floor:.2f}")
    groups = dict.fromkeys(p.group for p in points if p.group)
    for group in groups:
        _front(axes, [p for p in points if p.group == group], *FRONTS[group], label=f"front, {LEGEND[group]}")
    told = ["bars: 95 %; the text behind them is common to all rows, so differences are surer than they look"]
    more = sorted({steps for p in points for steps, _ in p.more}, key=int)
    told += [f"small: the same bound at the speed of {', '.join(more)} steps"] if more else []
    boundless = [c.name for c in gather(results) if c.latent]
    told += [f"without a bound: {', '.join(boundless)}"] if boundless else []
    _finish(axes, results, points, told)


def _text_panel(axes: Axes, results: Results, points: Sequence[Point]) -> None:
    steps = sorted({str(v.point["steps"]) for v in verdicts(results).values() if v.point.get("steps")})
    written = f" in {', '.join(steps)} steps" if steps else ""
    dress(axes, f"Generated text, and speed{written}", SPEED, judge_label(results))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for point in points:
        _mark(axes, results, point, faded=point.group is None)
    reference = results.data.get("reference_text") or {}
    if reference.get("judge_ppl"):
        entropy = reference.get("unigram_entropy_nats")
        told = "" if entropy is None else f", H {entropy:.1f}"
        _reference(axes, reference["judge_ppl"], f"held-out text {perplexity(reference['judge_ppl'])}{told}")
    passing = [p for p in points if p.group]
    if passing:
        _front(axes, passing, "#222222", "-", label="front, text that passes the checks")
    told = ["H: unigram entropy, nats; bars: 95 %"]
    if len(passing) < len(points):
        told.append("pale: the text fails the checks, or cannot be judged: its perplexity says nothing")
    if any(not p.speed.measured for p in points):
        told.append("hollow: speed interpolated between measured numbers of steps")
    _finish(axes, results, points, told)


def _caveat(results: Results) -> str:
    count = len(set(results.seeds))
    return "" if count >= MIN_SEEDS_TO_RANK else f" ({count} seed{'s' * (count > 1)}: no ranking)"


def _mark(axes: Axes, results: Results, point: Point, *, hollow: bool = False, faded: bool = False) -> None:
    colour, marker = style(results)[point.cell.name]
    alpha = 0.35 if faded else 1.0
    shape = {"color": colour, "marker": marker, "linestyle": "none", "alpha": alpha}
    for _, speed in point.more:
        axes.plot(speed.value, point.quality, markersize=4, markerfacecolor="none", **shape)
    axes.errorbar(
        point.speed.value,
        point.quality,
        xerr=_bar(point.speed.value, point.speed.low, point.speed.high),
        yerr=_bar(point.quality, point.low, point.high),
        markersize=8,
        markerfacecolor="none" if hollow or not point.speed.measured else colour,
        elinewidth=1.0,
        ecolor=(colour, 0.45 * alpha),
        zorder=3,
        **shape,
    )


def _bar(value: float, low: float | None, high: float | None) -> list[list[float]] | None:
    return None if low is None or high is None else [[max(0.0, value - low)], [max(0.0, high - value)]]


def _front(axes: Axes, points: Sequence[Point], colour: str, line: str, label: str) -> None:
    """Draw a front as stairs: whatever lies left of and above them is matched in both and beaten in one."""
    front = pareto_front(points)
    (left, _), (_, top) = axes.get_xlim(), axes.get_ylim()
    xs = [front[0].speed.value, *(p.speed.value for p in front), left]
    ys = [top, *(p.quality for p in front), front[-1].quality]
    axes.plot(xs, ys, line, color=colour, linewidth=1.2, alpha=0.7, zorder=2, label=label, drawstyle="steps-post")
    axes.set_xlim(left, axes.get_xlim()[1])
    axes.set_ylim(axes.get_ylim()[0], top)


def _reference(axes: Axes, value: float, text: str) -> None:
    axes.plot([0, 1], [value] * 2, color="grey", lw=1, ls=(0, (6, 3)), transform=axes.get_yaxis_transform())
    axes.annotate(text, (0.005, value), xycoords=("axes fraction", "data"), fontsize=8.5, va="bottom", color="#555555")


def _finish(axes: Axes, results: Results, points: Sequence[Point], notes: Sequence[str]) -> None:
    """Label the points in the margin, where labels cannot overlap, and explain the panel below it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, log in ((axes.xaxis, True), (axes.yaxis, axes.get_yscale() == "log")):
        if log:
            axis.set_major_locator(LogLocator(subs=_ticks(axis.get_view_interval())))
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
            axis.set_minor_formatter(NullFormatter())
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # what follows is placed by them
    to_panel = axes.transData + axes.transAxes.inverted()
    places = [to_panel.transform((p.speed.value, p.quality)) for p in points]
    wanted = sorted((float(y), float(x), i) for i, (x, y) in enumerate(places))
    for (y, x, i), height in zip(wanted, spaced([y for y, *_ in wanted], LABEL_GAP), strict=True):
        point = points[i]
        colour, marker = style(results)[point.cell.name]
        alpha = 1.0 if point.group else 0.35
        fixed = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([x, 1.025], [y, height], color="#cccccc", linewidth=0.7, zorder=1, **fixed)
        axes.plot(1.035, height, marker, color=colour, alpha=alpha, markersize=6, **fixed)
        text = "black" if point.group else "#777777"
        axes.text(1.06, height, point.label, fontsize=9.5, color=text, va="center", transform=axes.transAxes)
    handles, _ = axes.get_legend_handles_labels()
    told = {"title": "\n".join(notes), "fontsize": 8.5, "title_fontsize": 8.5, "alignment": "left"}
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0, frameon=False, **told)


def _ticks(limits: Sequence[float]) -> tuple[float, ...]:
    """Return the multiples of powers of ten that are labelled: fewer, the more decades there are."""
    decades = math.log10(max(limits) / min(limits))
    return (1, 2, 3, 5) if decades < 1.5 else (1, 2, 5) if decades < 2.5 else (1,)


def spaced(wanted: Sequence[float], gap: float) -> list[float]:
    """Return ascending positions in [0, 1] close to the wanted ones, at least `gap` apart where they fit."""
    placed: list[float] = []
    for y in wanted:
        placed.append(max(y, placed[-1] + gap) if placed else max(0.0, y))
    ceiling = 1.0
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def judge_label(results: Results) -> str:
    """Return the name of the axis of judge perplexity, with the judge where there is one."""
    judges = {p.get("judge") for r in results.cells if r.eval for p in r.eval.frontier}
    return "judge perplexity" + (f", {judges.pop()}" if len(judges) == 1 else "")
