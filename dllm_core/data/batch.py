"""The batch every method sees. B batch, L length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences of prompt and response tokens, one row each.

    Attributes:
        input_ids_BL: clean token ids, int64.
        response_BL: bool; tokens that may be corrupted, are scored and count towards the budget. Never the first
            token of a document, never padding.
        document_BL: int64; index of the document within the row, -1 for padding. Documents never see each other.
        position_BL: int64; position within the document (restarts at 0), 0 for padding.
        sample_ids: global index of each row in its sequence set; keys the noise.
        epochs: how often the row had been presented before; keys the noise.
        sequence_keys: SHA-256 of ids, boundaries and positions; keys anchors and trajectories.
    """

    input_ids_BL: Tensor
    response_BL: Tensor
    document_BL: Tensor
    position_BL: Tensor
    sample_ids: tuple[int, ...]
    epochs: tuple[int, ...]
    sequence_keys: tuple[str, ...]

    def __len__(self) -> int:
        return self.input_ids_BL.shape[0]

    @property
    def length(self) -> int:
        """Positions per row, padding included."""
        return self.input_ids_BL.shape[1]

    @property
    def is_plain(self) -> bool:
        """Whether every row is one document without padding, so that no attention mask is needed."""
        return bool((self.document_BL == 0).all())

    def rows(self, start: int, stop: int) -> Batch:
        """Return the rows start..stop-1 as a batch of their own."""
        return replace(self, **{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})

    def select(self, rows: Sequence[int]) -> Batch:
        """Return the named rows, in that order, as a batch of their own."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.input_ids_BL.device)
        picked: dict[str, Any] = {
            f.name: v[index] if isinstance(v := getattr(self, f.name), Tensor) else tuple(v[i] for i in rows)
            for f in fields(self)
        }
        return replace(self, **picked)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)
