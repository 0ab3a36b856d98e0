"""Which differences between rows are real: paired differences, seed spread, and the refusal to rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

from dllm_core.evals.estimates import cluster_se
from steps.report.schema import Comparison, Results, Row

MIN_SEEDS_TO_RANK = 3


@dataclass(frozen=True)
class PerSequence:
    """Held-out values of one row and metric.

    Attributes:
        nats: summed nats of each sequence.
        tokens: scored tokens of each sequence.
        groups: document each sequence was cut from; None where unknown.
    """

    nats: Sequence[float]
    tokens: Sequence[float]
    groups: Sequence[int] | None = None


def paired_difference(first: PerSequence, second: PerSequence, rows: tuple[str, str], metric: str) -> Comparison | None:
    """Return the paired difference of two per-token means; None when the rows were not scored on the same sequences.

    The value is sum(nats_1 - nats_2) / sum(tokens); its standard error that of a ratio estimator, clustered by document
    where documents are known. None also with a single document: there is no telling how sure the difference is.
    """
    if list(first.tokens) != list(second.tokens):
        return None
    tokens = sum(first.tokens)
    difference = sum(a - b for a, b in zip(first.nats, second.nats, strict=True)) / tokens
    residuals = [a - b - difference * t for a, b, t in zip(first.nats, second.nats, first.tokens, strict=True)]
    se = cluster_se(residuals, first.groups, tokens)
    if se is None:
        return None
    return Comparison(rows=rows, metric=metric, difference=difference, se=se, resolved=abs(difference) > 2 * se)


def all_pairs(values: dict[str, dict[str, PerSequence]]) -> list[Comparison]:
    """Return every paired comparison of rows for each metric. `values`: metric -> row id -> values."""
    found = []
    for metric, by_row in values.items():
        ids = list(by_row)
        for i, a in enumerate(ids):
            for b in ids[i + 1 :]:
                comparison = paired_difference(by_row[a], by_row[b], (a, b), metric)
                if comparison is not None:
                    found.append(comparison)
    return found


def headline_nats(row: Row) -> tuple[float, str] | None:
    """Return the row's likelihood figure and what it is: `bound`, `block bound` or `exact`."""
    if row.eval is None:
        return None
    if row.eval.exact_nats_per_token is not None:
        return row.eval.exact_nats_per_token.value, "exact"
    if row.eval.nelbo_nats_per_token is not None:
        return row.eval.nelbo_nats_per_token.value, "bound"
    if row.eval.block_nelbo_nats_per_token is not None:
        return row.eval.block_nelbo_nats_per_token.value, "block bound"
    return None


def has_no_bound(row: Row) -> bool:
    """Return whether a row was measured and yet has no likelihood figure, as rows that generate through latents."""
    return row.status == "ok" and row.eval is not None and headline_nats(row) is None


def speed_at(row: Row, steps: int | None) -> tuple[float, bool] | None:
    """Return (tokens per second at `steps` denoising steps, whether that was measured); rows without steps have one.

    Between two measured numbers of steps the time of a token is interpolated linearly, beyond them it is scaled.
    """
    medians = {s: b["tokens_per_s"]["median"] for s, b in (row.bench.steps if row.bench else {}).items()}
    if "ar" in medians:
        return medians["ar"], True
    if not medians or not steps:
        return None
    seconds = sorted((int(s), 1 / speed) for s, speed in medians.items())
    for (low, slow), (high, fast) in pairwise(seconds):
        if low < steps < high:
            return 1 / (slow + (fast - slow) * (steps - low) / (high - low)), False
    nearest, taken = min(seconds, key=lambda point: abs(point[0] - steps))
    return nearest / (taken * steps), nearest == steps


@dataclass(frozen=True)
class SeedSummary:
    """Mean and spread of a cell over its seeds."""

    name: str
    kind: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None


def by_cell(results: Results) -> list[SeedSummary]:
    """Return the headline likelihood of each cell over the seeds, in table order. One kind of figure per cell."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in results.cells:
        if row.status != "ok" or row.eval is None:
            continue
        for kind in ("exact", "nelbo", "block_nelbo"):
            estimate = getattr(row.eval, f"{kind}_nats_per_token")
            if estimate is not None:
                groups[row.name, kind].append(estimate.value)
    return [SeedSummary(name, kind, tuple(values)) for (name, kind), values in groups.items()]


def is_ranked(seeds: Sequence[int]) -> bool:
    """Quality is ranked only with three or more seeds."""
    return len(set(seeds)) >= MIN_SEEDS_TO_RANK


def ranking(summaries: Sequence[SeedSummary], kind: str) -> list[list[str]]:
    """Return groups of cells from best to worst for one kind of figure; cells within a group are not separated.

    Two neighbours are separated when their means differ by more than twice the standard error of that difference
    over seeds (Welch, without its small-sample correction: with three seeds a cautious reader wants more).
    """
    ordered = sorted((s for s in summaries if s.kind == kind), key=lambda s: s.mean)
    groups: list[list[SeedSummary]] = []
    for summary in ordered:
        if groups and not _separated(groups[-1][0], summary):
            groups[-1].append(summary)
        else:
            groups.append([summary])
    return [[s.name for s in group] for group in groups]


def _separated(a: SeedSummary, b: SeedSummary) -> bool:
    if a.sd is None or b.sd is None:
        return False
    se = math.sqrt(a.sd**2 / len(a.values) + b.sd**2 / len(b.values))
    return abs(a.mean - b.mean) > 2 * se
