"""What acceptance rules read off a distribution, without keeping it."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_core.kernels.dispatch import choose, product_dtype
from dllm_core.kernels.token_stats import reference
from dllm_core.kernels.token_stats.reference import TokenStats, argmax


def implementation(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """Return (name, reason) of the implementation that `stats` runs on a device, with products in a dtype."""
    return choose("token_stats", torch.device(device), dtype)


@torch.no_grad()
def stats(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    blocked_V: Tensor | None = None,
    chunk_rows: int | None = None,
    *,
    second: bool = True,
    entropy: bool = False,
) -> TokenStats:
    """Return the statistics of softmax(hidden @ weight.T) for each row; fp32 arithmetic, no gradient.

    Args:
        hidden_MD: states the head reads, float.
        weight_VD: rows of the head, same dtype; may be laid out by `layers.packed_linear.layout`.
        blocked_V: bool; ids whose logit is -inf.
        chunk_rows: rows of logits that the reference holds at a time; default by vocabulary and device. The Triton
            kernel holds none.
        second: also find the runner-up (one more pass over the logits in the reference).
        entropy: also compute the entropy (one more pass there).
    """
    name, _ = choose("token_stats", hidden_MD.device, product_dtype(hidden_MD))
    if name == "reference" or weight_VD.is_mkldnn:  # laid out for a product that is not the kernel's
        return reference.stats(hidden_MD, weight_VD, blocked_V, chunk_rows, second=second, entropy=entropy)
    from dllm_core.kernels.token_stats import triton

    return triton.stats(hidden_MD, weight_VD, blocked_V, second=second, entropy=entropy)


__all__ = ["TokenStats", "argmax", "implementation", "stats"]
