"""A grid without Metaflow and without a tracker: the same steps, one after the other, within a given time.

Everything expensive is a cached step of `steps/`, so this holds no state but the rows it has finished: called again it
finds what is done, and goes on in the middle of a training that was stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.convert_clock import TimeUp, time_limit
from benchmarks.gpu.convert_rows import KeptRows, numbers, row_key

if TYPE_CHECKING:
    from params import GridSpec, RowSpec
    from steps.grid import GridRun, Prepared, RowOutcome
    from steps.report.schema import Results

CELLS = "ar,ar_tuned,block_causal,repr_align_all,random_mask,repr_align_4,repr_align_trajectory,vfm,ldlm,cola"
"""All rows there are, what is asked for first in front."""
SHORT = {
    # the error of a bound is that of the held-out documents, of which there are as many as before
    "eval.nelbo_samples": 16,
    "eval.frontier_temperatures": "[0.5,0.7,1.0]",
    # two settings of each rule, of which a curve has two points and its ends; all of them take a minute a row
    "eval.parallelism.thresholds": "[0.9,0.5]",
    "eval.parallelism.factors": "[1.0,4.0]",
    "eval.parallelism.entropy_thresholds": "[0.5,2.0]",
    "eval.parallelism.block_add_thresholds": "[1.0]",
    # batches and long decodes are what the part `decode` is for
    "bench.batch_sizes": "[1]",
    "bench.rounds": 6,
    # eight tokens a forward instead of one
    "cells.repr_align_trajectory.options.commit_steps": 16,
}
"""What `gpu_small` is cut down by so that one seed of all rows fits a machine that is lent for half an hour."""
LEAST_S = 15.0
"""A row is not begun with less: loading it takes as long."""
BENCHMARK = "benchmark"
RESULTS, KEPT = "convert-results.json", "convert-rows.json.gz"

Measure = Callable[[str, Callable[[], dict[str, Any]], dict[str, Any], float], dict[str, Any] | None]
"""Given a name, what measures it, what it depends on and the seconds it needs; returns the numbers or None."""


class Unfinished(RuntimeError):
    """A row that failed and has no numbers."""


class Stopped(Unfinished):
    """A row whose time was over before it was finished; another call goes on with it."""


def settings(
    preset: str = "gpu_small",
    *,
    cells: str | None = None,
    seeds: str = "0",
    short: bool = False,
    overrides: Sequence[str] = (),
    model: str | None = None,
    data: str | None = None,
) -> GridSpec:
    """Return a grid's settings.

    Args:
        preset: as for the grid.
        cells: rows; None takes all there are.
        seeds: comma-separated.
        short: with the cuts of `SHORT`.
        overrides: as for `--set`; they win.
        model: replaces the preset's.
        data: replaces the preset's.

    Raises:
        ParamsError: settings that do not hold.
    """
    import params

    wanted = (cells or CELLS).split(",")
    cuts = [f"{k}={v}" for k, v in SHORT.items() if not k.startswith("cells.") or k.split(".")[1] in wanted]
    return params.load(
        preset, cells=wanted, seeds=seeds, overrides=[*(cuts if short else ()), *overrides], model=model, data=data
    )


@dataclass
class Conversion:
    """One grid, worked off as far as the time goes.

    Args:
        spec: the grid's settings.
        command: what was typed.
        out: directory of the results and of the kept rows.
        ends: end of the time, on the clock of `time.monotonic`.
        row_limit_s: the most a row may take in this call; None leaves it to `ends`.
        origin: commit and state of the checkout, where this is a copy without its repository.
        log: prints a line.
    """

    spec: GridSpec
    command: str
    out: Path
    ends: float
    row_limit_s: float | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    log: Callable[[str], None] = lambda line: print(line, flush=True)
    outcomes: dict[str, RowOutcome] = field(default_factory=dict, init=False)
    given_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.given_s = self.remaining_s

    @cached_property
    def run(self) -> GridRun:
        """The run; its id follows from the settings, so that every call goes on with the same one."""
        import hashlib

        from steps.grid import GridRun
        from steps.tracking import TrackingRef

        text = self.spec.model_dump_json()
        name = f"{self.spec.preset}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        commit = str(self.origin.get("commit") or "")
        return GridRun(name, text, True, self.command, commit, TrackingRef(""))

    @cached_property
    def keys(self) -> dict[str, str]:
        """What each row's numbers depend on."""
        return {row.row_id: row_key(self.spec, row) for row in self.spec.rows()}

    @cached_property
    def kept(self) -> KeptRows:
        """The finished rows, those of earlier calls included."""
        from steps.cache.key import key_of

        return KeptRows.load(self.out / KEPT, self.keys, key_of(self.spec.bench.model_dump(mode="json")))

    @cached_property
    def shared(self) -> Prepared:
        """Model, text and teacher states. Commit orders are extracted by the row that reads them."""
        from steps import grid

        with time_limit(self.remaining_s):
            shared = grid.prepare_anchors(self.run, grid.prepare(self.run))
        self._tell_shared(shared)
        return shared

    @property
    def remaining_s(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()

    def order(self) -> list[RowSpec]:
        """Return the rows as they are worked off: seed by seed, and a row after the one that it is built on."""
        rows = {row.row_id: row for row in self.spec.rows()}
        placed = self.run.training_order(self.shared.model.num_layers)
        return sorted((rows[row_id] for row_id in placed), key=lambda row: self.spec.seeds.index(row.seed))

    def work_off(self, measure: Measure) -> None:
        """Finish as many rows as the time allows, then measure their speed; what is done is on disk after each.

        Args:
            measure: of each row, and of the benchmark.
        """
        for row in self.order():
            measure(row.row_id, lambda row=row: self.row(row), {"key": self.keys[row.row_id]}, LEAST_S)
        if set(self.kept.rows) == set(self.keys):
            measure(BENCHMARK, self.benchmark, {"rows": self.keys}, self._benchmark_s())

    def _benchmark_s(self) -> float:
        """Return what the benchmark needs, which is not to be begun in vain: it has no half-way.

        No more than half of a call: the next one begins with it.
        """
        from steps import plan

        if self.kept.bench is not None or self.given_s == float("inf"):
            return 0.0
        cost = plan.validate(self.spec, dry_run=True).cost
        return min(sum(row.benchmark_s for row in cost.rows.values()), self.given_s / 2)

    # -- one row ----------------------------------------------------------------------------------------------------

    def row(self, row: RowSpec) -> dict[str, Any]:
        """Train and measure a row, or find it, and return its main numbers.

        Raises:
            Stopped: the time was over first.
            Unfinished: the row failed.
        """
        if row.row_id in self.kept.rows:
            return {"headline": numbers(self.kept.result(row.row_id))}
        outcome = self._attempt(row)
        self.outcomes[row.row_id] = outcome
        from steps.grid.finish import row_result

        if outcome.failure is not None:
            raise Unfinished(f"{outcome.failure.stage}: {outcome.failure.problem}")
        assert outcome.trained is not None
        training = outcome.trained.key if outcome.trained.cell_dir else ""
        self.kept.put(self.keys[row.row_id], training, row_result(self.run, outcome))
        self.write()
        return {"headline": numbers(self.kept.result(row.row_id))}

    def _attempt(self, row: RowSpec) -> RowOutcome:
        from steps import grid

        seconds = min(self.remaining_s, self.row_limit_s or float("inf"))
        shared = self.shared
        forget_peak_memory()
        try:
            with time_limit(seconds):
                return grid.attempt(self.run, shared, row.row_id, tags={})
        except TimeUp:
            raise Stopped("stopped when its time was over; another call goes on with it") from None

    # -- speed ------------------------------------------------------------------------------------------------------

    def benchmark(self) -> dict[str, Any]:
        """Time the decoding of all rows whose weights are on this machine, in turns.

        Raises:
            Stopped: the time was over first.
        """
        from steps import grid
        from steps.grid.finish import plain

        if self.kept.bench is None:
            outcomes = [self._outcome(row) for row in self.spec.rows()]
            try:
                with time_limit(self.remaining_s):
                    self.kept.bench = plain(grid.benchmark(self.run, self.shared, [o for o in outcomes if o]))
            except TimeUp:
                raise Stopped("stopped when the time was over; another call measures it") from None
            self.kept.write()
            self.write()
        rows = self.kept.bench["rows"]
        speeds = {name: {s: f["tokens_per_s"]["median"] for s, f in r["steps"].items()} for name, r in rows.items()}
        return {"headline": {}, "tokens_per_s": speeds}

    def _outcome(self, row: RowSpec) -> RowOutcome | None:
        """Return a finished row with its weights; None where another machine had them."""
        if row.row_id in self.outcomes:
            return self.outcomes[row.row_id] if self.outcomes[row.row_id].ok else None
        if row.row_id in self.kept.rows and not self._is_here(row):
            self.log(f"{row.row_id}: its weights stayed on another machine, so its speed is not measured")
            return None
        return self._attempt(row)  # from the cache

    def _is_here(self, row: RowSpec) -> bool:
        """Return whether a row's training is in the step cache of this machine."""
        training = self.kept.rows[row.row_id]["training"]
        return not training or self.run.context().cache.entry_dir("train_cell", training).is_dir()

    # -- the record -------------------------------------------------------------------------------------------------

    def results(self) -> Results:
        """Return what is finished, as the report's data."""
        return self.kept.results(self.spec, self.run.run_id, self.command)

    def write(self) -> Path:
        """Write results.json; return its path."""
        path = self.out / RESULTS
        path.write_text(self.results().model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path

    def _tell_shared(self, shared: Prepared) -> None:
        from benchmarks import _report
        from steps.cache.key import library_versions
        from steps.context import default_runs_dir
        from steps.grid.finish import REPORTED_LIBRARIES, hardware, plain
        from steps.report.build import below

        runs = default_runs_dir()
        commit = self.origin or _report.commit()
        self.kept.about = {
            "model": below(runs, {"source": self.spec.model.source, **plain(shared.model)}),
            "data": below(runs, {"source": self.spec.data.source, **plain(shared.data)}),
            "hardware": {**hardware(self.run), **_report.hardware()},
            "versions": library_versions(REPORTED_LIBRARIES),
            "commit": commit.get("commit"),
            "dirty": commit.get("dirty"),
        }
        self.out.mkdir(parents=True, exist_ok=True)


def forget_peak_memory() -> None:
    """Let the next row's peak of GPU memory be its own: in the flow every row has a process of its own.

    On a CPU that is the process's largest size so far, whichever row it was.
    """
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def use_runs_dir(path: Path) -> None:
    """Keep step cache and checkpoints below a directory; to be called before anything is prepared."""
    os.environ["DLLM_RUNS"] = str(path.absolute())
