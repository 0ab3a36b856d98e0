"""The blocks of `dllm_core.layers` for one sequence in float64: loops over heads and queries, complex rotations."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dllm_core.layers.attention import Attention
from dllm_core.layers.dit import DiT
from dllm_core.layers.feedforward import FeedForward
from dllm_core.layers.perceiver import Perceiver
from dllm_core.layers.time_embedding import sinusoids
from dllm_core.layers.transformer import Transformer


def randomise(module: nn.Module) -> nn.Module:
    """Move every parameter, those that start at zero or one too, and return the module in float64."""
    for parameter in module.double().parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def turned(x_H: Tensor, position: int) -> Tensor:
    half = len(x_H) // 2
    z = [complex(x_H[i], x_H[i + half]) * cmath.exp(1j * position * 10_000 ** (-i / half)) for i in range(half)]
    return torch.tensor([c.real for c in z] + [c.imag for c in z], dtype=torch.double)


def rms(x_H: Tensor, norm: nn.RMSNorm) -> Tensor:
    return x_H / math.sqrt(sum(float(x) ** 2 for x in x_H) / len(x_H) + 1e-6) * norm.weight


def standardised(x_LW: Tensor) -> Tensor:
    centred = x_LW - x_LW.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def layer_norm(x_LW: Tensor, norm: nn.LayerNorm) -> Tensor:
    return standardised(x_LW) * norm.weight + norm.bias


def attention(
    module: Attention, asking_LW: Tensor, seen_MW: Tensor, at_L: Sequence[int], at_M: Sequence[int], sees_LM: Tensor
) -> Tensor:
    width = asking_LW.shape[1]
    to_key, to_value = module.to_key_value.weight[:width], module.to_key_value.weight[width:]
    out = torch.zeros_like(asking_LW)
    for n in range(module.num_heads):
        head = slice(n * module.head_width, (n + 1) * module.head_width)
        keys = [turned(rms(to_key[head] @ x, module.key_norm), at) for x, at in zip(seen_MW, at_M, strict=True)]
        for i, x in enumerate(asking_LW):
            query = turned(rms(module.to_query.weight[head] @ x, module.query_norm), at_L[i])
            weights = [
                math.exp(float(query @ key) / math.sqrt(module.head_width)) if sees_LM[i, j] else 0.0
                for j, key in enumerate(keys)
            ]
            for weight, seen in zip(weights, seen_MW, strict=True):
                out[i, head] += weight / sum(weights) * (to_value[head] @ seen)
    return out @ module.to_out.weight.T


def feedforward(module: FeedForward, x_LW: Tensor) -> Tensor:
    inner = x_LW @ module.inner.weight.T
    gelu = 0.5 * inner * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (inner + 0.044715 * inner**3)))
    return gelu @ module.out.weight.T


def transformer(module: Transformer, x_LW: Tensor, at_L: Sequence[int], sees_LL: Tensor) -> Tensor:
    for block in module.blocks:
        normed = layer_norm(x_LW, block.attention_norm)
        x_LW = x_LW + attention(block.attention, normed, normed, at_L, at_L, sees_LL)
        x_LW = x_LW + feedforward(block.feedforward, layer_norm(x_LW, block.feedforward_norm))
    return layer_norm(x_LW, module.norm)


def perceiver(
    module: Perceiver, x_LW: Tensor, latents_KW: Tensor, at_L: Sequence[int], at_K: Sequence[int], visible_M: Tensor
) -> Tensor:
    sees = visible_M.expand(len(latents_KW), -1)
    for layer in module.layers:
        asking = layer_norm(latents_KW, layer.latent_norm)
        seen = torch.cat((layer_norm(x_LW, layer.input_norm), asking))
        latents_KW = latents_KW + attention(layer.attention, asking, seen, at_K, [*at_L, *at_K], sees)
        latents_KW = latents_KW + feedforward(layer.feedforward, layer_norm(latents_KW, layer.feedforward_norm))
    return layer_norm(latents_KW, module.norm)


def _silu(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def dit(
    module: DiT,
    x_LW: Tensor,
    t: float,
    at_L: Sequence[int],
    context_PW: Tensor,
    at_P: Sequence[int],
    visible_M: Tensor,
) -> Tensor:
    """Return the output of one row; conditioning enters each block unchanged, normed and modulated as at t = 0."""

    def embedded(time: float) -> Tensor:
        wave = sinusoids(torch.tensor(time)).double()  # has a test of its own
        hidden = _silu(module.time.inner.weight @ wave + module.time.inner.bias)
        return _silu(module.time.out.weight @ hidden + module.time.out.bias)

    def parts(linear: nn.Linear, time: float) -> tuple[Tensor, ...]:
        return (linear.weight @ embedded(time) + linear.bias).split(x_LW.shape[1])

    sees = visible_M.expand(len(x_LW), -1)
    for block in module.blocks:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = parts(block.modulation, t)
        clean_shift, clean_scale, *_ = parts(block.modulation, 0.0)
        normed = standardised(x_LW) * (1 + scale_a) + shift_a
        seen = torch.cat((standardised(context_PW) * (1 + clean_scale) + clean_shift, normed))
        x_LW = x_LW + gate_a * attention(block.attention, normed, seen, at_L, [*at_P, *at_L], sees)
        x_LW = x_LW + gate_f * feedforward(block.feedforward, standardised(x_LW) * (1 + scale_f) + shift_f)
    shift, scale = parts(module.final_modulation, t)
    return standardised(x_LW) * (1 + scale) + shift
