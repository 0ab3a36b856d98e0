"""The canvas: given tokens, and the places to fill. B batch, C canvas length.

Which positions are to be filled is a boolean tensor, never found by comparing ids: a prompt that happens to contain
the mask token keeps it as data. Rows of different length are padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_core.errors import DllmError


@dataclass(frozen=True)
class Canvas:
    """What a model is asked to fill in.

    Attributes:
        input_ids_BC: int64; read where `fixed_BC`, ignored elsewhere.
        fixed_BC: bool; tokens that are given and never change.
        lengths: tokens of each row; what lies beyond is padding.
    """

    input_ids_BC: Tensor
    fixed_BC: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_prompts(cls, prompts: Tensor | Sequence[Tensor], max_new_tokens: int) -> Canvas:
        """Return prompts followed by `max_new_tokens` places each.

        Args:
            prompts: int64 [B, L] or 1-D tensors.
            max_new_tokens: places to fill after each prompt.

        Raises:
            DllmError: no prompt, or one that is no 1-D tensor of integers.
        """
        _check_rows(prompts)
        rows = [torch.cat((p, p.new_zeros(max_new_tokens))) for p in prompts]
        fixed = [torch.arange(len(row)) < len(p) for row, p in zip(rows, prompts, strict=True)]
        return cls._padded(rows, fixed)

    @classmethod
    def from_infill(cls, rows: Tensor | Sequence[Tensor], infill_mask: Tensor | Sequence[Tensor]) -> Canvas:
        """Return rows with places where the mask is True.

        Args:
            rows: int64 [B, L] or 1-D tensors.
            infill_mask: bool, the same shapes.

        Raises:
            DllmError: no row, one that is no 1-D tensor of integers, or shapes that differ.
        """
        _check_rows(rows)
        if not isinstance(infill_mask, Tensor) and not all(isinstance(m, Tensor) for m in infill_mask):
            raise DllmError("The infill mask is no tensor.", "Give bool [batch, length], or one 1-D tensor per row.")
        shapes = [tuple(r.shape) for r in rows], [tuple(m.shape) for m in infill_mask]
        if shapes[0] != shapes[1]:
            raise DllmError(
                f"The infill mask does not fit the ids: rows of shape {shapes[1]} and {shapes[0]}.",
                "Give one boolean per token.",
            )
        return cls._padded(list(rows), [~m.bool() for m in infill_mask])

    @classmethod
    def _padded(cls, rows: Sequence[Tensor], fixed: Sequence[Tensor]) -> Canvas:
        return cls(
            pad_sequence(list(rows), batch_first=True),
            pad_sequence([f.to(row.device) for f, row in zip(fixed, rows, strict=True)], batch_first=True),
            tuple(len(row) for row in rows),
        )

    def row(self, index: int) -> Canvas:
        """Return one row without its padding."""
        length = self.lengths[index]
        return Canvas(
            self.input_ids_BC[index : index + 1, :length], self.fixed_BC[index : index + 1, :length], (length,)
        )

    @property
    def is_padded(self) -> bool:
        return any(n < self.input_ids_BC.shape[1] for n in self.lengths)

    @property
    def real_BC(self) -> Tensor:
        """Bool; True where a row has a token, False on padding."""
        length_B = torch.tensor(self.lengths, device=self.input_ids_BC.device)
        return torch.arange(self.input_ids_BC.shape[1], device=length_B.device) < length_B[:, None]

    @property
    def to_fill_BC(self) -> Tensor:
        """Bool; True where a token is to be generated."""
        return self.real_BC & ~self.fixed_BC

    def check(self, num_rows: int, *, first_token_given: bool) -> None:
        """Refuse what cannot be decoded.

        Args:
            num_rows: rows of the embedding table.
            first_token_given: the alignment is shifted, so that nothing predicts the first position.

        Raises:
            DllmError: shapes that do not fit, an empty row, an id outside the table, nothing to predict a token from.
        """
        shape = tuple(self.input_ids_BC.shape)
        if len(shape) != 2 or tuple(self.fixed_BC.shape) != shape or len(self.lengths) != shape[0]:
            raise DllmError(
                f"Ids of shape {shape}, fixed of shape {tuple(self.fixed_BC.shape)} and {len(self.lengths)} lengths do "
                "not make a canvas.",
                "Give ids and fixed as [batch, length] and one length per row.",
            )
        if any(not 1 <= n <= shape[1] for n in self.lengths):
            raise DllmError(f"Row lengths {list(self.lengths)} do not fit a canvas of {shape[1]}.", "Give 1..length.")
        given = self.input_ids_BC[self.fixed_BC & self.real_BC]
        wrong = given[(given < 0) | (given >= num_rows)]
        if wrong.numel():
            raise DllmError(
                f"Given token id {int(wrong[0])} lies outside the model's 0..{num_rows - 1}.",
                "Tokenise with the tokenizer that was saved with the model.",
            )
        if first_token_given and not bool(self.fixed_BC[:, 0].all()):
            row = int((~self.fixed_BC[:, 0]).nonzero()[0])
            raise DllmError(
                f"Row {row} has no token at position 0, and with shifted alignment nothing predicts it.",
                "Begin every row with a given token, such as BOS or one token of the prompt.",
            )


def _check_rows(rows: Tensor | Sequence[Tensor]) -> None:
    if not (isinstance(rows, Tensor) and rows.dim() > 0) and not isinstance(rows, list | tuple):
        raise DllmError(
            f"{type(rows).__name__} is no batch of token ids.",
            "Give int64 [batch, length], such as tokenizer(text, return_tensors='pt').input_ids, or 1-D rows.",
        )
    if len(rows) == 0:
        raise DllmError("There is no row to decode.", "Give at least one sequence of token ids.")
    for i, row in enumerate(rows):
        if not isinstance(row, Tensor):
            raise DllmError(f"Row {i} is a {type(row).__name__}, not a tensor.", "Give it as torch.tensor(row).")
        if row.dim() != 1:
            raise DllmError(
                f"Row {i} has shape {tuple(row.shape)}, not one dimension.", "Give int64 [batch, length] or 1-D rows."
            )
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise DllmError(f"Row {i} holds {row.dtype}, not token ids.", "Give integers, best int64.")
