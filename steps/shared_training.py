"""Parts of training that several rows share, each a cached step: first parts of runs, and the time of a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.machine import probe, speed_conditions
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
    """Return how long a step of a row takes here; measured once a machine and kept: budgets in seconds are stable."""

    settings = replace(job.settings, steps=_CALIBRATION_STEPS, checkpoint_every_s=None, sample_every_steps=None)
    short = replace(job, settings=settings)

    def build(payload: Path, work: Path) -> dict[str, Any]:
        anchors = covering_anchors(short)

        from steps.train_run import seconds_per_step as measure

        return {"seconds_per_step": measure(short, anchors, work)}

    runtime = job.around.spec.runtime
    request = short.prefix_request(0)
    timed = replace(
        request,
        kind="step_time",
        fields={**request.fields, "hardware": speed_conditions(probe(runtime.device, runtime.threads))},
        label=f"{job.row_id} step time",
    )
    return float(job.around.ctx.cache.get_or_build(**timed.arguments(), build=build).result["seconds_per_step"])
