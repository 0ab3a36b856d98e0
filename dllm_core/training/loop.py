"""The training loop. It knows the protocol of a room and nothing of any method.

Everything random is keyed (sample order, corruption, dropout by step), so a run is a function of the weights, the
settings and the step: a checkpoint needs no generator states, and a resumed run repeats an uninterrupted one bit for
bit on the same hardware with the same number of threads.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_core import hardware
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.data.order import SampleOrder
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import ContractError, DllmError
from dllm_core.hardware import memory_gb, synchronise
from dllm_core.methods.protocol import Method, Resources, SamplingRequest, StepInfo
from dllm_core.training.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint, write_checkpoint
from dllm_core.training.interrupt import StopSignals
from dllm_core.training.optimiser import MasterAdamW
from dllm_core.training.result import Counters, TrainResult
from dllm_core.training.schedule import check_starts, learning_rate_scale, phase_starts, step_info
from dllm_core.training.settings import TrainSettings
from dllm_core.training.tensor_file import checksum

Metrics = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What a run tells its caller; each is optional.

    Attributes:
        on_metrics: after every step, {"step", "time", "phase", "train/..."}.
        on_progress: the same, at most every `log_every_s` seconds.
        on_start: before the first step, with the number of steps already finished.
        on_sample: (finished steps, sequences) of the text sample.
    """

    on_metrics: Callable[[Metrics], None] | None = None
    on_progress: Callable[[Metrics], None] | None = None
    on_start: Callable[[int], None] | None = None
    on_sample: Callable[[int, list[Tensor]], None] | None = None


@dataclass
class _Work:
    """What the micro-batches of one step add up to."""

    parts: dict[str, float]
    flops: float = 0.0
    teacher_flops: float = 0.0
    positions: int = 0


class Trainer:
    """Trains a method.

    Args:
        method: built from its backbone, fp32, on `device`. Afterwards it holds the trained fp32 weights.
        sequences: training sequences.
        order: the grid's common order over them.
        settings: see `TrainSettings`.
        resources: stores the method reads.
        noise: keyed randomness of the run.
        workdir: checkpoints go to `workdir/checkpoints`; the newest valid one is continued from.
        callbacks: see `Callbacks`; a plain function is taken as `on_metrics`.
        checkpoint_at: finished steps at which a checkpoint is written whatever the clock says.
        sample_prompts: prompts (1-D int64) of the text sample every `sample_every_steps`.
        peak_flops: base of MFU in FLOP/s; None measures a GEMM.
    """

    def __init__(
        self,
        method: Method,
        sequences: SequenceSet,
        order: SampleOrder,
        settings: TrainSettings,
        resources: Resources,
        noise: NoiseSource,
        workdir: Path,
        callbacks: Callbacks | Callable[[Metrics], None] | None = None,
        *,
        checkpoint_at: Collection[int] = (),
        sample_prompts: Sequence[Tensor] = (),
        peak_flops: float | None = None,
    ) -> None:
        self.method, self.sequences, self.order = method, sequences, order
        self.settings, self.resources, self.noise = settings, resources, noise
        self.workdir = workdir
        self.callbacks = callbacks if isinstance(callbacks, Callbacks) else Callbacks(on_metrics=callbacks)
        self.checkpoint_at = frozenset(checkpoint_at)
        self.sample_prompts = list(sample_prompts)
        self.phases = method.phases()
        self.starts = settings.phase_starts or phase_starts(self.phases, settings.steps)
        check_starts(self.starts, self.phases, settings.steps)
        self.counters = Counters()
        self._optimiser: MasterAdamW | None = None
        self._prepared: frozenset[str] = frozenset()  # frozen parameters that `Method.prepare` filled
        if settings.freeze:
            method.freeze(settings.freeze)
        if settings.activation_checkpointing:
            method.enable_activation_checkpointing()
        self.device = method.device
        dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
        self.peak_flops = peak_flops or hardware.peak_flops(self.device.type, dtype)

    @property
    def optimiser(self) -> MasterAdamW:
        """Masters and moments; there from `begin` on, since a fresh run prepares the method first."""
        assert self._optimiser is not None, "call begin() first"
        return self._optimiser

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self, stop_at: int | None = None, resume_from: Path | None = None) -> TrainResult:
        """Train to the end, or to `stop_at` finished steps and leave a checkpoint there.

        Args:
            stop_at: finished steps after which to stop.
            resume_from: checkpoint directory of another run to branch from when `workdir` holds none: its weights,
                moments, step and cost are taken over.

        Raises:
            DllmError: the loss or its gradient is not finite.
            KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, once a checkpoint is written.
        """
        step = self.begin(resume_from)
        stop = self.settings.steps if stop_at is None else min(stop_at, self.settings.steps)
        if self.callbacks.on_start:
            self.callbacks.on_start(step)
        self.method.train()
        saved_at = logged_at = time.monotonic()
        with torch.random.fork_rng(devices=[]), StopSignals() as signals:
            while step < stop:
                row = self.step(step)
                step += 1
                logged_at = self._tell(row, logged_at)
                due = self.settings.checkpoint_every_s
                late = due is not None and time.monotonic() - saved_at >= due and step < self.settings.steps
                forced = step in self.checkpoint_at or (step == stop and stop_at is not None)
                if late or forced or signals.received is not None:
                    self.save_checkpoint(step)
                    saved_at = time.monotonic()
                if signals.received is not None:
                    signals.leave()
        self.method.eval()
        self.optimiser.restore_fp32()
        return self._result(step)

    def begin(self, resume_from: Path | None = None) -> int:
        """Restore a checkpoint, or prepare the method for a fresh run; return the finished steps. `run` does this.

        Args:
            resume_from: as for `run`.
        """
        checkpoint = newest_checkpoint(self.workdir / "checkpoints", self.settings.identity())
        own = checkpoint is not None
        if checkpoint is None and resume_from is not None:
            checkpoint = read_checkpoint(resume_from)
        if checkpoint is None:
            self._prepare()
            self._build_optimiser()
            return 0
        tensors = checkpoint.tensors()
        self._take_frozen(tensors, strict=own)
        self._build_optimiser()
        return self._load(checkpoint, tensors, strict=own)

    def step(self, step: int) -> Metrics:
        """Do 0-based optimiser step `step` and return its metrics; `run` does this and all that surrounds it.

        Whoever drives the steps calls `begin` before the first.
        """
        started = time.perf_counter()
        settings = self.settings
        info = step_info(step, self.phases, self.starts, steps=settings.steps, batch_size=settings.batch_size)
        torch.manual_seed(_step_seed(settings.seed, step))  # dropout, where a model has it
        chosen = self.method.select_samples(self.order, info)
        batch = self.sequences.batch(chosen)
        work = self._accumulate(batch, info)
        loss = work.parts["loss"]
        scale = learning_rate_scale(
            step, settings.steps, warmup_ratio=settings.warmup_ratio, min_lr_ratio=settings.min_lr_ratio
        )
        norm = self.optimiser.step(scale)
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise DllmError(
                f"Training diverged at step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}.",
                f"Lower train.lr (now {settings.lr:g}) or raise train.warmup_ratio (now {settings.warmup_ratio:g}).",
            )
        self.method.on_step_end(info)
        synchronise(self.device)
        seconds = time.perf_counter() - started
        tokens = int(batch.response_BL.sum())
        self._count(work, tokens, seconds)
        return self._metrics(info, work, norm, scale, tokens / seconds, seconds)

    def _accumulate(self, batch: Batch, info: StepInfo) -> _Work:
        corrupted = self.method.corrupt(batch, info, self.noise)
        totals = self.method.totals(corrupted)
        rows, size = len(batch), self.settings.micro_batch_size or len(batch)
        sums: dict[str, Any] = {"loss": 0.0}
        work = _Work(parts={})
        for start in range(0, rows, size):
            micro = corrupted.rows(start, min(start + size, rows)).to(self.device)
            out = self.method.loss(micro, totals, info, self.resources)
            if out.loss.requires_grad:  # a micro-batch in which nothing is scored contributes nothing
                out.loss.backward()
            for name, value in {"loss": out.loss.detach(), **out.parts}.items():
                sums[name] = sums.get(name, 0.0) + value
            work.flops += out.flops
            work.teacher_flops += out.teacher_flops
            work.positions += out.positions
        work.parts = {name: float(value) for name, value in sums.items()}
        return work

    def _count(self, work: _Work, tokens: int, seconds: float) -> None:
        counters = self.counters
        counters.response_tokens += tokens
        counters.positions += work.positions
        counters.flops += work.flops
        counters.teacher_flops += work.teacher_flops
        counters.wall_s += seconds
        counters.peak_memory_gb = max(counters.peak_memory_gb, memory_gb(self.device)[1])
        counters.recent.append(work.parts)

    def _metrics(
        self, info: StepInfo, work: _Work, norm: float, scale: float, tokens_per_s: float, seconds: float
    ) -> Metrics:
        return {
            "step": info.step + 1,
            "time": time.time(),
            "phase": info.phase,
            **{f"train/{name}": value for name, value in work.parts.items()},
            "train/grad_norm": norm,
            "train/lr": self.settings.lr * scale,
            "train/tokens_per_s": tokens_per_s,
            "train/step_s": seconds,
            "train/mfu": work.flops / seconds / self.peak_flops,
            "train/memory_gb": memory_gb(self.device)[0],
            "train/response_tokens": self.counters.response_tokens,
            "train/flops": self.counters.flops,
        }

    def _tell(self, row: Metrics, logged_at: float) -> float:
        callbacks, step = self.callbacks, row["step"]
        if callbacks.on_metrics:
            callbacks.on_metrics(row)
        every = self.settings.sample_every_steps
        if every and step % every == 0 and callbacks.on_sample and self.sample_prompts:
            callbacks.on_sample(step, self._sample())
        now = time.monotonic()
        due = now - logged_at >= self.settings.log_every_s or step == self.settings.steps
        if not (due and callbacks.on_progress):
            return logged_at
        callbacks.on_progress(row)
        return now

    @torch.no_grad()
    def _sample(self) -> list[Tensor]:
        request = SamplingRequest(
            max_new_tokens=self.settings.sample_tokens, num_steps=self.settings.sample_steps, seed=self.settings.seed
        )
        self.method.eval()
        out = self.method.sample(self.sample_prompts, request)
        self.method.train()
        return out.sequences

    # -- keeping ----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int) -> Path:
        """Write the state after `step` finished steps."""
        state = {"identity": self.settings.identity(), "counters": self.counters.as_dict()}
        return write_checkpoint(self.workdir / "checkpoints", step, self._state_tensors(), state)

    def _state_tensors(self) -> dict[str, Tensor]:
        tensors = self.optimiser.state_tensors() | self.optimiser.frozen_tensors(sorted(self._prepared))
        for name, value in self.method.state_dict().items():
            if name not in self._aliases and isinstance(value, Tensor):
                tensors[f"state/{name}"] = value
        return tensors

    def _prepare(self) -> None:
        """Let the method take its statistics; note which frozen parameters that filled."""
        if type(self.method).prepare is Method.prepare:
            return
        started = time.perf_counter()
        trained = [n for n, p in self.method.named_parameters() if p.requires_grad]
        before = self._frozen_digests()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_step_seed(self.settings.seed, -1))
            self.method.prepare(self.sequences, self._presented(self.settings.steps), self.resources)
        assert trained == [n for n, p in self.method.named_parameters() if p.requires_grad], "prepare froze something"
        after = self._frozen_digests()
        self._prepared = frozenset(name for name, digest in after.items() if digest != before[name])
        synchronise(self.device)
        self.counters.wall_s += time.perf_counter() - started

    def _frozen_digests(self) -> dict[str, int]:
        return {n: checksum(p.detach()) for n, p in self.method.named_parameters() if not p.requires_grad}

    def _build_optimiser(self) -> None:
        names = {p: n for n, p in self.method.named_parameters()}
        self.trainable = sum(p.numel() for p in names if p.requires_grad)
        self._optimiser = MasterAdamW(self.method.parameter_groups(), names, self.settings)
        self._aliases = {n for n, _ in self.method.named_parameters(remove_duplicate=False)}

    @torch.no_grad()
    def _take_frozen(self, tensors: Mapping[str, Tensor], *, strict: bool) -> None:
        """Restore frozen parameters that the run's preparation filled, before the optimiser rounds them."""
        own = {n: p for n, p in self.method.named_parameters() if not p.requires_grad}
        kept = {n.removeprefix("frozen/"): t for n, t in tensors.items() if n.startswith("frozen/")}
        assert not strict or kept.keys() <= own.keys(), f"the method no longer has {kept.keys() - own.keys()}"
        for name in kept.keys() & own.keys():
            own[name].copy_(kept[name])
        self._prepared = frozenset(kept.keys() & own.keys())

    def _load(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], *, strict: bool) -> int:
        for name, master in self.optimiser.masters.items():
            found = tensors.get(f"param/{name}")
            if found is None or found.shape != master.shape:
                raise ContractError(
                    f"{checkpoint.path.name} holds {name} as {None if found is None else tuple(found.shape)}, "
                    f"this run trains it as {tuple(master.shape)}.",
                    "Branch from a run over the same backbone with the same frozen parts.",
                )
        if checkpoint.step > self.settings.steps:
            raise DllmError(
                f"The checkpoint has {checkpoint.step} steps, the run only {self.settings.steps}.",
                "Give the branch at least the budget of its prefix.",
            )
        self.optimiser.load_state_tensors(tensors)
        kept = {n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")}
        missing = [n for n in self.method.load_state_dict(kept, strict=False).unexpected_keys if strict]
        assert not missing, f"the method no longer has {missing}"
        self.counters = Counters.from_dict(checkpoint.state["counters"])
        return checkpoint.step

    def _result(self, step: int) -> TrainResult:
        counters = self.counters
        return TrainResult(
            steps=step,
            finished=step >= self.settings.steps,
            response_tokens=counters.response_tokens,
            positions=counters.positions,
            flops=counters.flops,
            teacher_flops=counters.teacher_flops,
            wall_s=counters.wall_s,
            tokens_per_s=counters.response_tokens / counters.wall_s if counters.wall_s else 0.0,
            peak_memory_gb=counters.peak_memory_gb,
            trainable_params=self.trainable,
            new_params=self.method.num_new_parameters(),
            distinct_samples=len(self._presented(step)),
            final_losses=counters.final_losses(),
        )

    def _presented(self, steps: int) -> list[int]:
        """Return the distinct samples of the first steps, in order of first presentation."""
        settings = self.settings
        seen: dict[int, None] = {}
        for step in range(steps):
            info = step_info(step, self.phases, self.starts, steps=settings.steps, batch_size=settings.batch_size)
            seen |= dict.fromkeys(sample for sample, _ in self.method.select_samples(self.order, info))
        return list(seen)


def _step_seed(seed: int, step: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/step".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
