"""One pass of a gated decoder over joined weights: nine launches a block where its element-wise parts are compiled.

The maths of `quick` for a GPU, on which a pass over a few hundred tokens is as long as its launches are many:
products are joined, residual sums are made by the products, attention is one kernel. `captured` replays it as a graph.

B batch, L tokens run, R = B L rows, M rows asked for (of a mask: visible keys), N query heads, K key heads, G = N / K,
H head width, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_core.backbone.passes.joined_weights import Joined, JoinedBlock
from dllm_core.backbone.passes.protocol import Asked, DecoderPass, real_head
from dllm_core.backbone.passes.rotation import Rotation, Rotations
from dllm_core.layers.attention import is_plain
from dllm_core.layers.compiling import many_shapes
from dllm_core.layers.gated_parts import Parts
from dllm_core.layers.packed_linear import gated as packed_gated

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

Keep = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(new keys, new values, layer) -> all that are visible; [B, K, L, H] and [B, K, M, H]."""
BIAS_ALIGNMENT = 8
"""Attention kernels read a mask's rows in pieces of so many numbers, and copy those that begin elsewhere."""


def decoded(
    weights: Joined,
    parts: Parts,
    input_ids_BL: Tensor,
    rotation: Rotation,
    *,
    row_M: Tensor | None = None,
    mask_B1LM: Tensor | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """Return the states after the final norm, [R, D] or [M, D].

    Args:
        weights: of the decoder.
        parts: implementations of the element-wise parts.
        input_ids_BL: int64.
        rotation: of the tokens' positions.
        row_M: int64; flat indices of the rows asked for, None for all.
        mask_B1LM: bool [B or 1, 1, L, M], True where query sees key.
        keep: writes keys and values down and returns what is visible; None for those of this pass alone.
    """
    x_BLD: Tensor = weights.embedding(input_ids_BL)
    bias = None if mask_B1LM is None else attention_bias(mask_B1LM, weights.groups, x_BLD.dtype)
    x_RD = x_BLD.flatten(0, 1)
    last = len(weights.blocks) - 1
    for layer, block in enumerate(weights.blocks):
        normed_BLD = parts.normed(x_RD, *block.input_norm).view(x_BLD.shape)
        query_BNLH, key_BKMH, value_BKMH = _heads(weights, block, parts, normed_BLD, rotation)
        if keep is not None:
            key_BKMH, value_BKMH = keep(key_BKMH, value_BKMH, layer)
        found_RW = attend(query_BNLH, key_BKMH, value_BKMH, bias, weights.scale).flatten(0, 1)
        if layer == last and row_M is not None:
            found_RW, x_RD = found_RW.index_select(0, row_M), x_RD.index_select(0, row_M)
        x_RD = block.out.onto(x_RD, found_RW)
        x_RD = block.down.onto(x_RD, _inner(block, parts, parts.normed(x_RD, *block.inner_norm)))
    return parts.normed(x_RD, *weights.final_norm)


def _heads(
    weights: Joined, block: JoinedBlock, parts: Parts, normed_BLD: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [B, N, L, H], keys and values [B, K, L, H]."""
    made = [product(normed_BLD).unflatten(-1, (-1, weights.width)) for product in block.heads]
    norms = block.head_norms or (None,) * len(made)
    if len(made) == 1:
        split = weights.num_heads + weights.num_key_heads
        turned_BNLH = parts.turned(made[0][:, :, :split], *rotation, norms[0], block.head_eps)
        queries, keys = turned_BNLH.split((weights.num_heads, weights.num_key_heads), dim=1)
        return queries, keys, made[0][:, :, split:].transpose(1, 2)
    queries, keys = (
        parts.turned(x_BLNH, *rotation, norm, block.head_eps) for x_BLNH, norm in zip(made[:2], norms[:2], strict=True)
    )
    return queries, keys, made[2].transpose(1, 2)


def _inner(block: JoinedBlock, parts: Parts, normed_RD: Tensor) -> Tensor:
    """Return what goes into the last product of a block, [R, I]."""
    if len(block.inner) == 1:
        return parts.gated(*block.inner[0](normed_RD).chunk(2, dim=-1))
    gate, up = block.inner
    if gate.weight.is_mkldnn:
        return packed_gated(normed_RD, gate.weight, up.weight, gate.bias, up.bias)
    return parts.gated(gate(normed_RD), up(normed_RD))


def attention_bias(mask_B1LM: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores [B, K, G L, M], once for all layers; rows begin where kernels want them."""
    keys = mask_B1LM.shape[-1]
    # not `where`: this one takes its number along with the launch
    bias_B1LM = torch.zeros_like(mask_B1LM, dtype=dtype).masked_fill_(~mask_B1LM, torch.finfo(dtype).min)
    bias_B1RM = bias_B1LM.repeat(1, 1, groups, 1)
    return F.pad(bias_B1RM, (0, -keys % BIAS_ALIGNMENT))[..., :keys]


def attend(query_BNLH: Tensor, key_BKMH: Tensor, value_BKMH: Tensor, bias_B1RM: Tensor | None, scale: float) -> Tensor:
    """Return softmax(scale q k + bias) v, [B, L, N H].

    Query heads that share a key head are more queries of that head, so that keys are not repeated and every kernel
    will do; but for flash attention on a GPU, which knows of shared heads and returns them side by side.

    Args:
        query_BNLH: queries, without gaps inside a batch row.
        key_BKMH: keys.
        value_BKMH: values.
        bias_B1RM: from `attention_bias`; None for none.
        scale: of the scores.
    """
    batch, heads, length, width = query_BNLH.shape
    shared = key_BKMH.shape[1]
    if query_BNLH.is_cuda and bias_B1RM is None and query_BNLH.dtype != torch.float32:
        found_BNLH = F.scaled_dot_product_attention(
            query_BNLH, key_BKMH, value_BKMH, scale=scale, enable_gqa=shared != heads
        )
        return found_BNLH.transpose(1, 2).flatten(2)
    query_BKRH = query_BNLH.reshape(batch, shared, -1, width)
    if is_plain(query_BNLH, key_BKMH):
        scores_BKRM = torch.matmul(query_BKRH * scale, key_BKMH.transpose(2, 3))
        scores_BKRM = scores_BKRM if bias_B1RM is None else scores_BKRM.add_(bias_B1RM)
        found_BKRH = torch.matmul(torch.softmax(scores_BKRM, -1), value_BKMH)
    else:
        found_BKRH = F.scaled_dot_product_attention(query_BKRH, key_BKMH, value_BKMH, attn_mask=bias_B1RM, scale=scale)
    return found_BKRH.reshape(batch, heads, length, width).transpose(1, 2).flatten(2)


class JoinedPass(DecoderPass):
    """The pass as it comes, every operation launched by itself.

    Args:
        backbone: a model that neither `choice.obstacle` nor `joined_weights.obstacle` has anything against.
        weights: its own.
        parts: implementations of the element-wise parts.
    """

    def __init__(self, backbone: Backbone, weights: Joined, parts: Parts) -> None:
        super().__init__(backbone, real_head(backbone))
        self.weights, self.parts, self._rotations = weights, parts, Rotations(backbone)

    def states(self, asked: Asked) -> Tensor:
        """Return states; see `DecoderPass`."""
        input_ids_BL, row_M, position_BL, mask_B1LM, cache = asked
        batch, length = input_ids_BL.shape
        with many_shapes() if self.parts.compiled else nullcontext():
            states_RD = decoded(
                self.weights,
                self.parts,
                input_ids_BL,
                self._rotations.of_pass(length, position_BL, cache),
                row_M=row_M,
                mask_B1LM=mask_B1LM,
                keep=None if cache is None else cache.update,
            )
        return states_RD.view(batch, length, -1) if row_M is None else states_RD
