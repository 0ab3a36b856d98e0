"""Which differences between rows are real: paired differences of rows, and contrasts of cells over their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev, variance

from dllm_core.evals.estimates import cluster_se
from dllm_core.evals.intervals import LEVEL, ratio_interval, verdict
from steps.report.cells import KINDS, MIN_SEEDS_TO_RANK, Cell, gather, half_width
from steps.report.schema import SCHEMA_VERSION, Comparison, Contrast, Results, SpeedContrast, Tie


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
    clusters = len(set(first.groups)) if first.groups is not None else len(residuals)
    resolved = abs(difference) > 2 * se
    return Comparison(rows=rows, metric=metric, difference=difference, se=se, resolved=resolved, clusters=clusters)


def all_pairs(values: Mapping[str, Mapping[str, PerSequence]], seeds: Mapping[str, int]) -> list[Comparison]:
    """Return every paired comparison of two rows of one seed, for each metric.

    Args:
        values: metric -> row id -> values.
        seeds: row id -> seed. Rows of unlike seeds differ in more than their method.
    """
    found = []
    for metric, by_row in values.items():
        for a, b in combinations(by_row, 2):
            if seeds[a] == seeds[b]:
                comparison = paired_difference(by_row[a], by_row[b], (a, b), metric)
                found += [] if comparison is None else [comparison]
    return found


def contrasts(results: Results) -> list[Contrast]:
    """Return the difference of every two cells for each metric, over all seeds that both finished.

    The variance of a difference has two parts: held-out text (clustered by document; common to the seeds, so averaging
    over them does not shrink it) and training seeds. With few seeds the second is pooled over all pairs of the metric:
    for c cells under n seeds that is the residual of a randomised block design, with (c - 1) (n - 1) degrees of
    freedom; for two cells it is the paired t test. The intervals of a metric hold together (Bonferroni).
    """
    return [contrast for metric in KINDS for contrast in _metric_contrasts(results, metric)]


def _metric_contrasts(results: Results, metric: str) -> list[Contrast]:
    row = {r.row_id: r for r in results.cells}
    order = {cell.name: i for i, cell in enumerate(gather(results))}
    pairs: dict[tuple[str, str], dict[int, Comparison]] = {}
    for c in results.comparisons:
        a, b = (row[r] for r in c.rows)
        if c.metric == metric and a.seed == b.seed and a.name != b.name:
            first, second = sorted((a, b), key=lambda r: order[r.name])
            turned = c if first is a else c.model_copy(update={"difference": -c.difference})
            pairs.setdefault((first.name, second.name), {})[a.seed] = turned
    repeated = {p: [c.difference for c in by_seed.values()] for p, by_seed in pairs.items() if len(by_seed) > 1}
    pooled = mean([variance(d) for d in repeated.values()]) if repeated else None
    cells = {name for pair in repeated for name in pair}
    df = (len(cells) - 1) * (min(map(len, repeated.values())) - 1) if repeated else 0
    found = []
    for pair, by_seed in pairs.items():
        differences = [c.difference for c in by_seed.values()]
        clusters = min(_clusters(c, results) or 1000 for c in by_seed.values())
        parts = [(mean(c.se for c in by_seed.values()) ** 2, clusters - 1)]
        if pair in repeated and pooled is not None:
            parts.append((pooled / len(differences), df))
        half = half_width(parts, len(pairs))
        if half is None:
            continue
        centre = mean(differences)
        found.append(
            Contrast(
                cells=pair,
                metric=metric,
                seeds=len(differences),
                difference=centre,
                low=centre - half,
                high=centre + half,
                seed_sd=stdev(differences) if pair in repeated else None,
                pairs=len(pairs),
                resolved=abs(centre) > half,
            )
        )
    return found


def _clusters(comparison: Comparison, results: Results) -> int | None:
    """Return how many documents a difference rests on; reports before 1.2 say it only of their rows."""
    if comparison.clusters is not None:
        return comparison.clusters
    evals = [r.eval for r in results.cells if r.row_id in comparison.rows and r.eval]
    return min((n for e in evals if (n := e.num_documents or e.num_sequences)), default=None)


def speed_contrasts(results: Results) -> list[SpeedContrast]:
    """Return the paired speed ratio of every two cells that the benchmark compared, by intervals that hold together.

    Each is taken at 1 - .05 / (number of pairs): of a dozen comparisons at 95 % of rows that run the same network,
    every other grid would have one "faster". The signed-rank interval assumes nothing of the noise, but takes rounds:
    9 for 12 pairs. With fewer there is no interval, and the verdict is `not resolved`.
    """
    row = {r.row_id: r for r in results.cells}
    pairs = len(results.ties)
    found = []
    for tie in results.ties:
        a, b = (row[r] for r in tie.rows)
        first, second = (_rounds(r.bench.steps if r.bench else {}, tie.steps) for r in (a, b))
        told = {"cells": (a.name, b.name), "steps": tie.steps, "pairs": pairs}
        if first and len(first) == len(second):
            ratio = ratio_interval(first, second, 1 - (1 - LEVEL) / pairs)
            ends: dict[str, float | None] = {"ratio": ratio.value}
            if not ratio.assumes_normal:  # with so few rounds Student's interval would span anything
                ends |= {"low": ratio.low, "high": ratio.high}
            found.append(SpeedContrast(**told, **ends, rounds=len(first), verdict=verdict(ratio)))
        else:
            found.append(SpeedContrast(**told, **_alone(tie, pairs), rounds=0))
    return found


def _alone(tie: Tie, pairs: int) -> dict[str, object]:
    """Return what can be said of a ratio whose rounds were not kept: only one that stands alone needs no correction."""
    if pairs > 1:
        return {"ratio": tie.ratio, "verdict": "not resolved"}
    return {"ratio": tie.ratio, "low": tie.ci95[0], "high": tie.ci95[1], "verdict": tie.verdict}


def _rounds(steps: Mapping[str, Mapping[str, Sequence[float]]], group: str) -> Sequence[float]:
    return steps.get(group, {}).get("rounds") or ()


@dataclass(frozen=True)
class Standing:
    """Where the cells of one likelihood kind stand.

    Attributes:
        kind: of the likelihood.
        order: all of them, lowest mean first.
        leaders: the lowest and all that it is not known to beat, in table order; one of them alone is a winner.
        ranked: every one of them finished enough seeds, so that an order may be told.
    """

    kind: str
    order: tuple[Cell, ...]
    leaders: tuple[Cell, ...]
    ranked: bool

    @property
    def winner(self) -> Cell | None:
        """The one cell that is known to beat all others; None if there is no such cell, or nothing to beat."""
        return self.leaders[0] if self.ranked and len(self.leaders) == 1 < len(self.order) else None

    @property
    def behind(self) -> tuple[Cell, ...]:
        return tuple(c for c in self.order if c not in self.leaders)


def standing(results: Results, cells: Sequence[Cell], kind: str) -> Standing | None:
    """Return where those of `cells` stand that have a likelihood of this kind; None if there are none."""
    values = {c.name: found.mean for c in cells if (found := c.likelihood(kind))}
    order = sorted((c for c in cells if c.name in values), key=lambda c: values[c.name])
    if not order:
        return None
    best = order[0].name
    among = [c for c in results.contrasts if c.metric == kind and set(c.cells) <= set(values)]
    beaten = {name for c in among if c.resolved and best in c.cells for name in c.cells if name != best}
    known = {frozenset(c.cells) for c in among if c.seeds >= MIN_SEEDS_TO_RANK}
    ranked = is_ranked(results.seeds) and all(frozenset((a.name, b.name)) in known for a, b in combinations(order, 2))
    leaders = tuple(c for c in cells if c.name in values and c.name not in beaten)
    return Standing(kind, tuple(order), leaders, ranked)


def is_ranked(seeds: Sequence[int]) -> bool:
    """Quality is ranked only with three or more seeds."""
    return len(set(seeds)) >= MIN_SEEDS_TO_RANK


def concluded(results: Results) -> Results:
    """Return the results with what follows from them; reports before 1.2 were written without it."""
    told = {"contrasts": contrasts(results), "speed_contrasts": speed_contrasts(results)}
    return results.model_copy(update={**told, "schema_version": SCHEMA_VERSION})
