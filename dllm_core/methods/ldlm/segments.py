"""A batch as one latent sequence per document: its response tokens, and the prompt before them.

B batch rows, S segments, L response slots, P prompt tokens (padded to the longest of the batch).
"""

from __future__ import annotations

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
    document_BL, response_BL = batch.document_BL.cpu(), batch.response_BL.cpu()
    for row in range(len(batch)):
        for document in range(int(document_BL[row].max()) + 1):
            own_L = document_BL[row] == document
            (slot_L,) = (own_L & response_BL[row]).nonzero(as_tuple=True)
            if len(slot_L) == 0:
                continue
            (before_P,) = (own_L & ~response_BL[row]).nonzero(as_tuple=True)
            rows.append(row)
            slots.append(slot_L)
            prompts.append(before_P[before_P < slot_L[0]].flip(0))
    device = batch.input_ids_BL.device
    counts = torch.tensor([len(s) for s in slots], dtype=torch.long)
    prompt_counts = torch.tensor([len(p) for p in prompts], dtype=torch.long)
    empty = torch.zeros(0, 0, dtype=torch.long)
    position_SL = pad_sequence(slots, batch_first=True) if slots else empty
    prompt_SP = pad_sequence(prompts, batch_first=True) if prompts else empty
    real_SL = torch.arange(position_SL.shape[1]) < counts[:, None]
    position_SL = torch.where(real_SL, position_SL, position_SL[:, :1])
    prompt_real_SP = torch.arange(prompt_SP.shape[1]) < prompt_counts[:, None]
    found = (torch.tensor(rows, dtype=torch.long), position_SL, real_SL, prompt_SP.flip(1), prompt_real_SP.flip(1))
    return Segments(*(part.to(device) for part in found))
