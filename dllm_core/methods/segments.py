"""A batch as one latent sequence per document: its response tokens, and the prompt before them.

B batch rows, S segments, L response slots, P prompt tokens (padded to the longest of the batch).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_core.data.batch import Batch


@dataclass(frozen=True)
class Segments:
    """Latent sequences of a batch, in row order.

    Attributes:
        row_S: int64; row of the batch each comes from.
        position_SL: int64; position in that row of each slot; that of the first slot in padding, so that a store that
            keeps response rows alone is never asked for another one.
        real_SL: bool; slots that are no padding (padding follows).
        prompt_SP: int64; positions of the prompt, padding first: the last prompt token is always in the last column.
        prompt_real_SP: bool.
    """

    row_S: Tensor
    position_SL: Tensor
    real_SL: Tensor
    prompt_SP: Tensor
    prompt_real_SP: Tensor

    def __len__(self) -> int:
        return len(self.row_S)

    @property
    def is_full(self) -> bool:
        """Whether no slot is padding."""
        return bool(self.real_SL.all())

    @property
    def num_keys(self) -> int:
        """P + L."""
        return self.prompt_SP.shape[1] + self.real_SL.shape[1]

    def slots(self, values_BL: Tensor) -> Tensor:
        """Return values [S, L, ...] of the slots, those of the first slot in padding."""
        return values_BL[self.row_S[:, None], self.position_SL]

    def prompts(self, values_BL: Tensor) -> Tensor:
        """Return values [S, P, ...] of the prompt tokens."""
        return values_BL[self.row_S[:, None], self.prompt_SP]

    def of_rows(self, values_B: Tensor) -> Tensor:
        """Return a value of each segment's row, [S, ...]."""
        return values_B[self.row_S]


def segments_of(batch: Batch) -> Segments:
    """Cut a batch into latent sequences; documents without response tokens are left out."""
    rows: list[int] = []
    slots: list[Tensor] = []
    prompts: list[Tensor] = []
    for row, position_L, response_L in documents_of(batch):
        slot_L, other_L = position_L[response_L], position_L[~response_L]
        rows.append(row)
        slots.append(slot_L)
        prompts.append(other_L[other_L < slot_L[0]].flip(0))
    position_SL, real_SL = padded(slots)
    position_SL = torch.where(real_SL, position_SL, position_SL[:, :1])
    prompt_SP, prompt_real_SP = padded(prompts)
    found = (torch.tensor(rows, dtype=torch.long), position_SL, real_SL, prompt_SP.flip(1), prompt_real_SP.flip(1))
    return Segments(*(part.to(batch.input_ids_BL.device) for part in found))


def documents_of(batch: Batch) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (row, positions [L], which of them are response tokens [L]) of every document that has some, on CPU."""
    document_BL, response_BL = batch.document_BL.cpu(), batch.response_BL.cpu()
    for row in range(len(batch)):
        for document in range(int(document_BL[row].max()) + 1):
            (position_L,) = (document_BL[row] == document).nonzero(as_tuple=True)
            response_L = response_BL[row, position_L]
            if bool(response_L.any()):
                yield row, position_L, response_L


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (rows of int64 side by side [S, L], zeros following; bool [S, L], what is no padding)."""
    if not rows:
        return torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool)
    counts_S = torch.tensor([len(row) for row in rows])
    values_SL = pad_sequence(rows, batch_first=True)
    return values_SL, torch.arange(values_SL.shape[1]) < counts_S[:, None]
