"""Extracting commit orders inside a cached step: everything that needs torch."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.sequences import SequenceSet
from dllm_core.data.trajectories import TrajectoryStore, trajectory_identity
from dllm_core.methods.trajectory.extraction import extract_orders, num_forwards, subset
from dllm_core.training.checkpoint import load_weights, read_checkpoint
from steps.train_run import CHECKPOINT, build_method

if TYPE_CHECKING:
    from steps.training_plan import TrainJob

_TOKENS_PER_BATCH = 1280


def extract(job: TrainJob, student: Path | None, payload: Path) -> dict[str, Any]:
    """Write the commit orders of the subset that a row's trajectory phase loops over.

    Args:
        job: the row.
        student: payload of the prefix whose weights decode; None runs the base model.
        payload: directory of the store.
    """
    import torch

    need, around = job.trajectories, job.around
    assert need is not None
    train = SequenceSet.load(Path(around.data.train_dir))
    chosen = subset(job.order, job.branch_at * job.settings.batch_size, need.responses)
    model = build_method(job.branch or job)
    if student is not None:
        load_weights(read_checkpoint(student / CHECKPOINT), model)
    assert model.backbone is not None, "a student is the backbone itself"
    backbone = model.backbone.to(torch.bfloat16 if job.settings.dtype == "bf16" else torch.float32).eval()
    identity = trajectory_identity(request=job.trajectory_request().key(), need=asdict(need))
    (payload / "identity.json").write_text(json.dumps(identity), encoding="utf-8")
    store = TrajectoryStore(payload, mode=need.mode, identity=identity)
    progress = around.ctx.progress(f"{job.row_id}-orders", unit="response")
    noise, flops, started = NoiseSource(job.seed), 0.0, time.perf_counter()
    size = max(1, _TOKENS_PER_BATCH // train.length)
    for start in range(0, len(chosen), size):
        batch = train.batch(chosen[start : start + size])
        steps_BL = extract_orders(backbone, batch.to(around.device), need, noise)
        for key, steps_L, response_L in zip(batch.sequence_keys, steps_BL, batch.response_BL, strict=True):
            store.write(key, steps_L.cpu(), response_L)
            scored = int(response_L.sum())
            forwards = num_forwards(need, scored)
            # over the forwards of a response, half of its rows are masked on average
            flops += forwards * backbone.flops_forward(train.length, train.length, scored // 2)
        progress(min(start + size, len(chosen)), len(chosen))
    return {"responses": len(chosen), "seconds": time.perf_counter() - started, "flops": flops}
