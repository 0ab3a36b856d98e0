"""A toy room for the trainer's tests: a tied two-layer network, per-sequence means, keyed masks; and a runner.

Run as a module it trains in a process of its own (to be killed): `python -m tests.training_toy WORKDIR DTYPE`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.data.order import SampleOrder
from dllm_core.methods.protocol import (
    Corrupted,
    GenerationOutput,
    LossOutput,
    Method,
    Phase,
    Resources,
    SamplingRequest,
    StepInfo,
)
from dllm_core.methods.requirements import Capabilities, RoomOptions
from dllm_core.training.loop import Callbacks, Trainer
from dllm_core.training.settings import TrainSettings
from tests.sequences import random_sequences

VOCAB, LENGTH, PROMPT, NUM = 23, 12, 4, 16
MASK = VOCAB


class ToyOptions(RoomOptions):
    def capabilities(self) -> Capabilities:
        return Capabilities()


class ToyNetwork(nn.Module):
    """Tied embedding and head, a linear layer, a norm (1-D weights), dropout."""

    def __init__(self, dropout: float = 0.0, hidden: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB + 1, hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, VOCAB + 1, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids_BL: Tensor) -> Tensor:
        states_BLD = self.table(ids_BL)
        context_BLD = states_BLD.mean(dim=1, keepdim=True)
        return self.head(self.norm(self.dropout(torch.tanh(self.mix(states_BLD + context_BLD)))))

    def freeze(self, rules: Sequence[str]) -> None:
        assert tuple(rules) == ("mlp",)
        self.mix.requires_grad_(False)


class ToyMethod(Method):
    """Masked CE; counts its steps in a persistent buffer; its second phase scores prompts too."""

    def __init__(self, dropout: float = 0.0, shares: tuple[float, ...] = (1.0,), seed: int = 5) -> None:
        torch.manual_seed(seed)
        super().__init__(ToyNetwork(dropout), ToyOptions())  # type: ignore[arg-type]
        self.shares = shares
        self.register_buffer("ema", torch.zeros(3))
        self.seen: list[StepInfo] = []

    def phases(self) -> tuple[Phase, ...]:
        return tuple(Phase(f"phase {i}", share) for i, share in enumerate(self.shares))

    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        self.seen.append(info)
        ratio_B1 = noise.uniform(batch, "ratio", (1,))
        masked_BL = (noise.uniform(batch, "mask", (batch.length,)) < ratio_B1) & batch.response_BL
        noisy_BL = batch.input_ids_BL.masked_fill(masked_BL, MASK)
        return Corrupted(batch, noisy_BL, masked_BL, {"weight": 1.0 / masked_BL.sum(1).clamp(min=1)})

    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        return {"sequences": float(len(corrupted.clean))}

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        logits_BLV = self.backbone(corrupted.noisy_BL).float()
        nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), corrupted.clean.input_ids_BL, reduction="none")
        weight_BL = corrupted.masked_BL * corrupted.extras["weight"][:, None] / totals["sequences"]
        loss = (nll_BL * weight_BL).sum()
        rows = corrupted.noisy_BL.numel()
        return LossOutput(loss, {"mdm": loss.detach()}, flops=10.0 * rows, teacher_flops=1.0 * rows, positions=rows)

    def on_step_end(self, info: StepInfo) -> None:
        self.ema.mul_(0.5).add_(self.backbone.norm.weight.detach().float()[:3])

    def sample(
        self, prompts: Sequence[Tensor], request: SamplingRequest, on_draft: Callable[..., None] | None = None
    ) -> GenerationOutput:
        torch.rand(7)  # moves the global generator: training must not notice
        sequences = [torch.cat([p, p.new_zeros(request.max_new_tokens)]) for p in prompts]
        return GenerationOutput(sequences, [request.max_new_tokens] * len(prompts), 1, 0.0)

    def save_pretrained(self, directory: Path) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, directory: Path, options: RoomOptions, **_: Any) -> ToyMethod:
        raise NotImplementedError


SETTINGS = TrainSettings(steps=10, batch_size=4, lr=0.02, checkpoint_every_s=None, weight_decay=0.1)


def make_trainer(
    workdir: Path,
    settings: TrainSettings = SETTINGS,
    *,
    method: ToyMethod | None = None,
    callbacks: Callbacks | Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Trainer:
    """Return a trainer of the toy room."""
    return Trainer(
        method or ToyMethod(),
        random_sequences(NUM, LENGTH, PROMPT, VOCAB),
        SampleOrder(NUM, settings.seed),
        settings,
        Resources(),
        NoiseSource(settings.seed),
        workdir,
        callbacks,
        peak_flops=1e9,
        **options,
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Return the trained fp32 weights and buffers."""
    return {name: value.clone() for name, value in trainer.method.state_dict().items()}


def slow_trainer(workdir: Path, dtype: str, tell: Callable[[dict[str, Any]], None]) -> Trainer:
    """Return a trainer that writes a checkpoint after every step."""
    settings = replace(SETTINGS, dtype=dtype, steps=12, checkpoint_every_s=0.0)
    return make_trainer(workdir, settings, method=ToyMethod(dropout=0.2), callbacks=tell)


def _tell(row: dict[str, Any]) -> None:
    sys.stdout.write(f"{row['step']}\n")
    sys.stdout.flush()
    time.sleep(0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    slow_trainer(Path(sys.argv[1]), sys.argv[2], _tell).run()
