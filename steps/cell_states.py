"""States of a trained cell, for a row that is built on it: cached like the base model's, once that cell is trained.

The store is that of the cell's training, as its cache key names it: known before the cell is trained, so that nothing
is trained to look something up. Files, checks, estimates and refusals are those of `steps.cache_anchors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dllm_core.errors import DllmError
from steps.anchor_needs import wanted_by
from steps.cache_anchors import TrainedTeacher, cover_anchors, teacher_identity
from steps.training_plan import TrainJob

if TYPE_CHECKING:
    from steps.cache import Entry
    from steps.cache_anchors import AnchorArtifact


def teacher_of(job: TrainJob) -> str:
    """Return the identity of the trained cell whose states a job reads."""
    return teacher_identity(_teacher(job).identity, job.around.spec)


def cell_anchors(job: TrainJob) -> AnchorArtifact:
    """Return the states that a job reads of the cell it is built on, computing what is missing.

    Raises:
        DllmError: that cell could not be trained.
        StoreError: an 8-bit store, or one that disagrees with the cell.
        ResourceError: the disk is too small.
    """
    around = job.around
    return cover_anchors(around.spec, wanted_by([job]), around.model, around.data, around.ctx, _teacher(job))


def _teacher(job: TrainJob) -> TrainedTeacher:
    assert job.source is not None
    return TrainedTeacher(
        cell=job.source.row_id,
        identity=f"train_cell/{job.source.cell_request().key()}",
        directory=job.base_dir,
    )


def finished_source(job: TrainJob) -> Entry:
    """Return the finished training of the cell that a job is built on; it is trained here if nobody has done so yet.

    Raises:
        DllmError: it could not be trained.
    """
    from steps.train_cell import finished

    source = job.source
    assert source is not None
    try:
        return finished(source)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DllmError(
            f"'{job.row_id}' is built on '{source.row_id}', whose training failed: {reason}",
            f"Mend '{source.row_id}' first, then resume; or build '{job.cell}' on another cell.",
        ) from error
