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

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.backbone import attention, captured, joined
from dllm_core.backbone.laid_out import BlockWeights, laid_out, linears_of, real_head
from dllm_core.errors import DllmError
from dllm_core.kernels import dispatch
from dllm_core.layers.attention import is_plain
from dllm_core.layers.packed_linear import gated

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.backbone.slot_cache import SlotCache

FAMILIES = ("llama", "qwen2", "qwen3")


class Rotation(NamedTuple):
    """Tables [B or 1, L, 1, H]: turned = x * cos + (x with the halves of a head exchanged) * sin (arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, cos_BLH: Tensor, sin_BLH: Tensor) -> Rotation:
        """Take transformers' tables, in which a head's halves stand side by side."""
        first, second = sin_BLH.chunk(2, dim=-1)
        return cls(cos_BLH[:, :, None], torch.cat((-first, second), dim=-1)[:, :, None])

    def scaled(self, scale: float) -> Rotation:
        """Return tables that scale as they turn."""
        return Rotation(self.cos * scale, self.sin * scale)

    def turn(self, x_BLNH: Tensor) -> Tensor:
        """Return the turned heads as attention reads them, [B, N, L, H] without gaps."""
        batch, length, heads, width = x_BLNH.shape
        out_BNLH = x_BLNH.new_empty(batch, heads, length, width)
        out_BLNH = out_BNLH.transpose(1, 2)
        torch.mul(x_BLNH, self.cos, out=out_BLNH)
        (first, second), (by_first, by_second) = x_BLNH.chunk(2, -1), self.sin.chunk(2, -1)
        out_first, out_second = out_BLNH.chunk(2, -1)
        out_first.addcmul_(second, by_first)
        out_second.addcmul_(first, by_second)
        return out_BNLH


class DecoderPass(Protocol):
    """Runs a decoder both ways on a canvas, whole or in part.

    Attributes:
        head_WD: rows of the output head that stand for tokens, laid out for products with the states.
    """

    head_WD: Tensor

    def __call__(
        self,
        input_ids_BL: Tensor,
        *,
        row_M: Tensor | None = None,
        position_BL: Tensor | None = None,
        attention_mask_B1LM: Tensor | None = None,
        cache: SlotCache | None = None,
    ) -> Tensor:
        """Return the states after the final norm: [B, L, D], or [M, D] of the rows asked for.

        Args:
            input_ids_BL: int64.
            row_M: int64; flat indices b * L + l.
            position_BL: with a cache, positions of the tokens, [B or 1, L].
            attention_mask_B1LM: bool, True where query sees key; None is everywhere.
            cache: as for `Backbone.hidden`.
        """


class PlainPass:
    """The pass through transformers' modules.

    Args:
        backbone: the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.head_WD = backbone, real_head(backbone)

    def __call__(self, input_ids_BL: Tensor, *, row_M: Tensor | None = None, **options: Any) -> Tensor:
        """Return states; see `DecoderPass`."""
        states_BLD = self.backbone.hidden(input_ids_BL, causal=False, **options)
        return states_BLD if row_M is None else states_BLD.flatten(0, 1).index_select(0, row_M)


class QuickPass:
    """The pass of a decoder that `obstacle` has nothing against. Without gradients.

    Weights are laid out at the first decode, which takes about as long as a pass, and anew once they have changed.
    Memory: where they are reordered, as much again as the matrices of decoder and head.

    Args:
        backbone: the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.weights = backbone, laid_out(backbone)
        self.head_WD = self.weights.head_WD
        self._turns: tuple[int, tuple[Rotation, Rotation]] | None = None

    @torch.no_grad()
    def __call__(
        self,
        input_ids_BL: Tensor,
        *,
        row_M: Tensor | None = None,
        position_BL: Tensor | None = None,
        attention_mask_B1LM: Tensor | None = None,
        cache: SlotCache | None = None,
    ) -> Tensor:
        """Return states; see `DecoderPass`."""
        backbone, (batch, length) = self.backbone, input_ids_BL.shape
        if cache is None:
            backbone.check_length(length)
        else:
            cache.require_room(length)
        x_BLD: Tensor = backbone.model.get_input_embeddings()(input_ids_BL)
        turns = self._rotations(x_BLD, position_BL)
        x_RD = x_BLD.flatten(0, 1)
        last = len(self.weights.blocks) - 1
        for layer, block in enumerate(self.weights.blocks):
            normed_BLD = block.input_norm(x_RD).view(x_BLD.shape)
            out_BLW = _attend(block, normed_BLD, turns, attention_mask_B1LM, cache, layer)
            out_RW = out_BLW.flatten(0, 1)
            if layer == last and row_M is not None:
                out_RW, x_RD = out_RW.index_select(0, row_M), x_RD.index_select(0, row_M)
            x_RD = block.out.plus(out_RW, x_RD)
            inner_RI = gated(block.inner_norm(x_RD), block.gate.weight, block.up.weight, block.gate.bias, block.up.bias)
            x_RD = block.down.plus(inner_RI, x_RD)
        x_RD = self.weights.final_norm(x_RD)
        return x_RD.view(batch, length, -1) if row_M is None else x_RD

    def _rotations(self, x_BLD: Tensor, position_BL: Tensor | None) -> tuple[Rotation, Rotation]:
        """Return the tables of queries, which hold the scale of attention, and of keys."""
        length = x_BLD.shape[1]
        if position_BL is None and self._turns is not None and self._turns[0] == length:
            return self._turns[1]
        places_BL = torch.arange(length, device=x_BLD.device)[None] if position_BL is None else position_BL
        rotary: Any = self.backbone.decoder.rotary_emb
        keys = Rotation.of(*rotary(x_BLD, places_BL))
        found = keys.scaled(self.weights.blocks[0].attention.scaling), keys
        if position_BL is None:
            self._turns = length, found
        return found


def _attend(
    block: BlockWeights,
    normed_BLD: Tensor,
    turns: tuple[Rotation, Rotation],
    mask_B1LM: Tensor | None,
    cache: SlotCache | None,
    layer: int,
) -> Tensor:
    """Return what the heads found, [B, L, N H], before the matrix that joins them."""
    width = block.attention.head_dim
    query_BLNH, key_BLKH, value_BLKH = (
        heads_BLW.unflatten(-1, (-1, width)) for heads_BLW in block.query_key_value(normed_BLD)
    )
    if block.query_norm is not None and block.key_norm is not None:
        query_BLNH, key_BLKH = block.query_norm(query_BLNH), block.key_norm(key_BLKH)
    query_BNLH, key_BKMH = (turn.turn(x) for turn, x in zip(turns, (query_BLNH, key_BLKH), strict=True))
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


def obstacle(backbone: Backbone) -> str | None:
    """Return why decoding has to go through transformers' modules, None where a quick pass gives the same."""
    if dispatch.wish() == "reference":
        return "DLLM_KERNELS=reference"
    config, decoder = backbone.config, backbone.decoder
    if backbone.device.type not in ("cpu", "cuda"):
        return f"the model is on {backbone.device.type}"
    if config.model_type not in FAMILIES:
        return f"it is not written for {config.model_type}"
    if config.hidden_act != "silu":
        return f"it is not written for {config.hidden_act}"
    if config._attn_implementation != attention.NAME:
        return f"attention is set to {config._attn_implementation}"
    if torch.is_autocast_enabled(backbone.device.type):
        return "autocast is on"
    for module in decoder.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return "modules have hooks"
        if module._compiled_call_impl is not None:
            return "the decoder is compiled"
    if any(type(module) is not nn.Linear for module in linears_of(backbone)):
        return "its matrices are not plain ones"
    return None


def pass_for(backbone: Backbone, *, quick: bool = True, compiling: str = "never") -> DecoderPass:
    """Return the quickest pass there is for a backbone, or transformers' own; which one and why is logged once.

    Args:
        backbone: the model.
        quick: with kernels made for decoding, where there are any for the model.
        compiling: see `samplers.config.DiffusionGenerationConfig.compile`.

    Raises:
        DllmError: `compiling` is `always`, and nothing that is compiled serves the model here.
    """
    if not quick:
        return PlainPass(backbone)
    reason, kind = obstacle(backbone), backbone.device.type
    is_joined = kind == "cuda" or compiling == "always"
    if reason is None and is_joined:
        reason = joined.obstacle(backbone)
    if reason is not None:
        if compiling == "always" and dispatch.wish() != "reference":
            raise DllmError(
                f"compile='always', but the pass that is compiled does not serve this model: {reason}.",
                "Give compile='auto' or 'never'.",
            )
        dispatch.announce("decoder pass", "reference", reason)
        return PlainPass(backbone)
    if is_joined:
        return captured.joined_pass_for(backbone, compiling)
    dispatch.announce("decoder pass", "quick", f"{backbone.config.model_type} on a CPU")
    return QuickPass(backbone)
