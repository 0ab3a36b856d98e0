"""Which tokens a training step masks: one count a block, spread evenly over the blocks of a sequence.

B batch, L length. A block is named by the position in the row at which it begins; blocks are counted from the beginning
of each document, so a prompt that ends inside a block leaves the rest of it to the response.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch


def block_starts(position_BL: Tensor, block_size: int) -> Tensor:
    """Return where in its row each token's block begins, int64; documents never share a block."""
    place_L = torch.arange(position_BL.shape[1], device=position_BL.device)
    return place_L - position_BL % block_size


def sum_by_block(values_BL: Tensor, start_BL: Tensor) -> Tensor:
    """Return sums of `values_BL` over blocks, [B, L]: at the position at which a block begins."""
    return torch.zeros_like(values_BL).scatter_add_(1, start_BL, values_BL)


def block_masks(batch: Batch, block_size: int, noise: NoiseSource, *, complementary: bool) -> Tensor:
    """Mask k of a block's n response tokens, each subset equally likely; return masked_BL, bool, CPU.

    k is uniform on 1..n, so t = k / n is the mask rate of the block, and 1 / t its weight in the bound. Where the
    complementary mask is trained on too, k is uniform on 0..n, as n - k is then.

    The uniform draws behind the counts of a row's blocks are one offset plus equal steps around the unit interval:
    each is uniform on its own, together they cover it (the antithetic draws of arXiv:2503.09573).
    """
    response_BL = batch.response_BL.cpu()
    start_BL = block_starts(batch.position_BL.cpu(), block_size)
    size_BL = sum_by_block(response_BL.long(), start_BL)
    nth_BL = (size_BL > 0).cumsum(1) - 1
    num_blocks_B1 = (nth_BL[:, -1:] + 1).clamp(min=1)
    offset_B1 = noise.uniform(batch, "block offset").double()[:, None]
    uniform_BL = (offset_B1 + nth_BL / num_blocks_B1) % 1.0
    least, choices_BL = (0, size_BL + 1) if complementary else (1, size_BL)
    count_BL = torch.minimum((uniform_BL * choices_BL).floor().long() + least, size_BL)
    # sorted by block and then by a random key, tokens of a block lie together behind those of the blocks before it
    key_BL = start_BL + noise.uniform(batch, "block order", (batch.length,)).double()
    rank_BL = key_BL.masked_fill(~response_BL, torch.inf).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    before_BL = size_BL.cumsum(1) - size_BL
    return response_BL & (rank_BL < (before_BL + count_BL).gather(1, start_BL))


def bound_weights(masked_BL: Tensor, response_BL: Tensor, start_BL: Tensor, *, complementary: bool) -> Tensor:
    """Return weight_BL, fp32: what a masked token's cross-entropy counts in the bound per token of its row.

    A block of n response tokens with k of them masked counts n / k times their sum (t = k / n, weight 1 / t), a row the
    sum of its blocks over its response tokens; the weights of a row sum to 1. Of two complementary views each is half
    of an estimate with k uniform on 0..n, whose weight is (n + 1) / k.
    """
    size_BL = sum_by_block(response_BL.float(), start_BL)
    count_BL = sum_by_block(masked_BL.float(), start_BL)
    scale_BL = (size_BL + 1.0) / 2.0 if complementary else size_BL
    total_B1 = response_BL.sum(1, keepdim=True).clamp(min=1)
    return masked_BL * (scale_BL / count_BL.clamp(min=1.0)).gather(1, start_BL) / total_B1
