"""Attention masks. B batch, L length (queries, then keys), M keys where they are more than the queries."""

from __future__ import annotations

import torch
from torch import Tensor


def is_plain(document_BL: Tensor | None) -> bool:
    """Whether every row is one document without padding, so that full attention needs no mask."""
    return document_BL is None or bool((document_BL == 0).all())


def document_mask(document_BL: Tensor, *, causal: bool) -> Tensor:
    """Return the boolean mask [B, 1, L, L], True where query may see key: same document, and with `causal` not later.

    Padding (document -1) is seen by nobody but itself: a row without any key would give NaN.
    """
    same_BLL = document_BL[:, :, None] == document_BL[:, None, :]
    same_BLL &= (document_BL >= 0)[:, None, :]
    if causal:
        same_BLL = same_BLL.tril()
    length = document_BL.shape[1]
    same_BLL |= torch.eye(length, dtype=torch.bool, device=document_BL.device)
    return same_BLL[:, None]


def causal_mask(length: int, device: torch.device, *, first: int = 0, num_keys: int | None = None) -> Tensor:
    """Return [1, 1, L, M], True where the key is not after the query.

    Args:
        length: L.
        device: of the mask.
        first: position of the first query among the keys.
        num_keys: M; None is `first` + L.
    """
    num_keys = first + length if num_keys is None else num_keys
    return torch.ones(length, num_keys, dtype=torch.bool, device=device).tril(first)[None, None]


def open_mask(device: torch.device) -> Tensor:
    """Return True as [1, 1, 1, 1]: every query sees every key.

    transformers makes a causal mask of its own where queries are fewer than keys and none is given; the attention of
    `dllm_core.backbone.attention` drops this one again, so that the kernels without a mask serve.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def additive(mask_B1LM: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as numbers to add to attention scores, for implementations that do not take booleans."""
    if mask_B1LM.dtype != torch.bool:
        return mask_B1LM
    zero = torch.zeros((), dtype=dtype, device=mask_B1LM.device)
    return torch.where(mask_B1LM, zero, torch.finfo(dtype).min)
