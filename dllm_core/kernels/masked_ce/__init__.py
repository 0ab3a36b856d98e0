"""Token losses from hidden states, never holding all logits at once. See `chunked.token_losses`."""

from __future__ import annotations

import torch

from dllm_core.kernels.dispatch import choose
from dllm_core.kernels.masked_ce.chunked import TokenLosses, token_losses


def implementation(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """Return (name, reason) of the implementation that `token_losses` runs on a device, with products in a dtype."""
    return choose("masked_ce", torch.device(device), dtype)


__all__ = ["TokenLosses", "implementation", "token_losses"]
