"""When a row needs no more passes: its text has ended, or its drafts have come to rest. B batch, C canvas length."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_core.samplers.acceptance import Draft


class EndOfText:
    """Finds the end-of-sequence token that ends a row.

    An EOS ends the text only where nothing given follows it, so that text infilled in the middle is never cut.

    Args:
        eos_ids: ids that end a sequence, int64.
        real_BC: bool; tokens, not padding.
        to_fill_BC: bool; places to fill.
    """

    def __init__(self, eos_ids: Tensor, real_BC: Tensor, to_fill_BC: Tensor) -> None:
        self.eos_ids = eos_ids
        given_BC = (real_BC & ~to_fill_BC).long()
        given_after_BC = given_BC.sum(-1, keepdim=True) - given_BC.cumsum(-1)
        self.may_end_BC = to_fill_BC & (given_after_BC == 0)

    def position_B(self, canvas_BC: Tensor, masked_BC: Tensor) -> Tensor:
        """Return the position of the first EOS that ends each row, C where there is none."""
        is_end_BC = self.may_end_BC & ~masked_BC & (canvas_BC[..., None] == self.eos_ids).any(-1)
        place_C = torch.arange(is_end_BC.shape[1], device=is_end_BC.device)
        return torch.where(is_end_BC, place_C, is_end_BC.shape[1]).amin(-1)


class Stability:
    """Counts for how many passes the drafts of a row's block have been the same.

    Args:
        threshold: that many repetitions are enough.
        confidence: mean entropy of the candidates that they must be below besides, in nats; None for no such demand.
    """

    def __init__(self, threshold: int, confidence: float | None) -> None:
        self.threshold, self.confidence = threshold, confidence
        self._drafted_BC: Tensor | None = None
        self._block_B: Tensor | None = None
        self._repeated_B: Tensor | None = None

    def at_rest_B(self, drafted_BC: Tensor, active_BC: Tensor, block_B: Tensor, draft: Draft) -> Tensor:
        """Return the rows whose drafts may stand as they are, bool [B]; called once per pass.

        Args:
            drafted_BC: the canvas with the drafts of this pass.
            active_BC: bool; positions of the active block.
            block_B: the active block of each row.
            draft: of this pass; with entropies where there is a demand on them.
        """
        repeated_B = torch.zeros_like(block_B)
        if self._drafted_BC is not None and self._block_B is not None and self._repeated_B is not None:
            same_B = ((drafted_BC == self._drafted_BC) | ~active_BC).all(-1) & (block_B == self._block_B)
            repeated_B = torch.where(same_B, self._repeated_B + 1, 0)
        self._drafted_BC, self._block_B, self._repeated_B = drafted_BC, block_B, repeated_B
        rest_B = repeated_B >= self.threshold
        if self.confidence is not None:
            assert draft.entropy_BC is not None
            total_B = torch.where(draft.candidate_BC, draft.entropy_BC, 0).sum(-1)
            rest_B &= total_B < self.confidence * draft.candidate_BC.sum(-1)
        return rest_B
