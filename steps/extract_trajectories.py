"""Commit orders for the rows that train on them; a row whose orders cannot be made fails alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.row_options import options_of
from steps.shared_training import seconds_per_step, shared_prefix
from steps.training_plan import Surroundings, TrainJob, plan_job

if TYPE_CHECKING:
    from params.schema import GridSpec
    from steps.cache import Entry
    from steps.cache_anchors import AnchorArtifact
    from steps.context import Context
    from steps.prepare_data import DataArtifact
    from steps.prepare_model import ModelArtifact


@dataclass(frozen=True)
class TrajectoryArtifact:
    """Commit orders of a grid; an artifact.

    Attributes:
        paths: row id -> directory of its store.
        errors: row id -> what went wrong, in one line.
        seconds: what this run spent, first parts of runs included.
        hit: everything was there.
    """

    paths: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    hit: bool = True


def extract_trajectories(
    spec: GridSpec, model: ModelArtifact, data: DataArtifact, anchors: AnchorArtifact | None, ctx: Context
) -> TrajectoryArtifact | None:
    """Extract the commit orders that the grid's rows train on, and train the students they come from.

    Returns:
        None when no row needs any.
    """
    around = Surroundings(spec=spec, model=model, data=data, anchors=anchors, ctx=ctx)
    paths: dict[str, str] = {}
    errors: dict[str, str] = {}
    seconds, hit = 0.0, True
    for row in spec.rows():
        options = options_of(row)
        if options.requirements(model.num_layers).trajectories is None:
            continue
        try:
            entry = row_trajectories(plan_job(row, around, seconds_per_step))
        except Exception as error:  # whatever it is, it concerns this row only, which meets it again when it trains
            errors[row.row_id] = (str(error).strip() or type(error).__name__).splitlines()[0]
            ctx.log(f"[{row.row_id}] no commit orders: {errors[row.row_id]}")
            continue
        paths[row.row_id] = str(entry.path)
        hit = hit and entry.hit
        seconds += 0.0 if entry.hit else entry.seconds
    return TrajectoryArtifact(paths, errors, seconds, hit) if paths or errors else None


def row_trajectories(job: TrainJob) -> Entry:
    """Return the cached commit orders of one row."""
    need = job.trajectories
    assert need is not None

    def build(payload: Path, work: Path) -> dict[str, Any]:
        student = None
        if need.mode == "student":
            assert job.branch is not None
            student = shared_prefix(job.branch, job.branch_at).path

        from steps.trajectory_run import extract

        return extract(job, student, payload)

    return job.around.ctx.cache.get_or_build(**job.trajectory_request().arguments(), build=build)
