"""The grid as a Markdown table and as a tidy CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steps.report.schema import Estimate, Results, Row

NOT_MEASURED = "-"
OVERLAP_SIZES = (1, 2)
MAX_SHOWN = 8
"""Numbers of a map that stand in a table one by one."""
TEXT_FIGURES = ("judge_ppl", "unigram_entropy_nats", "distinct_1", "distinct_2", "distinct_3", "repetition_4")
OVERLAP_FIGURES = tuple(f"overlap_{n}{kind}" for n in OVERLAP_SIZES for kind in ("", "_other"))


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
    for row in results.cells:
        e = row.eval
        if e is None:
            body.append([row.row_id, f"{row.status}", *[NOT_MEASURED] * 6])
            continue
        accuracy = [_estimate(e.masked_accuracy.get(r), percent=True) for r in ("0.15", "0.5", "0.85")]
        bits = NOT_MEASURED if e.bits_per_byte is None else f"{e.bits_per_byte:.3f}"
        likelihood = [e.exact_nats_per_token, e.nelbo_nats_per_token, e.block_nelbo_nats_per_token]
        body.append([row.row_id, *(_estimate(x) for x in likelihood), bits, *accuracy])
    return markdown_table(header, body)


def speed_table(results: Results) -> str:
    """Return tokens per second with 95 % intervals, one column per number of denoising steps."""
    settings = _step_settings(results)
    header = ["row", *(f"tok/s, {s} steps" if s != "ar" else "tok/s, AR" for s in settings), "first token s", "mem GB"]
    body = []
    for row in results.cells:
        if row.bench is None:
            continue
        name = row.row_id if row.trained or row.method == "ar" else f"{row.row_id} (untrained, unranked)"
        cells = [_throughput(row.bench.steps.get(s)) for s in settings]
        first = next((b.get("first_token_s") for b in row.bench.steps.values()), None)
        body.append([name, *cells, _number(first, ".2f"), _number(row.bench.peak_memory_gb, ".2f")])
    return markdown_table(header, body)


def cost_table(results: Results) -> str:
    """Return every budget unit side by side: tokens, FLOPs, seconds, and what shared work cost."""
    header = [
        "row",
        "tokens",
        "positions",
        "TFLOP",
        "teacher TFLOP",
        "train s",
        "extraction s",
        "tok/s train",
        "mem GB",
        "new params",
    ]
    body = []
    for row in results.cells:
        c = row.cost
        if c is None:
            continue
        rate = row.train.tokens_per_s if row.train else None
        body.append(
            [
                row.row_id,
                f"{c.response_tokens:,.0f}",
                f"{c.positions:,.0f}",
                f"{c.flops / 1e12:,.1f}",
                f"{c.teacher_flops / 1e12:,.1f}",
                f"{c.train_s:,.0f}",
                f"{c.extraction_s:,.0f}",
                _number(rate, ",.0f"),
                _number(c.peak_memory_gb, ".1f"),
                f"{c.new_params:,}",
            ]
        )
    return markdown_table(header, body)


def frontier_table(results: Results) -> str:
    """Return generation quality over temperatures: judge perplexity never without entropy and repetition."""
    header = ["row", "T", "forwards", "judge ppl", "tokens shuffled", "judge", "entropy nats", "distinct-2"]
    header.append("repeated 4-grams")

    def line(name: str, temperature: str, point: dict[str, Any]) -> list[str]:
        return [
            name,
            temperature,
            _number(point.get("num_forwards"), ".0f"),
            _number(point.get("judge_ppl"), ",.1f"),
            _number(point.get("shuffled_judge_ppl"), ",.1f"),
            str(point.get("judge", NOT_MEASURED)),
            _number(point.get("unigram_entropy_nats"), ".2f"),
            _number(point.get("distinct_2"), ".2f"),
            _number(point.get("repetition_4"), ".3f"),
        ]

    body = [
        line(row.row_id, f"{point['temperature']:g}", point)
        for row in results.cells
        for point in (row.eval.frontier if row.eval else [])
    ]
    reference = results.data.get("reference_text")
    if body and reference:
        body.append(line("held-out text", NOT_MEASURED, reference))
    return markdown_table(header, body)


def overlap_table(results: Results) -> str:
    """Return how much continuations share with the true ones, beside their control."""
    header = ["row", "T"]
    for n in OVERLAP_SIZES:
        header += [f"{n}-grams, own", "other", "difference"]
    body = []
    for row in results.cells:
        for point in row.eval.frontier if row.eval else []:
            if point.get("overlap_1") is None:
                continue
            cells = [row.row_id, f"{point['temperature']:g}"]
            for n in OVERLAP_SIZES:
                gain = point.get(f"overlap_{n}_gain")
                cells += [_percent(point.get(f"overlap_{n}")), _percent(point.get(f"overlap_{n}_other"))]
                cells.append(_estimate(Estimate(**gain) if gain else None, percent=True, sign="+"))
            body.append(cells)
    return markdown_table(header, body)


def health_table(results: Results) -> str:
    """Return the figures that rows state of their own health: a line a figure, a column a row that has any."""
    columns = {r.row_id: health_lines(r.eval.diagnostics) for r in results.cells if r.eval and r.eval.diagnostics}
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


def comparison_table(results: Results) -> str:
    """Return every paired difference between rows, the clear ones first."""
    found = sorted(results.comparisons, key=lambda c: -abs(c.difference) / max(c.se, 1e-12))
    body = [
        [f"{c.rows[0]} - {c.rows[1]}", c.metric, f"{c.difference:+.3f} ± {c.se:.3f}", "yes" if c.resolved else "no"]
        for c in found
    ]
    return markdown_table(["rows", "metric", "difference", "beyond 2 se"], body)


def tie_table(results: Results) -> str:
    """Return the paired throughput ratios of rows that share one network."""
    body = [
        [f"{t.rows[0]} / {t.rows[1]}", t.steps, f"{t.ratio:.3f}", f"[{t.ci95[0]:.3f}, {t.ci95[1]:.3f}]", t.verdict]
        for t in results.ties
    ]
    return markdown_table(["rows", "steps", "ratio", "95 % interval", "verdict"], body)


def results_csv(results: Results) -> str:
    """Return one line per (row, metric): row_id, cell, method, seed, metric, value, se."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row_id", "cell", "method", "seed", "metric", "value", "se"])
    for row in results.cells:
        for metric, value, se in _flat_metrics(row):
            writer.writerow([row.row_id, row.name, row.method, row.seed, metric, value, "" if se is None else se])
    return out.getvalue()


def _flat_metrics(row: Row) -> list[tuple[str, float, float | None]]:
    found: list[tuple[str, float, float | None]] = []
    if row.eval is not None:
        for name in ("nelbo_nats_per_token", "block_nelbo_nats_per_token", "exact_nats_per_token"):
            estimate = getattr(row.eval, name)
            if estimate is not None:
                found.append((f"eval/{name}", estimate.value, estimate.se))
        if row.eval.bits_per_byte is not None:
            found.append(("eval/bits_per_byte", row.eval.bits_per_byte, None))
        for kind in ("masked_accuracy", "masked_nll"):
            for ratio, estimate in getattr(row.eval, kind).items():
                found.append((f"eval/{kind}@{ratio}", estimate.value, estimate.se))
        for point in row.eval.frontier:
            prefix = f"eval/frontier/T={point['temperature']:g}"
            for key in (*TEXT_FIGURES, *OVERLAP_FIGURES):
                if isinstance(point.get(key), int | float):
                    found.append((f"{prefix}/{key}", point[key], None))
            for key in (f"overlap_{n}_gain" for n in OVERLAP_SIZES):
                if point.get(key):
                    found.append((f"{prefix}/{key}", point[key]["value"], point[key]["se"]))
        found += [(name, value, None) for name, value in _flat(row.eval.diagnostics, "eval/diagnostics", "/")]
    for steps, bench in (row.bench.steps if row.bench else {}).items():
        found.append((f"bench/tokens_per_s@{steps}", bench["tokens_per_s"]["median"], None))
    if row.cost is not None:
        found += [(f"cost/{k}", v, None) for k, v in row.cost.model_dump().items() if v is not None]
    return found


def _flat(values: Mapping[str, Any], prefix: str, join: str = "@") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a map, those of inner maps as name@key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{join}{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{join}{key}", value


def _step_settings(results: Results) -> list[str]:
    found = {s for row in results.cells if row.bench for s in row.bench.steps}
    return sorted((s for s in found if s != "ar"), key=int) + (["ar"] if "ar" in found else [])


def _estimate(estimate: Estimate | None, percent: bool = False, sign: str = "") -> str:
    if estimate is None:
        return NOT_MEASURED
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    text = f"{scale * estimate.value:{sign}.{digits}f}"
    return text if estimate.se is None else f"{text} ± {scale * estimate.se:.{digits}f}"


def _throughput(bench: dict | None) -> str:
    if bench is None:
        return NOT_MEASURED
    low, high = bench["tokens_per_s"]["ci95"]
    return f"{bench['tokens_per_s']['median']:.1f} [{low:.1f}, {high:.1f}]"


def _number(value: float | None, spec: str) -> str:
    return NOT_MEASURED if value is None else format(value, spec)


def _percent(fraction: float | None) -> str:
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.1f}"


def _figure(value: Any) -> str:
    """Return a number of unknown size with about three digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOT_MEASURED if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
