"""Tiny cola cells for tests, on the sequences and anchors of `tests.ldlm_tools`."""

from __future__ import annotations

from typing import Any

import torch

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.cola.draws import PRIOR, VAE
from dllm_core.methods.cola.method import Method
from dllm_core.methods.cola.options import Options
from dllm_core.methods.cola.shapes import Shape
from dllm_core.methods.protocol import Corrupted, StepInfo
from tests.method_tools import step_info
from tests.tiny import tiny_backbone

LAYERS, HIDDEN = 4, 32
SHAPE = Shape(
    latent_dim=6,
    encoder_width=16,
    encoder_depth=1,
    decoder_width=24,
    decoder_depth=2,
    prior_width=32,
    prior_depth=3,
    head_width=8,
)
"""Every width differs, so that mixing two of them up cannot pass."""


def tiny_cola(*, move: float = 0.1, seed: int = 0, shape: Shape = SHAPE, in_memory: bool = True, **options: Any):
    """Return a cola cell on a 4-layer llama with blocks of 4; `move` is the noise put on all its weights."""
    backbone = tiny_backbone("llama", layers=LAYERS)
    torch.manual_seed(seed)
    method = Method(backbone, Options(shape=shape, **{"block_size": 4, **options}))
    if not in_memory:
        method.prompt_reader.model = None
    return moved(method, move)


@torch.no_grad()
def moved(method: Method, size: float) -> Method:
    """Put noise on all weights that are trained, and on the statistics; the averages follow."""
    if size:
        for parameter in method.networks.parameters():
            parameter += size * torch.randn_like(parameter)
        method.mean_D.normal_()
        method.std_D.uniform_(0.5, 2.0)
        method.latent_mean_K.normal_()
        method.latent_std_K.uniform_(0.5, 2.0)
        for name, average in method.ema.averages().items():
            average.copy_(method.networks.prior.get_parameter(name))
    return method


def in_phase(phase: str, step: int = 0, steps: int = 10) -> StepInfo:
    """Return a step of the first or the second phase."""
    return step_info(phase, step, steps, start=0 if phase == VAE else 7)


def corrupted_in(method: Method, batch: Batch, phase: str, seed: int = 0) -> tuple[Corrupted, dict[str, float]]:
    corrupted = method.corrupt(batch, in_phase(phase), NoiseSource(seed))
    return corrupted, method.totals(corrupted)


PHASES = (VAE, PRIOR)
