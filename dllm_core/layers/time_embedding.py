"""Diffusion time as a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256
SCALE = 1000.0


def sinusoids(t: Tensor, num: int = FREQUENCIES) -> Tensor:
    """Return cosines and sines of 1000 t at `num / 2` frequencies from 1 down to 1e-4, fp32, [..., num]."""
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
