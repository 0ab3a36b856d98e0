"""One pass of a gated decoder (llama, qwen2, qwen3) for decoding on a CPU: transformers' maths, other kernels.

What makes it faster, most first: matrices, the head's too, are reordered once for oneDNN instead of in every product;
activation, gate and residual are part of the product before them, and queries, keys and values are one product; query
heads that share keys attend in one product, without copies of those keys; rotary tables are made once; the last block
goes on with the rows that are asked for only. In fp32 it differs from `Backbone.hidden` by the order of additions. In
bf16 it rounds less often.

B batch, L tokens run, R = B L rows, M rows asked for (of a mask: visible keys), D hidden, K key heads, G query heads
that share a key head, H head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_core.backbone import attention
from dllm_core.backbone.passes.protocol import Asked, DecoderPass
from dllm_core.backbone.passes.quick_weights import BlockWeights, laid_out
from dllm_core.backbone.passes.rotation import Rotation, Rotations
from dllm_core.layers.attention import is_plain
from dllm_core.layers.packed_linear import gated

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.backbone.slot_cache import SlotCache


class QuickPass(DecoderPass):
    """The pass of a decoder that `choice.obstacle` has nothing against.

    Weights are laid out at the first decode, which takes about as long as a pass, and anew once they have changed.
    Memory: where they are reordered, as much again as the matrices of decoder and head.

    Args:
        backbone: the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.weights = laid_out(backbone)
        super().__init__(backbone, self.weights.head_WD)
        self._rotations = Rotations(backbone)

    def states(self, asked: Asked) -> Tensor:
        """Return states; see `DecoderPass`."""
        input_ids_BL, row_M, position_BL, mask_B1LM, cache = asked
        batch, length = input_ids_BL.shape
        keys_turn = self._rotations.of_pass(length, position_BL, cache)
        turns = keys_turn.scaled(self.weights.blocks[0].attention.scaling), keys_turn
        x_BLD: Tensor = self.backbone.model.get_input_embeddings()(input_ids_BL)
        x_RD = x_BLD.flatten(0, 1)
        last = len(self.weights.blocks) - 1
        for layer, block in enumerate(self.weights.blocks):
            normed_BLD = block.input_norm(x_RD).view(x_BLD.shape)
            out_BLW = _attend(block, normed_BLD, turns, mask_B1LM, cache, layer)
            out_RW = out_BLW.flatten(0, 1)
            if layer == last and row_M is not None:
                out_RW, x_RD = out_RW.index_select(0, row_M), x_RD.index_select(0, row_M)
            x_RD = block.out.plus(out_RW, x_RD)
            inner_RI = gated(block.inner_norm(x_RD), block.gate.weight, block.up.weight, block.gate.bias, block.up.bias)
            x_RD = block.down.plus(inner_RI, x_RD)
        x_RD = self.weights.final_norm(x_RD)
        return x_RD.view(batch, length, -1) if row_M is None else x_RD


def _attend(
    block: BlockWeights,
    normed_BLD: Tensor,
    turns: tuple[Rotation, Rotation],
    mask_B1LM: Tensor | None,
    cache: SlotCache | None,
    layer: int,
) -> Tensor:
    """Return what the heads found, [B, L, N H], before the matrix that joins them.

    The queries' turn, the first, holds the scale of attention.
    """
    width = block.attention.head_dim
    query_BLNH, key_BLKH, value_BLKH = (
        heads_BLW.unflatten(-1, (-1, width)) for heads_BLW in block.query_key_value(normed_BLD)
    )
    if block.query_norm is not None and block.key_norm is not None:
        query_BLNH, key_BLKH = block.query_norm(query_BLNH), block.key_norm(key_BLKH)
    query_BNLH, key_BKMH = (_turned(x, turn) for turn, x in zip(turns, (query_BLNH, key_BLKH), strict=True))
    value_BKMH = value_BLKH.transpose(1, 2)
    if cache is not None:
        key_BKMH, value_BKMH = cache.update(key_BKMH, value_BKMH, layer)
    if query_BNLH.shape[2] == 1:
        return _single_query_attention(query_BNLH, key_BKMH, value_BKMH, mask_B1LM)[:, None]
    if is_plain(query_BNLH, key_BKMH):
        return _grouped_attention(query_BNLH, key_BKMH, value_BKMH, mask_B1LM).transpose(1, 2).flatten(2)
    found_BLNH, _ = attention.attention(
        block.attention, query_BNLH, key_BKMH, value_BKMH, mask_B1LM, scaling=1.0, is_causal=False
    )
    return found_BLNH.flatten(2)


def _turned(x_BLNH: Tensor, turn: Rotation) -> Tensor:
    """Return the turned heads as attention reads them, [B, N, L, H] without gaps."""
    batch, length, heads, width = x_BLNH.shape
    out_BNLH = x_BLNH.new_empty(batch, heads, length, width)
    out_BLNH = out_BNLH.transpose(1, 2)
    torch.mul(x_BLNH, turn.cos, out=out_BLNH)
    (first, second), (by_first, by_second) = x_BLNH.chunk(2, -1), turn.sin.chunk(2, -1)
    out_first, out_second = out_BLNH.chunk(2, -1)
    out_first.addcmul_(second, by_first)
    out_second.addcmul_(first, by_second)
    return out_BNLH


def _grouped_attention(query_BNLH: Tensor, key_BKMH: Tensor, value_BKMH: Tensor, mask_B1LM: Tensor | None) -> Tensor:
    """Return softmax(q k) v, [B, N, L, H]: the query heads of a key head are one product, keys are not repeated."""
    batch, heads, length, width = query_BNLH.shape
    shared = key_BKMH.shape[1]
    scores_BKQM = torch.matmul(query_BNLH.view(batch, shared, -1, width), key_BKMH.transpose(2, 3))
    if mask_B1LM is not None:
        scores_BKGLM = scores_BKQM.view(batch, shared, heads // shared, length, -1)
        # not -inf, whose softmax is NaN where nothing is seen
        scores_BKGLM.masked_fill_(~mask_B1LM[:, :, None], torch.finfo(scores_BKGLM.dtype).min)
    return torch.matmul(torch.softmax(scores_BKQM, -1), value_BKMH).view(query_BNLH.shape)


def _single_query_attention(
    query_BN1H: Tensor, key_BKMH: Tensor, value_BKMH: Tensor, mask_B11M: Tensor | None
) -> Tensor:
    """Return what the heads found for one token a row, [B, N H]: heads that share keys are queries of one sequence."""
    batch, heads, _, width = query_BN1H.shape
    query_BKGH = query_BN1H.view(batch, key_BKMH.shape[1], -1, width)
    found_BKGH = F.scaled_dot_product_attention(query_BKGH, key_BKMH, value_BKMH, attn_mask=mask_B11M, scale=1.0)
    return found_BKGH.reshape(batch, heads * width)
