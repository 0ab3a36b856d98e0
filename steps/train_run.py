"""Training a row inside its cached step: everything that needs torch."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.sequences import SequenceSet
from dllm_core.data.trajectories import TrajectoryStore
from dllm_core.methods.cell import save_cell
from dllm_core.methods.protocol import Method, Resources
from dllm_core.methods.registry import room_method
from dllm_core.methods.tokenizer import load_tokenizer
from dllm_core.training.checkpoint import checkpoint_path
from dllm_core.training.loop import Callbacks, Trainer
from dllm_core.training.metrics_log import MetricsLog
from dllm_core.training.result import TrainResult

if TYPE_CHECKING:
    from torch import Tensor

    from steps.cache_anchors import AnchorArtifact
    from steps.training_plan import TrainJob

FAIL_VARIABLE = "DLLM_FAIL_CELL"
"""Test hook: the row or cell of this name raises in the middle of its training."""
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
CHECKPOINT = "checkpoint"
_SAMPLE_PROMPTS = 2
_WORDS_EVERY_S = 2.0


def build_method(job: TrainJob) -> Method:
    """Return the row's untrained method, fp32, on the job's device; new modules are drawn from the row's seed."""
    import torch

    around = job.around
    if around.spec.runtime.threads is not None:
        torch.set_num_threads(around.spec.runtime.threads)
    with torch.random.fork_rng():  # modules that the base model does not have start alike in every process
        torch.manual_seed(job.seed)
        return room_method(job.room).from_base(job.base_dir(), job.options, device=around.device)


class Recorder:
    """Writes what a run tells: metrics.jsonl, progress, text samples, and last_words.json for the case of a kill."""

    def __init__(self, job: TrainJob, work: Path, prefix_metrics: Path | None = None) -> None:
        self.job, self.work = job, work
        self.metrics = MetricsLog(work / METRICS)
        self.samples = MetricsLog(work / SAMPLES)
        self.prefix_metrics = prefix_metrics
        self.progress = job.around.ctx.progress(job.row_id, every_s=job.settings.log_every_s)
        self._told = 0.0

    def callbacks(self) -> Callbacks:
        """Return the trainer's callbacks."""
        return Callbacks(on_start=self.start, on_metrics=self.record, on_sample=self.sample)

    def start(self, step: int) -> None:
        """Drop rows of steps that will be done again; take over those of the prefix."""
        own = self.metrics.path.exists()
        self.metrics.rewind(step, source=None if own else self.prefix_metrics)
        if self.samples.path.exists():
            self.samples.rewind(step)
        self._last_words({"phase": "start", "step": step})
        if step:
            self.job.around.ctx.log(f"[{self.job.row_id}] continues after step {step} of {self.job.settings.steps}")

    def record(self, row: dict[str, Any]) -> None:
        """Take a step's metrics."""
        self.metrics.write(row)
        self.job.around.ctx.record(self.job.row_id, row)
        self.progress(row["step"], self.job.settings.steps, loss=row["train/loss"], tokens_s=row["train/tokens_per_s"])
        if time.monotonic() - self._told > _WORDS_EVERY_S:
            self._last_words(row)
        self._fail_on_demand(row["step"])

    def sample(self, step: int, sequences: list[Tensor]) -> None:
        """Keep a sample of text."""
        tokenizer = load_tokenizer(Path(self.job.around.model.path))
        texts = [tokenizer.decode(ids) for ids in sequences]
        self.samples.write({"step": step, "texts": texts})
        self.job.around.ctx.log(f"[{self.job.row_id}] sample at step {step}: {texts[0]!r}")

    def _last_words(self, row: dict[str, Any]) -> None:
        self._told = time.monotonic()
        words = {
            "row": self.job.row_id,
            "pid": os.getpid(),
            "time": time.time(),
            "phase": row["phase"],
            "step": row["step"],
            "total_steps": self.job.settings.steps,
            "memory_gb": row.get("train/memory_gb"),
        }
        temporary = self.work / "last_words.tmp"
        temporary.write_text(json.dumps(words), encoding="utf-8")
        temporary.replace(self.work / "last_words.json")

    def _fail_on_demand(self, step: int) -> None:
        wanted = os.environ.get(FAIL_VARIABLE)
        if wanted in (self.job.row_id, self.job.cell) and step >= max(1, self.job.settings.steps // 2):
            raise RuntimeError(f"made to fail at step {step} by {FAIL_VARIABLE}={wanted}")


def _trainer(
    job: TrainJob, work: Path, anchors: AnchorArtifact | None, orders: Path | None, recorder: Recorder | None
) -> Trainer:
    train = SequenceSet.load(Path(job.around.data.train_dir))
    resources = Resources(anchors=None if anchors is None else anchors.open())
    if orders is not None and job.trajectories is not None:
        identity = json.loads((orders / "identity.json").read_text(encoding="utf-8"))
        resources.trajectories = TrajectoryStore(orders, mode=job.trajectories.mode, identity=identity)
    prompts = []
    if job.settings.sample_every_steps:
        held = SequenceSet.load(Path(job.around.data.heldout_dir)).batch_of(range(_SAMPLE_PROMPTS))
        first_B = held.response_BL.int().argmax(1).tolist()
        prompts = [held.input_ids_BL[i, :n].to(job.around.device) for i, n in enumerate(first_B)]
    return Trainer(
        build_method(job),
        train,
        job.order,
        job.settings,
        resources,
        NoiseSource(job.seed),
        work,
        None if recorder is None else recorder.callbacks(),
        sample_prompts=prompts,
    )


def train_prefix(
    job: TrainJob, stop_at: int, anchors: AnchorArtifact | None, payload: Path, work: Path
) -> dict[str, Any]:
    """Train the first `stop_at` steps; the payload gets the checkpoint and the metrics so far."""
    result = _trainer(job, work, anchors, None, Recorder(job, work)).run(stop_at=stop_at)
    shutil.move(checkpoint_path(work / "checkpoints", stop_at), payload / CHECKPOINT)
    shutil.copyfile(work / METRICS, payload / METRICS)
    return {"steps": stop_at, "wall_s": result.wall_s, "flops": result.flops}


def train_cell(
    job: TrainJob,
    anchors: AnchorArtifact | None,
    prefix: Path | None,
    orders: Path | None,
    charged: Callable[[TrainResult], dict[str, float]],
    payload: Path,
    work: Path,
) -> dict[str, Any]:
    """Train a row to the end; the payload gets the cell directory, metrics and samples.

    Args:
        job: what to train.
        anchors: teacher states it reads.
        prefix: payload of the prefix it continues from.
        orders: payload with its commit orders.
        charged: from the result, the cost of what others prepared for this row ("extraction_s", "flops", ...).
        payload: directory of the result.
        work: directory that outlives a kill; checkpoints.
    """
    recorder = Recorder(job, work, None if prefix is None else prefix / METRICS)
    trainer = _trainer(job, work, anchors, orders, recorder)
    if job.branch is not None:
        assert job.branch_at in trainer.starts, (job.branch_at, trainer.starts)
    result = trainer.run(resume_from=None if prefix is None else prefix / CHECKPOINT)
    summary = summarise(result, charged(result))
    save_cell(
        trainer.method,
        payload / "cell",
        cell=job.cell,
        room=job.room,
        seed=job.seed,
        tokenizer_dir=job.around.model.path,
        summary=summary,
    )
    for name in (METRICS, SAMPLES):
        if (work / name).exists():
            shutil.copyfile(work / name, payload / name)
    return summary


def summarise(result: TrainResult, charged: dict[str, float]) -> dict[str, Any]:
    """Return a row's training summary: its own work plus what it is charged for work that others share."""
    summary = asdict(result)
    losses = summary.pop("final_losses")
    summary["flops"] += charged.get("teacher_flops", 0.0) + charged.get("extraction_flops", 0.0)
    summary["teacher_flops"] += charged.get("teacher_flops", 0.0)
    summary["extraction_flops"] = charged.get("extraction_flops", 0.0)
    summary["extraction_s"] = charged.get("extraction_s", 0.0)
    summary["final_loss"] = losses["loss"]
    summary["final_losses"] = losses
    return summary


def seconds_per_step(job: TrainJob, anchors: AnchorArtifact | None, work: Path) -> float:
    """Run a (short) job and return the median time of its steps after the first."""
    rows: list[dict[str, Any]] = []
    trainer = _trainer(job, work, anchors, None, None)
    trainer.callbacks = Callbacks(on_metrics=rows.append)
    trainer.run()
    times = sorted(row["train/step_s"] for row in rows[1:])
    return float(times[len(times) // 2])
