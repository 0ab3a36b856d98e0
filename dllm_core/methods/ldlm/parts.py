"""The element-wise parts of a generation, as one function each, so that a compiler makes one kernel of each.

B batch, L positions, M keys, W width, N heads, H head width, G groups of heads in a joint projection.
`eager()` are written for few passes over memory without a compiler, `compiled()` for a compiler; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_core.layers.attention import NORM_EPS
from dllm_core.samplers.continuous import StepCoefficients


@dataclass(frozen=True)
class Parts:
    """Implementations.

    Attributes:
        normed: (x, weight, bias) -> layer norm.
        added_normed: (x, branch, weight, bias) -> (x + branch, its layer norm).
        modulated: (x, shift, 1 + scale) -> LayerNorm(x) (1 + scale) + shift.
        gated_modulated: (x, gate, branch, shift, 1 + scale) -> (x + gate branch, that modulated).
        place: see `place_eager`.
        step: see `step_eager`.
        in_tensors: `step` takes its numbers as a tensor [4], so that one compilation serves all steps.
    """

    normed: Callable[..., Tensor]
    added_normed: Callable[..., tuple[Tensor, Tensor]]
    modulated: Callable[..., Tensor]
    gated_modulated: Callable[..., tuple[Tensor, Tensor]]
    place: Callable[..., Tensor]
    step: Callable[..., None]
    in_tensors: bool


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return a layer norm with weights."""
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def added_normed(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return a residual sum and its layer norm."""
    x = x + branch
    return x, normed(x, weight, bias)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return an adaptive layer norm; `scale` holds its 1."""
    # weight and bias of a layer norm are just what the time provides
    return F.layer_norm(x, x.shape[-1:], scale, shift)


def gated_modulated(x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return a gated residual sum and its adaptive layer norm."""
    x = torch.addcmul(x, gate, branch)
    return x, modulated(x, shift, scale)


def _inverse_rms(x: Tensor) -> Tensor:
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    return square.div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()


def place_eager(
    joint: Tensor, num_heads: int, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: int
) -> Tensor:
    """Normalise and rotate the heads of a joint projection; write keys and values to `at`, return the queries.

    Args:
        joint: [B, L, (G + 1) W]: queries (G = 2), keys, values.
        num_heads: N.
        cos: [L, G, 1, H]; see `packed.Table`.
        sin: likewise.
        keys: buffer [B, N, M, H].
        values: likewise.
        at: first place to write to.

    Returns:
        [B, N, L, H]; for G = 1 the keys.
    """
    groups, length = cos.shape[1], joint.shape[1]
    heads = joint.unflatten(-1, (groups + 1, num_heads, -1))
    turning, value = heads[:, :, :groups], heads[:, :, groups]
    half = cos.shape[-1] // 2
    turned = turning * cos
    turned[..., :half].addcmul_(turning[..., half:], sin[..., :half])
    turned[..., half:].addcmul_(turning[..., :half], sin[..., half:])
    turned.mul_(_inverse_rms(turning))
    keys[:, :, at : at + length].copy_(turned[:, :, -1].transpose(1, 2))
    values[:, :, at : at + length].copy_(value.transpose(1, 2))
    return turned[:, :, 0].transpose(1, 2)


def place_fused(
    joint: Tensor, num_heads: int, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: int
) -> Tensor:
    """Do what `place_eager` does, in fp32 and with nothing between input and output."""
    groups, length = cos.shape[1], joint.shape[1]
    heads = joint.unflatten(-1, (groups + 1, num_heads, -1))
    turning = heads[:, :, :groups].float()
    turning = turning * torch.rsqrt(turning.square().mean(-1, keepdim=True) + NORM_EPS)
    first, second = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat((second, first), dim=-1) * sin).to(joint.dtype)
    keys[:, :, at : at + length] = turned[:, :, -1].transpose(1, 2)
    values[:, :, at : at + length] = heads[:, :, groups].transpose(1, 2)
    return turned[:, :, 0].transpose(1, 2)


def step_eager(state: Tensor, x0_hat: Tensor, noise: Tensor | None, numbers: StepCoefficients) -> None:
    """Take a solver's step in place; see `samplers.continuous.step`.

    Args:
        state: [B, L, 2 K]: the latent and the prediction before, side by side as the denoiser reads them.
        x0_hat: prediction [B, L, K].
        noise: fresh N(0, 1) or None.
        numbers: of this step.
    """
    x, before = state.chunk(2, dim=-1)
    x.mul_(numbers.c_x).add_(x0_hat, alpha=numbers.c_x0)
    if numbers.c_before:
        x.add_(before, alpha=numbers.c_before)
    if noise is not None:
        x.add_(noise, alpha=numbers.c_noise)
    before.copy_(x0_hat)


def step_fused(state: Tensor, x0_hat: Tensor, noise: Tensor | None, numbers: Tensor) -> None:
    """Do what `step_eager` does, the numbers as fp32 [4]."""
    x, before = state.float().chunk(2, dim=-1)
    c_x, c_x0, c_noise, c_before = numbers.unbind()
    found = c_x * x + c_x0 * x0_hat.float() + c_before * before
    if noise is not None:
        found = found + c_noise * noise.float()
    state.copy_(torch.cat((found.to(state.dtype), x0_hat), dim=-1))


def eager() -> Parts:
    """Return the parts as written for torch without a compiler."""
    return Parts(normed, added_normed, modulated, gated_modulated, place_eager, step_eager, in_tensors=False)


def compiled() -> Parts:
    """Return the parts through torch.compile, each compiled at its first call with a shape."""

    def through(function: Callable[..., Any]) -> Callable[..., Any]:
        made: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True)
        return made

    return Parts(
        through(normed),
        through(added_normed),
        through(modulated),
        through(gated_modulated),
        through(place_fused),
        through(step_fused),
        in_tensors=True,
    )
