"""The rows of a grid: every row gets its chance, a failure is kept, and only failed rows are tried again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.context import Listener
from steps.failures import Failure, RowFailed, describe, forget, killed, leave_word
from steps.grid.run import (
    GridRun,
    Prepared,
    prepare_trajectories,
    report_failure,
    require_kept,
    step_function,
)
from steps.locks import gpu_lock
from steps.row_options import options_of
from steps.tracking import RowTracker, numbers, touch_grid

if TYPE_CHECKING:
    from params import RowSpec
    from steps.evaluate_cell import Evaluation
    from steps.train_cell import TrainedCell


@dataclass(frozen=True)
class RowOutcome:
    """What became of a row; an artifact.

    Attributes:
        row_id: the row.
        trained: None when training failed.
        evaluation: None when it did not get there.
        failure: None when all went well.
        tracking_id: child run; "" when the work took no time worth a live mirror (then the report step opens it).
        tags: of the attempt, for the tracker.
    """

    row_id: str
    trained: TrainedCell | None = None
    evaluation: Evaluation | None = None
    failure: Failure | None = None
    tracking_id: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the row is finished."""
        return self.failure is None


def row_of(run: GridRun, row_id: str) -> RowSpec:
    """Return the settings of a row."""
    return next(row for row in run.spec.rows() if row.row_id == row_id)


def needs_trajectories(row: RowSpec, num_layers: int) -> bool:
    """Return whether a row cannot train without commit orders."""
    options = options_of(row)
    return options.requirements(num_layers).trajectories is not None


def row_tracker(run: GridRun, row: RowSpec, more_tags: dict[str, str], log: Any) -> RowTracker:
    """Return the row's mirror in the tracker; nothing is opened yet."""
    tags = {
        **run.tags(),
        "cell": row.cell.name,
        "method": row.cell.method,
        "seed": str(row.seed),
        **more_tags,
    }
    params = {"cell": row.cell.name, "method": row.cell.method, "seed": row.seed, "options": row.cell.options}
    return RowTracker(run.tracking, row.row_id, tags, {**params, "train": row.train.model_dump(mode="json")}, log)


def _run_row(
    run: GridRun, shared: Prepared, row_id: str, tags: dict[str, str], listeners: Sequence[Listener]
) -> RowOutcome:
    """Train and evaluate a row, raising RowFailed on any error."""
    row = row_of(run, row_id)
    ctx = run.context(listeners)
    tracker = row_tracker(run, row, tags, ctx.log)
    ctx.listeners.append(tracker.record)
    doing = "train_cell"
    try:
        if isinstance(shared.trajectories, Failure) and needs_trajectories(row, shared.model.num_layers):
            raise RowFailed(Failure(row_id, *_rest(shared.trajectories)))
        require_kept(shared)
        with gpu_lock(run.spec.runtime.device, ctx.log):
            trained = step_function("train_cell")(
                run.spec, row, shared.model, shared.data, shared.anchors, shared.trajectories, ctx
            )
            doing = "evaluate_cell"
            evaluation = step_function("evaluate_cell")(
                run.spec, row, trained, shared.model, shared.data, ctx, anchors=shared.anchors
            )
            if run.spec.eval.step_sweep is not None or run.spec.eval.parallelism is not None:
                doing = "sweep_cell"
                evaluation = step_function("sweep_cell")(
                    run.spec, row, trained, shared.model, shared.data, ctx, evaluation
                )
    except KeyboardInterrupt:
        tracker.finish("KILLED", timeout_s=3)
        raise
    except Exception as error:
        failure = describe(error, row_id, doing)
        tracker.tag("failure", failure.problem)
        tracker.finish("FAILED")
        raise RowFailed(failure) from error
    if not tracker.is_open:
        return RowOutcome(row_id, trained, evaluation, tags=tags)
    return RowOutcome(row_id, trained, evaluation, tracking_id=mirror(tracker, trained, evaluation))


def _rest(failure: Failure) -> tuple[Any, ...]:
    return failure.stage, failure.kind, failure.problem, failure.remedy, failure.trace


def mirror(tracker: RowTracker, trained: TrainedCell, evaluation: Evaluation) -> str:
    """Write what a finished row has into its child run; return the run's id."""
    origin = trained.origin if trained.hit else ""
    tracker.open()
    if trained.metrics_path:
        tracker.replay(Path(trained.metrics_path), origin)
    step = int(trained.summary.get("steps") or 0)
    tracker.record(
        tracker.row,
        {"step": step, **numbers(trained.summary, "train/summary"), **numbers(evaluation.metrics, "eval")},
    )
    return tracker.finish("FINISHED", files=[Path(evaluation.path)])


def attempt(
    run: GridRun, shared: Prepared, row_id: str, *, tags: dict[str, str], listeners: Sequence[Listener] = ()
) -> RowOutcome:
    """Train and evaluate a row; a failure is recorded, not raised, so that it costs the other rows nothing."""
    try:
        return _run_row(run, shared, row_id, {**tags, "attempt": "1"}, listeners)
    except RowFailed as failed:
        report_failure(failed.failure)
        return RowOutcome(row_id, failure=failed.failure)


def repair(
    run: GridRun, shared: Prepared, row_id: str, *, tags: dict[str, str], listeners: Sequence[Listener] = ()
) -> RowOutcome:
    """Try a failed row again; what it raises now ends the run, so that a plain `resume` comes back to this row.

    Raises:
        RowFailed: it failed again.
    """
    if isinstance(shared.trajectories, Failure) and needs_trajectories(row_of(run, row_id), shared.model.num_layers):
        shared = prepare_trajectories(run, shared)
    try:
        outcome = _run_row(run, shared, row_id, {**tags, "attempt": "2"}, listeners)
    except RowFailed as failed:
        report_failure(failed.failure)
        leave_word(failed.failure)
        touch_grid(run.tracking, run.context().log, status="FAILED", tags={"failure": failed.failure.problem})
        raise
    forget(row_id)
    return outcome


def killed_outcome(row_id: str) -> RowOutcome:
    """Return the outcome of a row whose task left nothing behind."""
    return RowOutcome(row_id, failure=killed(row_id))


def collect(run: GridRun, trained: Sequence[str], found: dict[int, RowOutcome | None]) -> list[RowOutcome]:
    """Return outcomes in table order and leave word of each failure.

    Args:
        run: the run.
        trained: row ids in the order in which they were trained.
        found: place in that order -> outcome, None where a task left nothing behind.
    """
    outcomes = {row_id: found.get(i) or killed_outcome(row_id) for i, row_id in enumerate(trained)}
    for outcome in outcomes.values():
        if outcome.failure is not None:
            leave_word(outcome.failure)
    return [outcomes[row_id] for row_id in run.row_ids()]


def merge(outcomes: Iterable[RowOutcome], repaired: Iterable[RowOutcome]) -> list[RowOutcome]:
    """Return the outcomes with the repaired ones in place of the failed."""
    better = {o.row_id: o for o in repaired}
    return [better.get(o.row_id, o) for o in outcomes]


def failed_rows(trained: Sequence[str], outcomes: Iterable[RowOutcome]) -> list[str]:
    """Return the ids of failed rows, in the order in which they are trained."""
    failed = {o.row_id for o in outcomes if not o.ok}
    return [row_id for row_id in trained if row_id in failed]
