"""What a decode leaves behind besides its text, on request."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CacheDrift:
    """How far cached passes were from passes over the whole canvas, on the canvases that were met.

    Attributes:
        max_logit_difference: largest |difference| of a logit of a candidate.
        changed_tokens: candidates whose most probable token was another one.
        num_tokens: candidates compared.
    """

    max_logit_difference: float
    changed_tokens: int
    num_tokens: int


@dataclass(frozen=True)
class DenoisingStep:
    """One pass of a decode. B batch, C canvas length, padding included.

    Attributes:
        canvas_BC: int64; what the network read.
        drafted_BC: int64; the canvas with what it proposed.
        accepted_BC: bool; proposals that stand.
        score_BC: fp32; the acceptance rule's score, NaN where nothing was proposed.
    """

    canvas_BC: Tensor
    drafted_BC: Tensor
    accepted_BC: Tensor
    score_BC: Tensor

    def cpu(self) -> DenoisingStep:
        """Return the same on the CPU."""
        return DenoisingStep(self.canvas_BC.cpu(), self.drafted_BC.cpu(), self.accepted_BC.cpu(), self.score_BC.cpu())
