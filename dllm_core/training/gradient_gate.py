"""How much of a loss's gradient may enter a module, as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def encoder_gate(step: int, warmup_steps: int, floor: float = 1e-3, k: float = 10.0, c: float = 0.8) -> float:
    """Return gamma(step), which scales the gradient that the diffusion loss sends into the latent encoder.

    floor + (1 - floor) (S(x) - S(0)) / (S(1) - S(0)) with S(x) = sigmoid(k (x - c)) and x = step / warmup_steps;
    1 from `warmup_steps` on (arXiv:2605.07933, Eq. 29-30). Half open at x = .776 with the default k and c: until then
    the encoder learns mainly to reconstruct.

    Args:
        step: 0-based optimiser step.
        warmup_steps: length of the warm-up; 0 opens the gate at once.
        floor: value at step 0, in [0, 1].
        k: steepness.
        c: centre of the sigmoid, as a part of the warm-up.
    """
    if step >= warmup_steps:
        return 1.0
    closed, opened = _sigmoid(-k * c), _sigmoid(k * (1 - c))
    return floor + (1 - floor) * (_sigmoid(k * (step / warmup_steps - c)) - closed) / (opened - closed)


def scale_gradient(x: Tensor, gamma: float) -> Tensor:
    """Return sg(x) + gamma (x - sg(x)): x itself, bit for bit, with gamma times its gradient."""
    return _ScaledGradient.apply(x, gamma)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: float) -> Tensor:
        ctx.gamma = gamma
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.gamma, None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
