"""Options of block-causal diffusion (arXiv:2503.09573)."""

from __future__ import annotations

from pydantic import Field

from dllm_core.methods.repr_align.options import Options as ReprAlignOptions
from dllm_core.methods.requirements import Capabilities

USUAL_WINDOW = (32, 128)
"""Prompt and response tokens of the window that `cost_factor` assumes; what a run reports is counted."""


class Options(ReprAlignOptions):
    """Options of `block_causal`; those inherited mean what they mean in `random_mask` and `repr_align`.

    Attributes:
        block_size: tokens of a block, counted from the beginning of the document. 32, as in Fast-dLLM v2
            (arXiv:2509.26328): a response of 128 tokens can then be decoded in as few as 4 passes, and the bound is on
            the blocks that `eval.block_size` gives the other cells.
        complementary: forward a second noisy copy with the complementary mask, so that every response token is
            predicted once in every step; half as many passes more.
        weight: lambda of the alignment of clean rows with the frozen model; 0 leaves it out.
    """

    block_size: int = Field(default=32, ge=1)
    complementary: bool = False
    weight: float = Field(default=0.0, ge=0)

    def capabilities(self) -> Capabilities:
        """Unmasking inside blocks with an exact cache: another computation than that of the bidirectional cells."""
        return Capabilities(
            nelbo=True,
            unmasking=True,
            infill=True,
            streaming=True,
            exact_cache=True,
            bound_block_size=self.block_size,
        )

    def training_positions(self, prompt: int, response: int) -> int:
        """Return the columns of [clean | noisy]: neither the last block clean nor blocks without a response noisy."""
        length = prompt + response
        clean = (length - 1) // self.block_size * self.block_size
        noisy = length - prompt // self.block_size * self.block_size
        return clean + (2 if self.complementary else 1) * noisy

    def cost_factor(self) -> float:
        """Return the rows of the layout relative to one pass over the usual window; a live teacher adds its pass."""
        return self.training_positions(*USUAL_WINDOW) / sum(USUAL_WINDOW) + super().cost_factor() - 1.0
