"""Parts of training that several rows share, each a cached step: first parts of runs, and the time of a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.training_plan import TrainJob, covering_anchors

if TYPE_CHECKING:
    from steps.cache import Entry

_CALIBRATION_STEPS = 6


def shared_prefix(job: TrainJob, stop_at: int) -> Entry:
    """Return the cached first `stop_at` steps of a row: `checkpoint/` and `metrics.jsonl`."""

    def build(payload: Path, work: Path) -> dict[str, Any]:
        anchors = covering_anchors(job)

        from steps.train_run import train_prefix

        return train_prefix(job, stop_at, anchors, payload, work)

    return job.around.ctx.cache.get_or_build(**job.prefix_request(stop_at).arguments(), build=build)


def seconds_per_step(job: TrainJob) -> float:
    """Return how long a step of a row takes here; measured once and kept, so that a budget in seconds is stable."""

    settings = replace(job.settings, steps=_CALIBRATION_STEPS, checkpoint_every_s=None, sample_every_steps=None)
    short = replace(job, settings=settings)

    def build(payload: Path, work: Path) -> dict[str, Any]:
        anchors = covering_anchors(short)

        from steps.train_run import seconds_per_step as measure

        return {"seconds_per_step": measure(short, anchors, work)}

    arguments = {**short.prefix_request(0).arguments(), "kind": "step_time", "label": f"{job.row_id} step time"}
    return float(job.around.ctx.cache.get_or_build(**arguments, build=build).result["seconds_per_step"])
