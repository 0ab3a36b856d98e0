"""Which tokens are masked. B batch, L length. Masks are boolean tensors; nothing here looks at token ids.

Everything runs on CPU from generators keyed per sample, so that a row's mask depends on the row alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch


def uniform_masks(batch: Batch, noise: NoiseSource, *, stream: str = "mask") -> Tensor:
    """Mask response tokens independently with a ratio r ~ U(0, 1) of each row's own; return masked_BL, bool, CPU.

    A row in which nothing was masked draws r and its mask anew (training only: never force a mask in an evaluation).
    Given at least one masked token the count is then uniform on 1..n, so that the mean cross-entropy over a row's
    masked tokens has exactly the bound per token as its expectation. Rows without response tokens stay unmasked.
    """
    response_BL = batch.response_BL.cpu()
    masked_BL = torch.zeros_like(response_BL)
    for row, (sample_id, epoch) in enumerate(zip(batch.sample_ids, batch.epochs, strict=True)):
        if not response_BL[row].any():
            continue
        generator = noise.generator(sample_id, epoch, stream)
        while not masked_BL[row].any():
            ratio = torch.rand((), generator=generator)
            masked_BL[row] = response_BL[row] & (torch.rand(batch.length, generator=generator) < ratio)
    return masked_BL


def masks_of_count(
    response_BL: Tensor, counts_B: Tensor | Sequence[int], generators: Sequence[torch.Generator]
) -> Tensor:
    """Mask exactly `counts_B[b]` response tokens of row b, each subset equally likely; return masked_BL, bool.

    Args:
        response_BL: bool; the tokens that may be masked.
        counts_B: how many, 0 <= count <= response tokens of the row.
        generators: one CPU generator per row; row b draws from its own alone.
    """
    counts = counts_B.tolist() if isinstance(counts_B, Tensor) else list(counts_B)
    allowed_BL = response_BL.cpu()
    masked_BL = torch.zeros_like(allowed_BL)
    for row, (count, generator) in enumerate(zip(counts, generators, strict=True)):
        (positions,) = allowed_BL[row].nonzero(as_tuple=True)
        if not 0 <= count <= len(positions):
            raise AssertionError(f"row {row}: {count} masks asked for, {len(positions)} response tokens")
        masked_BL[row, positions[torch.randperm(len(positions), generator=generator)[: int(count)]]] = True
    return masked_BL.to(response_BL.device)


def subset_weights(positions_BL: Tensor, batch: Batch, noise: NoiseSource, fraction: float, stream: str) -> Tensor:
    """Draw ceil(fraction * n) of each row's n positions; return weight_BL, fp32: n / drawn there, 0 elsewhere.

    Summing weight * value is an unbiased estimate of the sum over all n positions, since every position is equally
    likely to be drawn and the number drawn is fixed.
    """
    if fraction >= 1.0:
        return positions_BL.to(torch.float32)
    counts_B = positions_BL.sum(1)
    drawn_B = torch.ceil(counts_B.double() * fraction).long()
    rows = zip(batch.sample_ids, batch.epochs, strict=True)
    chosen_BL = masks_of_count(positions_BL, drawn_B, [noise.generator(s, e, stream) for s, e in rows])
    scale_B = counts_B.float() / drawn_B.clamp(min=1).float()
    return chosen_BL.float() * scale_B[:, None]


@dataclass(frozen=True)
class BlockChoice:
    """One training block per document of a row.

    Attributes:
        block_BL: bool; response tokens inside the block.
        after_BL: bool; response tokens after the block, in the same document.
        size_BL: int64; at block positions the block's own size (the last block may be ragged), 0 elsewhere.
    """

    block_BL: Tensor
    after_BL: Tensor
    size_BL: Tensor


def _responses(response_L: Tensor, document_L: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (document index, positions of its response tokens) for one row."""
    for document in torch.unique(document_L[response_L]).tolist():
        yield document, (response_L & (document_L == document)).nonzero(as_tuple=True)[0]


def choose_blocks(response_BL: Tensor, document_BL: Tensor, block_size: int, uniform_BL: Tensor) -> BlockChoice:
    """Cut each document's response into blocks of `block_size` tokens and choose one of them, all equally likely.

    Args:
        response_BL: bool, CPU.
        document_BL: int64, CPU; document index within the row.
        block_size: tokens per block; the last one holds what is left.
        uniform_BL: U(0, 1) draws; document d of row b uses entry [b, d].
    """
    block_BL, after_BL = torch.zeros_like(response_BL), torch.zeros_like(response_BL)
    size_BL = torch.zeros_like(document_BL)
    for row in range(len(response_BL)):
        for document, positions in _responses(response_BL[row], document_BL[row]):
            num_blocks = -(-len(positions) // block_size)
            start = int(float(uniform_BL[row, document]) * num_blocks) * block_size
            inside = positions[start : start + block_size]
            block_BL[row, inside] = True
            size_BL[row, inside] = len(inside)
            after_BL[row, positions[start + block_size :]] = True
    return BlockChoice(block_BL, after_BL, size_BL)


def kept_in_block(size_BL: Tensor, ratio_B: Tensor) -> Tensor:
    """Return floor((1 - rho) k) at every position of a block of k tokens (0 elsewhere), int64: what view one shows."""
    return torch.floor((1.0 - ratio_B.double())[:, None] * size_BL).long()


def ranks_in_block(commit_step_BL: Tensor, block_BL: Tensor, document_BL: Tensor) -> Tensor:
    """Rank each block position by (commit step, position) among its block, 0 first; -1 outside. int64.

    The stored steps span the whole response; training blocks of 16, 24 or 32 tokens rank them anew.
    """
    rank_BL = torch.full_like(document_BL, -1)
    for row in range(len(block_BL)):
        for _, positions in _responses(block_BL[row], document_BL[row]):
            order = torch.argsort(commit_step_BL[row, positions], stable=True)
            rank_BL[row, positions[order]] = torch.arange(len(positions), device=rank_BL.device)
    return rank_BL


def complementary_views(rank_BL: Tensor, block_BL: Tensor, kept_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Split a block into (rank >= kept, rank < kept): every block position is masked in exactly one view."""
    late_BL = block_BL & (rank_BL >= kept_BL)
    return late_BL, block_BL & ~late_BL
