"""The grid as Markdown tables, one line a cell. results.csv has one line a row and metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steps.report.cells import BLOCK_NELBO, EXACT, NELBO, Cell, Speed, Spread, gather, spread
from steps.report.schema import Results
from steps.report.texts import judge_tells, overlap_gain, seeds_fault

NOT_MEASURED = "-"
OVERLAP_SIZES = (1, 2)
MAX_SHOWN = 8
"""Numbers of a map that stand in a table one by one."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(r) for r in rows)])


def quality_table(results: Results) -> str:
    """Return likelihood and masked accuracy. Bounds and exact values stand in columns of their own."""
    header = ["row", "exact nll", "NELBO", "block NELBO", "bits/byte", "acc r=.15", "acc r=.5", "acc r=.85"]
    body = []
    for cell in gather(results):
        evals = [r.eval for r in cell.measured if r.eval]
        likelihood = [estimate(cell.likelihood(kind)) for kind in (EXACT, NELBO, BLOCK_NELBO)]
        bits = figure(spread(e.bits_per_byte for e in evals), ".3f")
        ratios = ("0.15", "0.5", "0.85")
        accuracy = [estimate(spread(e.masked_accuracy.get(r) for e in evals), percent=True) for r in ratios]
        body.append([cell.label, *likelihood, bits, *accuracy])
    return markdown_table(header, body)


def speed_table(results: Results) -> str:
    """Return tokens per second with 95 % intervals, one column per number of denoising steps."""
    cells = [c for c in gather(results) if c.bench]
    settings = _step_settings(cells)
    header = ["row", *(f"tok/s, {s} steps" if s != "ar" else "tok/s, AR" for s in settings), "first token s", "mem GB"]
    body = []
    for cell in cells:
        assert cell.bench is not None
        name = cell.name if cell.trained or cell.causal else f"{cell.name} (untrained, unranked)"
        first = next((b.get("first_token_s") for b in cell.bench.steps.values()), None)
        memory = number(cell.bench.peak_memory_gb, ".2f")
        body.append([name, *(throughput(cell.speeds.get(s)) for s in settings), number(first, ".2f"), memory])
    return markdown_table(header, body)


def cost_table(results: Results) -> str:
    """Return every budget unit side by side: tokens, FLOPs, seconds, and what shared work cost."""
    columns = (
        ("tokens", "response_tokens", 1.0, ",.0f"),
        ("positions", "positions", 1.0, ",.0f"),
        ("TFLOP", "flops", 1e12, ",.1f"),
        ("teacher TFLOP", "teacher_flops", 1e12, ",.1f"),
        ("train s", "train_s", 1.0, ",.0f"),
        ("extraction s", "extraction_s", 1.0, ",.0f"),
        ("mem GB", "peak_memory_gb", 1.0, ".1f"),
        ("new params", "new_params", 1.0, ",.0f"),
    )
    header = ["row", *(title for title, *_ in columns), "tok/s train"]
    body = []
    for cell in gather(results):
        if cell.cost("flops") is None:
            continue
        rate = spread(r.train.tokens_per_s for r in cell.done if r.train)
        body.append([cell.label, *(figure(cell.cost(n), f, unit) for _, n, unit, f in columns), figure(rate, ",.0f")])
    return markdown_table(header, body)


def frontier_table(results: Results) -> str:
    """Return generation quality over temperatures: judge perplexity never without entropy and repetition."""
    columns = (
        ("forwards", "num_forwards", ".0f"),
        ("judge ppl", "judge_ppl", ",.1f"),
        ("tokens shuffled", "shuffled_judge_ppl", ",.1f"),
        ("judge", "judge", ""),
        ("entropy nats", "unigram_entropy_nats", ".2f"),
        ("distinct-2", "distinct_2", ".2f"),
        ("repeated 4-grams", "repetition_4", ".3f"),
    )

    def line(point: Mapping[str, Any]) -> list[str]:
        by_seed = point.get("by_seed") or [point]
        return [
            figure(spread(p.get(key) for p in by_seed), form) if form else str(point.get(key, NOT_MEASURED))
            for _, key, form in columns
        ]

    reference = results.data.get("reference_text") or {}
    body = []
    for cell in gather(results):
        for point in cell.frontier:
            clean = "passes" if judge_tells(reference) else "cannot be judged"
            check = seeds_fault(point["by_seed"], reference) or clean
            body.append([cell.label, f"{point['temperature']:g}", *line(point), check])
    if body and reference:
        body.append(["held-out text", NOT_MEASURED, *line(reference), NOT_MEASURED])
    return markdown_table(["row", "T", *(title for title, *_ in columns), "check"], body)


def overlap_table(results: Results) -> str:
    """Return how much continuations share with the true ones, beside their control."""
    header = ["row", "T"]
    for n in OVERLAP_SIZES:
        header += [f"{n}-grams, own", "other", "difference"]
    body = []
    for cell in gather(results):
        for point in cell.frontier:
            if point.get("overlap_1") is None:
                continue
            line = [cell.label, f"{point['temperature']:g}"]
            for n in OVERLAP_SIZES:
                line += [percent(point.get(f"overlap_{n}")), percent(point.get(f"overlap_{n}_other"))]
                line.append(estimate(overlap_gain(point, n), percent=True, sign="+"))
            body.append(line)
    return markdown_table(header, body)


def health_table(results: Results) -> str:
    """Return the figures that rows state of their own health: a line a figure, a column a cell that has any."""
    columns = {c.label: health_lines(c.diagnostics) for c in gather(results) if c.diagnostics}
    names = list(dict.fromkeys(name for lines in columns.values() for name in lines))
    body = [[name, *(lines.get(name, NOT_MEASURED) for lines in columns.values())] for name in names]
    return markdown_table(["figure", *columns], body)


def health_lines(diagnostics: Mapping[str, Any]) -> dict[str, str]:
    """Return figure -> text. A map of numbers is one line, its keys in the name; of a long one only its range."""
    lines = {}
    for name, value in diagnostics.items():
        label = name.replace("_", " ")
        if isinstance(value, Mapping):
            numbers = [v for v in value.values() if isinstance(v, int | float)]
            if len(value) > MAX_SHOWN and numbers:
                ordered = sorted(numbers)
                shown = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
                lines[f"{label} ({len(value)} values: least / median / most)"] = " / ".join(map(_figure, shown))
            else:
                lines[f"{label} ({' / '.join(value)})"] = " / ".join(map(_figure, value.values()))
        else:
            lines[label] = _figure(value)
    return lines


def contrast_table(results: Results) -> str:
    """Return the difference of every two cells, the clear ones of each metric first."""
    metrics = list(dict.fromkeys(c.metric for c in results.contrasts))
    found = sorted(
        results.contrasts, key=lambda c: (metrics.index(c.metric), -abs(c.difference) / (c.high - c.low or 1))
    )
    body = [
        [
            f"{c.cells[0]} - {c.cells[1]}",
            c.metric.replace("_", " "),
            f"{c.difference:+.3f}",
            f"[{c.low:+.3f}, {c.high:+.3f}]",
            str(c.seeds),
            number(c.seed_sd, ".3f"),
            "yes" if c.resolved else "no",
        ]
        for c in found
    ]
    return markdown_table(["rows", "metric", "difference", "interval", "seeds", "sd over seeds", "told apart"], body)


def speed_contrast_table(results: Results) -> str:
    """Return the paired throughput ratios of cells that share one network."""
    body = [
        [
            f"{c.cells[0]} / {c.cells[1]}",
            c.steps,
            str(c.rounds or NOT_MEASURED),
            f"{c.ratio:.3f}",
            NOT_MEASURED if c.low is None or c.high is None else f"[{c.low:.3f}, {c.high:.3f}]",
            c.verdict,
        ]
        for c in results.speed_contrasts
    ]
    return markdown_table(["rows", "steps", "rounds", "ratio", "interval", "verdict"], body)


def estimate(found: Spread | None, percent: bool = False, sign: str = "") -> str:
    """Return `mean ± standard error (sd over seeds)`, as far as there is any."""
    if found is None:
        return NOT_MEASURED
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    text = f"{scale * found.mean:{sign}.{digits}f}"
    text += "" if found.se is None else f" ± {scale * found.se:.{digits}f}"
    return text if found.sd is None else f"{text} (sd {scale * found.sd:.{digits}f})"


def figure(found: Spread | None, form: str, unit: float = 1.0) -> str:
    """Return `mean (sd over seeds)` of a figure without an error of its own."""
    if found is None:
        return NOT_MEASURED
    text = format(found.mean / unit, form)
    if found.sd is None or float(format(found.sd / unit, form).replace(",", "")) == 0:
        return text
    return f"{text} (sd {format(found.sd / unit, form)})"


def throughput(speed: Speed | None) -> str:
    """Return the median and its interval."""
    if speed is None:
        return NOT_MEASURED
    ends = "" if speed.low is None or speed.high is None else f" [{speed.low:.1f}, {speed.high:.1f}]"
    return f"{speed.value:.1f}{ends}"


def number(value: float | None, spec: str) -> str:
    """Return a formatted number, or the sign for what was not measured."""
    return NOT_MEASURED if value is None else format(value, spec)


def percent(fraction: float | None) -> str:
    """Return a fraction in percent."""
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.1f}"


def _step_settings(cells: Sequence[Cell]) -> list[str]:
    found = {s for cell in cells for s in cell.speeds}
    return sorted((s for s in found if s != "ar"), key=int) + (["ar"] if "ar" in found else [])


def _figure(value: Any) -> str:
    """Return a number of unknown size with about three digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOT_MEASURED if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
