"""A grid run: its settings, its surroundings, and the work that all rows share."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_core.errors import DllmError
from params import GridSpec, RowSpec
from steps.context import ROOT, Context, Listener, default_runs_dir
from steps.failures import Failure, RowFailed, describe, leave_word
from steps.locks import gpu_lock
from steps.row_options import options_of
from steps.tracking import TrackingRef, open_grid, touch_grid

if TYPE_CHECKING:
    from steps.prepare_data import DataArtifact
    from steps.prepare_model import ModelArtifact

STEP_FUNCTIONS = ("prepare_model", "prepare_data", "cache_anchors", "extract_trajectories")
STEP_FUNCTIONS += ("train_cell", "evaluate_cell", "sweep_cell", "benchmark")


def step_function(name: str) -> Callable[..., Any]:
    """Return the step function `name` of the module of that name.

    `DLLM_STEPS` names another module to take it from: flow tests inject cheap ones, since every task is a new process.
    """
    assert name in STEP_FUNCTIONS, name
    substitute = os.environ.get("DLLM_STEPS")
    function: Callable[..., Any] = getattr(import_module(substitute or f"steps.{name}"), name)
    return function


@dataclass(frozen=True)
class GridRun:
    """What every task of a run needs to know; small, an artifact.

    Attributes:
        run_id: Metaflow run that started the grid; a resumed run keeps it.
        settings: the resolved spec as JSON.
        use_cache: False with `--no-cache`.
        command: what the user typed.
        commit: git commit, "" outside a checkout.
        tracking: where the grid is tracked.
    """

    run_id: str
    settings: str
    use_cache: bool
    command: str
    commit: str
    tracking: TrackingRef

    @cached_property
    def spec(self) -> GridSpec:
        """The settings."""
        return GridSpec.model_validate_json(self.settings)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "spec"}  # a parsed spec is no artifact

    @property
    def spec_hash(self) -> str:
        """First 12 hex digits of the sha256 of the settings."""
        return hashlib.sha256(self.settings.encode()).hexdigest()[:12]

    def row_ids(self) -> list[str]:
        """Return the rows in table order."""
        return [row.row_id for row in self.spec.rows()]

    def training_order(self, num_layers: int) -> list[str]:
        """Return the rows in table order, except that a row comes after the one that it is built on.

        That one is then there when it is needed. Where rows are trained side by side the later one waits for it.

        Args:
            num_layers: blocks of the base model.
        """
        rows = {row.row_id: row for row in self.spec.rows()}
        ordered: dict[str, None] = {}

        def place(row: RowSpec) -> None:
            options = options_of(row)
            need = options.requirements(num_layers).anchors
            source = None if need is None or need.cell is None else rows.get(self.spec.row_id(need.cell, row.seed))
            if source is not None and source.row_id not in ordered:
                place(source)
            ordered[row.row_id] = None

        for row in rows.values():
            place(row)
        return list(ordered)

    def context(self, listeners: Sequence[Listener] = ()) -> Context:
        """Return the surroundings of a step in this process."""
        runtime = self.spec.runtime
        if runtime.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(runtime.threads)  # read when torch is imported
        return Context(
            run_id=self.run_id,
            runs_dir=default_runs_dir(),
            use_cache=self.use_cache,
            device=runtime.device,
            threads=runtime.threads,
            memory_limit_gb=runtime.memory_limit_gb,
            listeners=list(listeners),
        )

    def tags(self) -> dict[str, str]:
        """Return the tags that the grid and each row carry in the tracker."""
        return {
            "git.commit": self.commit,
            "spec.sha": self.spec_hash,
            "preset": self.spec.preset,
            "dllm.grid": self.run_id,
        }


@dataclass(frozen=True)
class Prepared:
    """What all rows share, as artifacts of the preparing steps.

    Attributes:
        model: the converted model.
        data: the tokenised, split text.
        anchors: teacher states, None when no row needs them.
        trajectories: commit orders; None when no row needs them, a Failure when they could not be made.
    """

    model: ModelArtifact
    data: DataArtifact
    anchors: Any = None
    trajectories: Any = None


_KEPT = (("model", "path"), ("data", "train_dir"), ("data", "heldout_dir"), ("anchors", "store_dir"))
"""Where the parts of `Prepared` lie."""


def require_kept(shared: Prepared, more: Iterable[str] = ()) -> None:
    """Check that what a resumed run builds on is still there: the cache may have been cleared meanwhile.

    Args:
        shared: what all rows share.
        more: further directories; "" counts as there.

    Raises:
        DllmError: something is gone.
    """
    places = [getattr(getattr(shared, part), name, "") for part, name in _KEPT]
    gone = [place for place in (*places, *more) if place and not Path(place).exists()]
    if gone:
        raise DllmError(
            f"What this run had made is no longer in the step cache (cleared since?): '{gone[0]}'.",
            "It cannot be resumed. Give the same `run` command again: it finds what is kept and makes the rest.",
        )


def git_commit() -> str:
    """Return the checkout's commit, with `-dirty` for local changes; "" outside a checkout."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def open_run(run_id: str, settings: str, *, use_cache: bool, command: str) -> GridRun:
    """Start the record of a run and say what it will do."""
    run = GridRun(run_id, settings, use_cache, command, git_commit(), TrackingRef(""))
    spec, ctx = run.spec, run.context()
    ctx.log(f"grid {run_id}: preset {spec.preset}, {spec.model.source} on {spec.data.source}")
    ctx.log(f"rows: {', '.join(run.row_ids())}")
    tracking = open_grid(
        ctx.runs_dir,
        name=f"{spec.preset} {run_id}",
        tags={**run.tags(), "metaflow.run": run_id},
        params=spec.model_dump(mode="json", exclude={"cells", "donors"}),
        note=f"{spec.description}\n\n`{command}`",
        log=ctx.log,
    )
    return GridRun(run_id, settings, use_cache, command, run.commit, tracking)


@contextmanager
def stage(run: GridRun, name: str) -> Iterator[Context]:
    """Surround work that no row owns: GPU lock, and on failure a word for the launcher and an end in the tracker.

    Raises:
        RowFailed: in place of an error that the user can mend; it needs no traceback.
    """
    ctx = run.context()
    try:
        with gpu_lock(run.spec.runtime.device, ctx.log):
            yield ctx
    except KeyboardInterrupt:
        touch_grid(run.tracking, ctx.log, status="KILLED")
        raise
    except Exception as error:
        failure = describe(error, name, name)
        report_failure(failure)
        leave_word(failure)
        touch_grid(run.tracking, ctx.log, status="FAILED")
        if failure.kind == "user":
            raise RowFailed(failure) from error
        raise


def report_failure(failure: Failure) -> None:
    """Print a failure into the task's log: the traceback where one helps, then two lines."""
    if failure.trace:
        print(failure.trace, file=sys.stderr)
    print(f"[{failure.where}] {failure.stage} failed: {failure.problem}", file=sys.stderr)
    if failure.remedy:
        print(f"[{failure.where}] {failure.remedy}", file=sys.stderr, flush=True)


def prepare(run: GridRun) -> Prepared:
    """Convert the model, then tokenise and split the text."""
    with stage(run, "prepare_data") as ctx:
        model = step_function("prepare_model")(run.spec.model, ctx, run.spec.data)
        data = step_function("prepare_data")(run.spec, model, ctx)
        return Prepared(model, data)


def prepare_anchors(run: GridRun, shared: Prepared) -> Prepared:
    """Cache the teacher's hidden states that the rows read."""
    with stage(run, "cache_anchors") as ctx:
        require_kept(shared)
        anchors = step_function("cache_anchors")(run.spec, shared.model, shared.data, ctx)
        return Prepared(shared.model, shared.data, anchors)


def prepare_trajectories(run: GridRun, shared: Prepared) -> Prepared:
    """Extract commit orders; a failure is recorded, and fails only the rows that need them."""
    ctx = run.context()
    try:
        require_kept(shared)
        with gpu_lock(run.spec.runtime.device, ctx.log):
            found = step_function("extract_trajectories")(run.spec, shared.model, shared.data, shared.anchors, ctx)
    except Exception as error:
        found = describe(error, "extract_trajectories", "extract_trajectories")
        report_failure(found)
    return Prepared(shared.model, shared.data, shared.anchors, found)


def runs_file(name: str) -> Path:
    """Return a path below the runs directory."""
    return default_runs_dir() / name
