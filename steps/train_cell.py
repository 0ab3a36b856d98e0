"""Train one row of a grid. Cached, resumable after a kill, and bit-equal whether or not its first part was shared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.cell_states import finished_source
from steps.extract_trajectories import row_trajectories
from steps.row_options import options_of
from steps.shared_training import seconds_per_step, shared_prefix
from steps.training_plan import CELL, Surroundings, TrainJob, covering_anchors, plan_job, prefix_wanted

if TYPE_CHECKING:
    from dllm_core.training.result import TrainResult
    from params.schema import GridSpec, RowSpec
    from steps.cache import Entry
    from steps.cache_anchors import AnchorArtifact
    from steps.context import Context
    from steps.extract_trajectories import TrajectoryArtifact
    from steps.prepare_data import DataArtifact
    from steps.prepare_model import ModelArtifact


@dataclass(frozen=True)
class TrainedCell:
    """A finished row; an artifact.

    Attributes:
        cell_dir: directory that `dllm_core.load_cell` takes; "" for a row that is only measured.
        metrics_path: metrics.jsonl, one line a step; "" for a row that is only measured.
        summary: cost and outcome. Own work: steps, response_tokens, positions, wall_s (seconds of training),
            tokens_per_s, peak_memory_gb, trainable_params, new_params, distinct_samples, final_loss, final_losses.
            With what the row is charged for work that others share: flops (all of it), teacher_flops,
            extraction_flops and extraction_s (anchors, commit orders and the cell that it is built on, as if made for
            this row alone).
        key: cache key.
        hit: it came from the cache.
        origin: run that trained it.
        seconds: what building the entry took.
        states: states of the cell that the row is built on; None for a row that starts from the base model.
    """

    cell_dir: str
    metrics_path: str
    summary: dict[str, Any]
    key: str
    hit: bool
    origin: str
    seconds: float
    states: AnchorArtifact | None = None


def train_cell(
    spec: GridSpec,
    row: RowSpec,
    model: ModelArtifact,
    data: DataArtifact,
    anchors: AnchorArtifact | None,
    trajectories: TrajectoryArtifact | None,
    ctx: Context,
) -> TrainedCell:
    """Train a row, or find the result.

    A row that branches off another one starts from that row's first part, which is a cached step of its own; the
    other row continues from the same checkpoint when it is there or somebody needs it. A row that is built on another
    one finds that one finished, or finishes it, and reads its states. `DLLM_FAIL_CELL=NAME` makes the row or cell of
    that name raise half-way (a hook for tests).

    Args:
        spec: the grid's settings.
        row: which row.
        model: the converted base model.
        data: training sequences.
        anchors: teacher states; None when no row reads any.
        trajectories: commit orders; a missing or failed one is extracted (again) here.
        ctx: run context.

    Raises:
        DllmError: a budget that gives no steps, diverged training, stores that do not fit.
    """
    if not options_of(row).capabilities().trains:
        return TrainedCell("", "", _only_measured(), "", True, ctx.run_id, 0.0)
    around = Surroundings(spec=spec, model=model, data=data, anchors=anchors, ctx=ctx)
    job = plan_job(row, around, seconds_per_step)
    entry = finished(job)
    return TrainedCell(
        cell_dir=str(entry.path / CELL),
        metrics_path=str(entry.path / "metrics.jsonl"),
        summary=entry.result,
        key=entry.key,
        hit=entry.hit,
        origin=entry.origin,
        seconds=entry.seconds,
        states=None if job.source is None else covering_anchors(job),
    )


def finished(job: TrainJob) -> Entry:
    """Return the cached, finished training of a row: `cell/`, `metrics.jsonl` and the summary."""

    def build(payload: Path, work: Path) -> dict[str, Any]:
        return _build(job, payload, work)

    return job.around.ctx.cache.get_or_build(**job.cell_request().arguments(), build=build)


def _build(job: TrainJob, payload: Path, work: Path) -> dict[str, Any]:
    source = None if job.source is None else finished_source(job)
    if source is not None:
        job = replace(job, source_dir=source.path / CELL)
    anchors = covering_anchors(job)
    if source is None:
        job = replace(job, around=replace(job.around, anchors=anchors or job.around.anchors))
    prefix = _prefix(job)
    orders = None if job.trajectories is None else row_trajectories(job)

    from steps.train_run import train_cell as run

    def charged(result: TrainResult) -> dict[str, float]:
        return _charged(job, result, anchors, orders, source)

    return run(
        job,
        anchors,
        None if prefix is None else prefix.path,
        None if orders is None else orders.path,
        charged,
        payload,
        work,
    )


def _prefix(job: TrainJob) -> Entry | None:
    """Return the first part a row continues from: that of the row it branches off, or its own if that is shared."""
    if job.branch is not None:
        return shared_prefix(job.branch, job.branch_at)
    stop_at = prefix_wanted(job, seconds_per_step)
    return None if stop_at is None else shared_prefix(job, stop_at)


def _charged(
    job: TrainJob, result: TrainResult, anchors: AnchorArtifact | None, orders: Entry | None, source: Entry | None
) -> dict[str, float]:
    seconds = teacher = extraction = 0.0
    need = job.requirements.anchors
    if anchors is not None and need is not None:
        seconds, teacher = anchors.part(need).stand_alone_cost(result.distinct_samples)
    if orders is not None:
        seconds += orders.result["seconds"]
        extraction = orders.result["flops"]
    if source is not None:
        seconds += source.result["wall_s"] + source.result["extraction_s"]
        extraction += source.result["flops"]
    return {"extraction_s": seconds, "teacher_flops": teacher, "extraction_flops": extraction}


def _only_measured() -> dict[str, Any]:
    counts = ("steps", "response_tokens", "positions", "trainable_params", "new_params", "distinct_samples")
    amounts = ("flops", "teacher_flops", "extraction_flops", "extraction_s", "wall_s")
    nothing: dict[str, Any] = {**dict.fromkeys(counts, 0), **dict.fromkeys(amounts, 0.0)}
    return {**nothing, "tokens_per_s": None, "peak_memory_gb": None, "final_loss": None, "final_losses": {}}
