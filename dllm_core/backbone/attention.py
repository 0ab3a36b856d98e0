"""The plain attention of `dllm_core.layers.attention`, registered with transformers like any other kind.

It serves short bf16 sequences on CPU. All other cases go to transformers' own `sdpa`.

B batch, H heads, L length, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dllm_core.layers.attention import is_plain, plain_attend

NAME = "dllm_sdpa"


def attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return ([B, L, H, D], None), as transformers expects of an attention function; queries may be fewer than keys."""
    if attention_mask is not None and attention_mask.shape[-2:] == (1, 1) and key_BHLD.shape[2] > 1:
        # `masks.open_mask`, which only kept transformers from making one
        attention_mask, is_causal = None, False
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    plain = (
        is_plain(query_BHLD, key_BHLD)
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and not (causal and attention_mask is None)
        and dropout == 0.0
    )
    if not plain:
        return sdpa_attention_forward(
            module,
            query_BHLD,
            key_BHLD,
            value_BHLD,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    return plain_attention(module, query_BHLD, key_BHLD, value_BHLD, attention_mask, scaling=scaling)


def plain_attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return softmax(q k^T) v, never causal by itself; arguments as for `attention`, a mask is bool (True: seen)."""
    groups = getattr(module, "num_key_value_groups", 1)
    key_BHLD, value_BHLD = repeat_kv(key_BHLD, groups), repeat_kv(value_BHLD, groups)
    out_BHLD = plain_attend(query_BHLD, key_BHLD, value_BHLD, attention_mask, scaling)
    return out_BHLD.transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the function known to transformers and return its name."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
