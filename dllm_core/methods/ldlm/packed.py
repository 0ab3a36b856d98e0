"""The generating networks' weights as a generation reads them, and blocks over them.

B batch, L positions, M keys, W width, N heads, H head width, G 1 (keys) or 2 (queries, keys), D width of the states.

What differs from the modules in `dllm_core.layers`, whose maths this is: queries, keys and values come from one matrix;
the per-head norms' weights and 1 / sqrt(H) are folded into the rotary tables; keys and values are written where
attention reads them, behind those of a prefix; 1 + scale and everything else that no input changes is made beforehand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.layers.attention import LONGEST_PLAIN, Attention, rotation
from dllm_core.layers.feedforward import FeedForward
from dllm_core.layers.packed_linear import Layout, linear
from dllm_core.methods.ldlm import parts


class AttentionWeights(NamedTuple):
    """Of one attention.

    Attributes:
        query_key_value: [3 W, W].
        key_value: [2 W, W], for states that are looked at and do not ask; None where there are none.
        out: [W, W].
        norms: weights of the queries' and of the keys' norm, fp32 [2, H].
        num_heads: N.
    """

    query_key_value: Tensor
    key_value: Tensor | None
    out: Tensor
    norms: Tensor
    num_heads: int

    @classmethod
    def of(cls, module: Attention, lay: Layout, *, looks_elsewhere: bool = False) -> AttentionWeights:
        """Take a module's weights."""
        joint = torch.cat((module.to_query.weight, module.to_key_value.weight)).detach()
        return cls(
            lay(joint),
            lay(module.to_key_value.weight) if looks_elsewhere else None,
            lay(module.to_out.weight),
            torch.stack((module.query_norm.weight, module.key_norm.weight)).detach().float(),
            module.num_heads,
        )


class FeedForwardWeights(NamedTuple):
    """Of one feed-forward network: [4 W, W] and [W, 4 W]."""

    inner: Tensor
    out: Tensor

    @classmethod
    def of(cls, module: FeedForward, lay: Layout) -> FeedForwardWeights:
        """Take a module's weights."""
        return cls(lay(module.inner.weight), lay(module.out.weight))

    def __call__(self, x_BLW: Tensor) -> Tensor:
        """Return [B, L, W]."""
        return linear(linear(x_BLW, self.inner, gelu=True), self.out)


class Norm(NamedTuple):
    """A layer norm's weight and bias, [W] each."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, module: nn.LayerNorm) -> Norm:
        """Take a module's weights."""
        return cls(module.weight.detach(), module.bias.detach())


class Table(NamedTuple):
    """What normalised queries and keys are multiplied with to be scaled and rotated, [L, 2, 1, H] each.

    rotated = x * cos + swapped(x) * sin, where `swapped` exchanges the halves of a head; signs, the norms' weights and,
    for queries, 1 / sqrt(H) are in the numbers.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, position_L: Tensor, norms: Tensor, dtype: torch.dtype) -> Table:
        """Return the table of integer positions.

        Args:
            position_L: [L].
            norms: fp32 [2, H].
            dtype: of the table.
        """
        head_width = norms.shape[-1]
        cos, sin = (part[0, 0][:, None, None] for part in rotation(position_L, head_width))
        scaled = norms * torch.tensor([[head_width**-0.5], [1.0]], device=norms.device)
        first, second = scaled[None, :, None].chunk(2, dim=-1)
        # (a, b) -> (a cos - b sin, b cos + a sin), a and b scaled by their own weights
        own = torch.cat((first * cos, second * cos), dim=-1)
        other = torch.cat((-second * sin, first * sin), dim=-1)
        return cls(own.to(dtype), other.to(dtype))

    def of_keys(self) -> Table:
        """Return the part for keys alone, [L, 1, 1, H]."""
        return Table(self.cos[:, 1:], self.sin[:, 1:])


class Looked(NamedTuple):
    """Buffers for what attention looks at, keys and values [B, N, M, H]; the first ones may come from a prefix."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, like: Tensor, batch: int, num_heads: int, num_keys: int, head_width: int) -> Looked:
        """Return buffers of the dtype and device of `like`."""
        shape = (batch, num_heads, num_keys, head_width)
        return cls(like.new_empty(shape), like.new_empty(shape))

    def beyond(self, first: int) -> Looked:
        """Return views without the first ones."""
        return Looked(self.keys[:, :, first:], self.values[:, :, first:])


def scaled_attention(query_BNLH: Tensor, looked: Looked) -> Tensor:
    """Return softmax(q k) v, [B, N, L, H]; queries hold the scale. The kernel is chosen as in `layers.attention`."""
    keys, values = looked
    is_plain = query_BNLH.device.type == "cpu" and query_BNLH.dtype == torch.bfloat16
    if is_plain and query_BNLH.shape[2] <= LONGEST_PLAIN and keys.shape[2] <= LONGEST_PLAIN:
        return torch.matmul(torch.softmax(torch.matmul(query_BNLH, keys.transpose(2, 3)), -1), values)
    return F.scaled_dot_product_attention(query_BNLH, keys, values, scale=1.0)


def attention(run: parts.Parts, x_BLW: Tensor, weights: AttentionWeights, table: Table, looked: Looked) -> Tensor:
    """Return [B, L, W]; the own keys and values take the last L places of `looked`.

    Args:
        run: implementations of the element-wise parts.
        x_BLW: normalised states.
        weights: of this attention.
        table: of the L positions.
        looked: buffers, filled but for the last L places.
    """
    joint = linear(x_BLW, weights.query_key_value)
    query = run.place(joint, weights.num_heads, *table, *looked, looked.keys.shape[2] - x_BLW.shape[1])
    found = scaled_attention(query, looked)
    return linear(found.transpose(1, 2).flatten(2), weights.out)


def look_at(run: parts.Parts, x_BPW: Tensor, weights: AttentionWeights, table: Table, looked: Looked) -> None:
    """Write keys and values of normalised states that do not ask into the first places of `looked`."""
    assert weights.key_value is not None
    run.place(linear(x_BPW, weights.key_value), weights.num_heads, *table.of_keys(), *looked, 0)


class TransformerWeights(NamedTuple):
    """Of one pre-norm block (`layers.transformer`), or of one Perceiver layer, which also has `input_norm`."""

    attention_norm: Norm
    attention: AttentionWeights
    feedforward_norm: Norm
    feedforward: FeedForwardWeights
    input_norm: Norm | None = None

    def __call__(
        self, run: parts.Parts, x_BLW: Tensor, table: Table, looked: Looked, input_BLW: Tensor | None = None
    ) -> Tensor:
        """Return the new states [B, L, W]; a Perceiver also looks at `input_BLW`, at the same positions."""
        if input_BLW is not None:
            assert self.input_norm is not None
            look_at(run, run.normed(input_BLW, *self.input_norm), self.attention, table, looked)
        branch = attention(run, run.normed(x_BLW, *self.attention_norm), self.attention, table, looked)
        x_BLW, normed_BLW = run.added_normed(x_BLW, branch, *self.feedforward_norm)
        return x_BLW + self.feedforward(normed_BLW)


class DiTWeights(NamedTuple):
    """Of one DiT block; its modulation is made beforehand."""

    attention: AttentionWeights
    feedforward: FeedForwardWeights


class Modulation(NamedTuple):
    """Of one block at one time, [W] each; scales with their 1 added."""

    shift_a: Tensor
    scale_a: Tensor
    gate_a: Tensor
    shift_f: Tensor
    scale_f: Tensor
    gate_f: Tensor

    @classmethod
    def of(cls, packed: Tensor) -> list[Modulation]:
        """Split modulations of several times, [S, 6 W]."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (p.contiguous() for p in packed.chunk(6, dim=-1))
        made = zip(shift_a, 1 + scale_a, gate_a, shift_f, 1 + scale_f, gate_f, strict=True)
        return [cls(*rows) for rows in made]


def dit_block(
    run: parts.Parts, x_BLW: Tensor, weights: DiTWeights, modulation: Modulation, table: Table, looked: Looked
) -> Tensor:
    """Return [B, L, W]; see `layers.dit.DiTBlock`."""
    m = modulation
    branch = attention(run, run.modulated(x_BLW, m.shift_a, m.scale_a), weights.attention, table, looked)
    x_BLW, normed_BLW = run.gated_modulated(x_BLW, m.gate_a, branch, m.shift_f, m.scale_f)
    return torch.addcmul(x_BLW, m.gate_f, weights.feedforward(normed_BLW))
