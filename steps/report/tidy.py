"""The grid as a tidy CSV: every number of every row, seeds one by one."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from steps.report.schema import Results, Row
from steps.report.sweeps import tidy_metrics
from steps.report.tables import OVERLAP_SIZES

TEXT_FIGURES = (
    "judge_ppl",
    "shuffled_judge_ppl",
    "unigram_entropy_nats",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "repetition_4",
)
OVERLAP_FIGURES = tuple(f"overlap_{n}{kind}" for n in OVERLAP_SIZES for kind in ("", "_other"))


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
        found += tidy_metrics(row)
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
