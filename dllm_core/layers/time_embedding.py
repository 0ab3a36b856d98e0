"""Diffusion time as a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.layers import sizes

FREQUENCIES = sizes.TIME_FREQUENCIES
SCALE = 1000.0


def sinusoids(t: Tensor, num: int = FREQUENCIES) -> Tensor:
    """Return cos(1000 t w_i), then sin(1000 t w_i), w_i = 10000^(-2i / num) for i < num / 2: fp32, [..., num]."""
    half = num // 2
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = SCALE * t.float()[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids through a two-layer network.

    Args:
        width: W.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(FREQUENCIES, width)
        self.out = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """Return [..., W] for times of any shape in [0, 1]."""
        return self.out(F.silu(self.inner(sinusoids(t).to(self.inner.weight.dtype))))
