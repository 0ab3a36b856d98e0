"""A batch as one sequence of latents per document. B batch rows, S spans, T slots, one latent per token and slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.methods.segments import documents_of, padded


@dataclass(frozen=True)
class Spans:
    """Documents of a batch, in row order; slot j of a span is the document's token j.

    Attributes:
        row_S: int64; row of the batch each comes from.
        position_ST: int64; position in that row of each slot, that of the first slot in padding.
        real_ST: bool; slots that are no padding (padding follows).
        response_ST: bool; response tokens.
    """

    row_S: Tensor
    position_ST: Tensor
    real_ST: Tensor
    response_ST: Tensor

    def __len__(self) -> int:
        return len(self.row_S)

    @property
    def num_slots(self) -> int:
        """T."""
        return self.position_ST.shape[1]

    @property
    def padding_ST(self) -> Tensor | None:
        """`real_ST` for the networks: None where nothing is padding."""
        return None if bool(self.real_ST.all()) else self.real_ST

    def slots(self, values_BL: Tensor) -> Tensor:
        """Return values [S, T, ...] of the slots, those of the first slot in padding."""
        return values_BL[self.row_S[:, None], self.position_ST]

    def of_rows(self, values_B: Tensor) -> Tensor:
        """Return a value of each span's row, [S, ...]."""
        return values_B[self.row_S]

    def halves(self, block_size: int) -> tuple[int, int]:
        """Return (C, N0): slots of the clean half, and the first slot of the noisy half.

        No noisy block looks at the last clean one, which is left out; neither are blocks noised that come before all
        responses.
        """
        first = int(self.response_ST.int().argmax(1).min())
        return (self.num_slots - 1) // block_size * block_size, first // block_size * block_size


def spans_of(batch: Batch) -> Spans:
    """Cut a batch into documents; those without response tokens are left out."""
    found = list(documents_of(batch))
    row_S = torch.tensor([row for row, _, _ in found], dtype=torch.long)
    position_ST, real_ST = padded([position_L for _, position_L, _ in found])
    position_ST = torch.where(real_ST, position_ST, position_ST[:, :1])
    response_ST = batch.response_BL.cpu()[row_S[:, None], position_ST] & real_ST
    device = batch.input_ids_BL.device
    return Spans(*(part.to(device) for part in (row_S, position_ST, real_ST, response_ST)))
