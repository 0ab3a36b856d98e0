"""The rows of a grid gathered by cell: means and spreads over seeds, and what kind of row a cell is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from dllm_core.evals.intervals import positive_median_interval, student_quantile
from steps.report.schema import BenchResult, Estimate, Results, Row

MIN_SEEDS_TO_RANK = 3
EXACT, NELBO, BLOCK_NELBO = "exact", "nelbo", "block_nelbo"
KINDS = (EXACT, NELBO, BLOCK_NELBO)
"""Of likelihood figures, a cell's own first. They are never compared with each other."""
KIND_NAMES = {EXACT: "exact likelihood", NELBO: "NELBO", BLOCK_NELBO: "block NELBO"}


@dataclass(frozen=True)
class Spread:
    """A figure of a cell over its seeds.

    Attributes:
        values: one a seed.
        ses: standard errors of the measurement, where it has any. All seeds are measured on the same held-out text, so
            the mean over seeds is no surer than its parts.
        clusters: documents, or sequences, behind those.
    """

    values: tuple[float, ...]
    ses: tuple[float, ...] = ()
    clusters: int | None = None

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds; None with one seed, and where all are the same run."""
        return stdev(self.values) if len(set(self.values)) > 1 else None

    @property
    def se(self) -> float | None:
        """Standard error of the measurement."""
        return mean(self.ses) if self.ses else None

    def half_width(self, comparisons: int = 1) -> float | None:
        """Return half the 95 % interval of the mean, seeds and measurement together; None where neither is known.

        Args:
            comparisons: intervals that are to hold together (Bonferroni).
        """
        seeds = (self.sd**2 / len(self.values), len(self.values) - 1) if self.sd is not None else None
        text = (self.se**2, (self.clusters or 1000) - 1) if self.se is not None else None
        return half_width([part for part in (seeds, text) if part], comparisons)


def half_width(parts: Sequence[tuple[float, int]], comparisons: int = 1) -> float | None:
    """Return half the width of a 95 % interval from (variance of the mean, degrees of freedom) of independent parts.

    Student's t with Welch and Satterthwaite's degrees of freedom, rounded down; Bonferroni over `comparisons`.
    """
    variance = sum(v for v, _ in parts)
    if not parts or min(df for _, df in parts) < 1:
        return None
    if variance == 0:
        return 0.0
    df = variance**2 / sum(v**2 / d for v, d in parts)
    return student_quantile(1 - 0.05 / comparisons, max(1, math.floor(df + 1e-9))) * math.sqrt(variance)


@dataclass(frozen=True)
class Speed:
    """Tokens per second.

    Attributes:
        value: median over rounds.
        low: lower end of its 95 % interval; None with fewer than three rounds.
        high: upper end.
        measured: False: follows from other numbers of steps.
    """

    value: float
    low: float | None
    high: float | None
    measured: bool = True


@dataclass(frozen=True)
class Cell:
    """A line of every table.

    Attributes:
        name: of the cell.
        rows: one a seed, failed ones included.
    """

    name: str
    rows: tuple[Row, ...]

    @cached_property
    def done(self) -> tuple[Row, ...]:
        """Return the rows that were finished."""
        return tuple(r for r in self.rows if r.status == "ok")

    @cached_property
    def measured(self) -> tuple[Row, ...]:
        """Return the finished rows whose quality was measured."""
        return tuple(r for r in self.done if r.eval is not None)

    @property
    def label(self) -> str:
        """The name, with the seeds that are there where some are missing."""
        if len(self.done) == len(self.rows):
            return self.name
        return f"{self.name} ({len(self.done)} of {len(self.rows)} seeds)" if self.done else f"{self.name} (failed)"

    @cached_property
    def trained(self) -> bool:
        return any(r.trained for r in self.rows)

    @cached_property
    def causal(self) -> bool:
        """Whether it writes token by token: a reference for conversion, not a conversion."""
        return any(r.eval and r.eval.exact_nats_per_token for r in self.rows) or "ar" in self.speeds

    @cached_property
    def latent(self) -> bool:
        """Whether it was measured and has no likelihood figure, as cells that generate through latents."""
        return bool(self.measured) and self.kind is None

    @property
    def converted(self) -> bool:
        """Whether it can be chosen: a trained conversion with at least one finished seed."""
        return bool(self.done) and self.trained and not self.causal

    @cached_property
    def kind(self) -> str | None:
        """Kind of its own likelihood figure."""
        return next((k for k in KINDS if self.likelihood(k)), None)

    def likelihood(self, kind: str) -> Spread | None:
        """Return nats per token of one kind over the seeds."""
        return spread([getattr(r.eval, f"{kind}_nats_per_token") for r in self.measured], self.clusters)

    @cached_property
    def clusters(self) -> int | None:
        """Documents, else sequences, that held-out figures were measured on."""
        counts = [r.eval.num_documents or r.eval.num_sequences for r in self.measured if r.eval]
        return min((c for c in counts if c), default=None)

    @cached_property
    def bench(self) -> BenchResult | None:
        """Speed; one seed is timed, since seeds differ in values and not in work."""
        return next((r.bench for r in self.done if r.bench and r.bench.steps), None)

    @cached_property
    def speeds(self) -> dict[str, Speed]:
        """Return tokens per second by denoising steps; `ar` for rows that write token by token."""
        return {steps: _speed(figures) for steps, figures in (self.bench.steps if self.bench else {}).items()}

    def speed_at(self, steps: int | None) -> Speed | None:
        """Return tokens per second at `steps` denoising steps; cells without steps have one speed.

        Between two measured numbers of steps the time of a token is interpolated linearly, beyond them it is scaled.
        """
        if "ar" in self.speeds:
            return self.speeds["ar"]
        if not self.speeds or not steps:
            return None
        points = sorted((int(s), speed) for s, speed in self.speeds.items())
        for (low, slow), (high, fast) in pairwise(points):
            if low < steps < high:
                part = (steps - low) / (high - low)
                return _combined(slow, fast, lambda a, b, part=part: 1 / (1 / a + (1 / b - 1 / a) * part))
        nearest, taken = min(points, key=lambda point: abs(point[0] - steps))
        return taken if nearest == steps else _combined(taken, taken, lambda a, _: a * nearest / steps)

    def cost(self, name: str) -> Spread | None:
        """Return a figure of CostResult over the seeds."""
        return spread([getattr(r.cost, name) for r in self.done if r.cost])

    @cached_property
    def frontier(self) -> list[dict[str, Any]]:
        """Return the points of generated text, one a temperature, means over the seeds; `by_seed` holds each."""
        points = [p for r in self.measured if r.eval for p in r.eval.frontier]
        found = []
        for temperature in sorted({p["temperature"] for p in points}):
            same = [p for p in points if p["temperature"] == temperature]
            found.append({**merged(same), "by_seed": same})
        return found

    @cached_property
    def diagnostics(self) -> dict[str, Any]:
        """Return its figures of health, means over the seeds."""
        return merged([r.eval.diagnostics for r in self.measured if r.eval and r.eval.diagnostics])


def gather(results: Results) -> list[Cell]:
    """Return the cells of a grid in table order."""
    names = dict.fromkeys(r.name for r in results.cells)
    return [Cell(n, tuple(r for r in results.cells if r.name == n)) for n in names]


def spread(found: Iterable[Any], clusters: int | None = None) -> Spread | None:
    """Return the spread of numbers or estimates, leaving out what is missing; None if nothing is left."""
    kept = [f for f in found if f is not None]
    if not kept:
        return None
    if not isinstance(kept[0], Estimate):
        return Spread(tuple(map(float, kept)))
    return Spread(tuple(e.value for e in kept), tuple(e.se for e in kept if e.se is not None), clusters)


def merged(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of numbers in maps of the same shape; of an estimate's `se` as well. Other values: the first."""
    keys = dict.fromkeys(k for m in found for k in m)
    return {k: _merged_value([m[k] for m in found if m.get(k) is not None]) for k in keys}


def _merged_value(values: Sequence[Any]) -> Any:
    if not values:
        return None
    if all(isinstance(v, Mapping) for v in values):
        return merged(values)
    if len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return mean(values)
    return values[0]


def _speed(figures: Mapping[str, Any]) -> Speed:
    """Return the median speed; its interval comes from the rounds where they are kept. Two rounds have none."""
    told = figures["tokens_per_s"]
    if len(figures.get("rounds") or ()) in (1, 2):
        return Speed(told["median"], None, None)
    if figures.get("rounds"):
        found = positive_median_interval(figures["rounds"])
        return Speed(told["median"], found.low, found.high)
    low, high = told.get("ci95") or (None, None)
    return Speed(told["median"], None if low is None else max(low, 0.0), high)


def _combined(first: Speed, second: Speed, rule: Any) -> Speed:
    low = rule(first.low, second.low) if first.low and second.low else None
    high = rule(first.high, second.high) if first.high and second.high else None
    return Speed(rule(first.value, second.value), low, high, measured=False)
