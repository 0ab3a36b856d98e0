"""What the trainer is told. Mirrors `TrainSpec` of params/, which the library must not import. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from dllm_core.errors import DllmError, did_you_mean

# what changes only how often something is written or how work is cut up, never the weights
_WITHOUT_EFFECT = ("checkpoint_every_s", "log_every_s", "sample_every_steps", "sample_tokens", "sample_steps")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one training run.

    Attributes:
        steps: optimiser steps; see `dllm_core.training.budget` for how a budget becomes steps.
        batch_size: sequences per optimiser step.
        micro_batch_size: sequences per forward; None is the whole batch. Changes the gradient by rounding only.
        lr: peak learning rate.
        min_lr_ratio: learning rate of the last step relative to the peak.
        warmup_ratio: part of the steps during which the rate rises linearly.
        weight_decay: decoupled decay of matrices; norms, biases and other vectors never decay.
        betas: moment decay of AdamW.
        eps: denominator guard of AdamW.
        clip_norm: largest global gradient norm; None does not clip.
        dtype: compute type. "bf16" keeps fp32 master weights.
        activation_checkpointing: recompute activations in the backward pass.
        freeze: rules of `Backbone.freeze` ("embeddings", "mlp").
        checkpoint_every_s: seconds between checkpoints; None writes none on a clock.
        log_every_s: seconds between lines of progress; the metrics writer gets every step.
        sample_every_steps: generate a sample of text every so many steps; None never.
        sample_tokens: new tokens of that sample.
        sample_steps: denoising steps of that sample.
        seed: keys data order, corruption and samples.
        phase_starts: first step of each phase where a branch fixes it; None follows the shares of the method.
    """

    steps: int
    batch_size: int = 8
    micro_batch_size: int | None = None
    lr: float = 1e-4
    min_lr_ratio: float = 0.1
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    dtype: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    freeze: tuple[str, ...] = ()
    checkpoint_every_s: float | None = 60.0
    log_every_s: float = 10.0
    sample_every_steps: int | None = None
    sample_tokens: int = 32
    sample_steps: int = 8
    seed: int = 0
    phase_starts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        positive = {"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr}
        positive |= {n: v for n in ("micro_batch_size", "sample_every_steps") if (v := getattr(self, n)) is not None}
        for name, value in positive.items():
            if not value > 0:
                raise DllmError(f"train.{name} is {value}.", "It has to be greater than 0.")
        if self.dtype not in ("fp32", "bf16"):
            raise DllmError(f"train.dtype is '{self.dtype}'.", "The trainer takes fp32 or bf16; resolve 'auto' first.")

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], **resolved: Any) -> TrainSettings:
        """Build settings from the fields of a `TrainSpec` and what was resolved since (steps, dtype, seed).

        Raises:
            DllmError: a key that is no setting.
        """
        values = {**spec, **resolved}
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise DllmError(f"Unknown training setting '{name}'.", did_you_mean(name, known))
        typed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**typed)

    def influential(self) -> dict[str, Any]:
        """Return the settings that influence the weights, JSON-able."""
        return {k: v for k, v in asdict(self).items() if k not in _WITHOUT_EFFECT}

    def identity(self) -> str:
        """Return a hash of `influential`; a checkpoint resumes under the same hash only."""
        return hashlib.sha256(json.dumps(self.influential(), sort_keys=True).encode()).hexdigest()[:16]
