"""Attention masks. B batch, L length (queries, then keys)."""

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


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Return the boolean lower triangle [1, 1, L, L]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def additive(mask_B1LL: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as numbers to add to attention scores, for implementations that do not take booleans."""
    if mask_B1LL.dtype != torch.bool:
        return mask_B1LL
    zero = torch.zeros((), dtype=dtype, device=mask_B1LL.device)
    return torch.where(mask_B1LL, zero, torch.finfo(dtype).min)
