"""Masked views of held-out sequences: which tokens are hidden, and how much each hidden token counts.

A view never forces a mask: an empty one contributes nothing, as the bound demands. Everything random comes in as an
argument, so that a test can enumerate it, and is keyed per sequence, so that all rows of a grid see the same views.

B batch, L length, V views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.methods.protocol import Method

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Views:
    """Masked copies of some sequences.

    Attributes:
        row_V: which sequence of the batch each view is of.
        masked_VL: bool; hidden tokens.
        weight_VL: float64; weight of each token's loss, 0 where hidden but not scored.
    """

    row_V: Tensor
    masked_VL: Tensor
    weight_VL: Tensor

    def __len__(self) -> int:
        return self.row_V.shape[0]

    def part(self, index: Tensor | slice) -> Views:
        return Views(self.row_V[index], self.masked_VL[index], self.weight_VL[index])

    @staticmethod
    def concatenated(parts: list[Views]) -> Views:
        columns = zip(*((p.row_V, p.masked_VL, p.weight_VL) for p in parts), strict=True)
        return Views(*(torch.cat(c) for c in columns))


def stratified(offset_B: Tensor, samples: int) -> Tensor:
    """Return systematic draws (offset + s) / samples in [0, 1), [B, samples]; each is uniform over a random s."""
    return (offset_B[:, None].double() + torch.arange(samples, dtype=torch.float64)) / samples


def ranks(key_BL: Tensor, member_BL: Tensor) -> Tensor:
    """Return each member's rank 0.. by ascending key within its row; non-members rank after all members."""
    keys = key_BL.double().masked_fill(~member_BL, torch.inf)
    return keys.argsort(dim=1, stable=True).argsort(dim=1, stable=True)


def fixed_count(member_BL: Tensor, count_B: Tensor, key_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Hide exactly `count_B` of the members, those with the smallest keys.

    Returns:
        (masked_BL, weight_BL): weight size / count at hidden members, so that with count uniform on 1..size the
        expected weighted loss is the sum over an average order of unmasking (arXiv:2502.09992, eq. 6).
    """
    masked_BL = member_BL & (ranks(key_BL, member_BL) < count_B[:, None])
    size_B = member_BL.sum(1)
    weight_B = size_B.double() / count_B.clamp(min=1).double()
    return masked_BL, masked_BL * weight_B[:, None]


def fixed_rate(member_BL: Tensor, rate_B: Tensor, key_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Hide each member on its own with probability `rate_B` in (0, 1] (keys are U(0, 1)); weight 1 / rate.

    The continuous-time form of the same bound (arXiv:2406.07524, eq. 11 with a linear schedule).
    """
    masked_BL = member_BL & (key_BL.double() < rate_B[:, None].double())
    return masked_BL, masked_BL / rate_B[:, None].double()


def counts_from(uniform_B: Tensor, size_B: Tensor) -> Tensor:
    """Map U[0, 1) to uniform counts 1..size (0 for size 0)."""
    return torch.minimum((uniform_B.double() * size_B).floor().long() + 1, size_B)


def block_of(batch: Batch, block_size: int) -> Tensor:
    """Return the block index of every response token within its document, -1 elsewhere, [B, L].

    A document's response tokens are cut into blocks of `block_size` from its first one on; the last may be ragged.
    Equal indices in different documents are independent of each other and may share a view.
    """
    block_BL = torch.full_like(batch.input_ids_BL, -1)
    for document in range(int(batch.document_BL.max()) + 1):
        inside_BL = batch.response_BL & (batch.document_BL == document)
        nth_BL = inside_BL.cumsum(1) - 1
        block_BL = torch.where(inside_BL, nth_BL // block_size, block_BL)
    return block_BL


def device_of(method: Method) -> torch.device:
    """Return where the method's weights are (CPU if it has none)."""
    return next((p.device for p in method.parameters()), torch.device("cpu"))


def _batched(parts: Iterable[Views], size: int) -> Iterator[Views]:
    """Regroup views into batches of `size`, dropping those without a scored token."""
    pending: list[Views] = []
    held = 0
    for views in parts:
        kept = views.part((views.weight_VL != 0).any(1))
        pending.append(kept)
        held += len(kept)
        if held >= size:
            merged = Views.concatenated(pending)
            whole = held - held % size
            yield from (merged.part(slice(i, i + size)) for i in range(0, whole, size))
            pending, held = [merged.part(slice(whole, None))], held % size
    if held:
        yield Views.concatenated(pending)


@torch.no_grad()
def score(
    method: Method, batch: Batch, parts: Iterable[Views], *, batch_size: int, on_views: Callable[[int], None] | None
) -> tuple[Tensor, Tensor]:
    """Return the weighted loss and the weighted number of right tokens of each sequence, both [B] float64.

    Args:
        method: a room with capability `nelbo`.
        batch: the sequences.
        parts: views of them, made as they are needed.
        batch_size: views a forward pass.
        on_views: called with the number of views done.
    """
    device = device_of(method)
    nats_B = torch.zeros(len(batch), dtype=torch.float64)
    right_B = torch.zeros(len(batch), dtype=torch.float64)
    for views in _batched(parts, batch_size):
        # what is hidden but not scored (later blocks) is no response in this view: a room may skip its logits
        chunk = replace(batch.select(views.row_V.tolist()), response_BL=views.weight_VL != 0)
        tokens = method.masked_nll(chunk.to(device), views.masked_VL.to(device))
        weighted_VL = tokens.nll_BL.cpu().double() * views.weight_VL
        nats_B.index_add_(0, views.row_V, weighted_VL.sum(1))
        right_B.index_add_(0, views.row_V, (tokens.correct_BL.cpu() * views.weight_VL).sum(1))
        if on_views:
            on_views(len(views))
    return nats_B, right_B
