"""Options of trajectory distillation (arXiv:2601.07568) on an aligned student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dllm_core.methods.repr_align.options import Options as ReprAlignOptions
from dllm_core.methods.requirements import PrefixNeed, Requirements, TrajectoryNeed


class Options(ReprAlignOptions):
    """Options of `repr_align_trajectory`.

    Attributes:
        prefix_cell: the cell whose first part this one branches from; its options must equal the ones inherited here.
        prefix_share: part of the budget spent before the branch, in (0, 1).
        mode: where the commit order comes from: `student`, `ar_difficulty`, `left_to_right` or `random`.
        responses: training sequences whose order is extracted and that the trajectory phase then loops over.
        commit_steps: forwards per response during extraction; 0 is one token per forward.
        extraction_block: decoding block of the extraction, in tokens.
        ratio_max: upper end of the mask ratio rho inside the training block, in (0, 1].
        block_sizes: training block sizes in tokens, each for an equal part of the phase.
        entropy_weight: weight of the entropy term on positions that are masked and already right.
        entropy_temperature: temperature of that entropy.
        random_mask_fraction: share of sequences that keep the random-mask objective in the trajectory phase.
    """

    prefix_cell: str = "repr_align_all"
    prefix_share: float = Field(default=0.4, gt=0, lt=1)
    mode: Literal["student", "ar_difficulty", "left_to_right", "random"] = "student"
    responses: int = Field(default=64, ge=1)
    commit_steps: int = Field(default=8, ge=0)
    extraction_block: int = Field(default=32, ge=1)
    ratio_max: float = Field(default=0.8, gt=0, le=1)
    block_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(16, 24, 32), min_length=1)
    entropy_weight: float = Field(default=1.0, ge=0)
    entropy_temperature: float = Field(default=0.5, gt=0)
    random_mask_fraction: float = Field(default=0.25, ge=0, le=1)

    def requirements(self, num_layers: int) -> Requirements:
        """Anchors as in `repr_align`, the shared prefix, and commit orders for the fixed subset."""
        return Requirements(
            anchors=super().requirements(num_layers).anchors,
            trajectories=TrajectoryNeed(
                mode=self.mode,
                responses=self.responses,
                commit_steps=self.commit_steps,
                block_size=self.extraction_block,
            ),
            prefix=PrefixNeed(cell=self.prefix_cell, share=self.prefix_share),
        )

    def training_positions(self, prompt: int, response: int) -> int:
        """Return twice the sequence: after the branch both of its views are forwarded in one pass."""
        return 2 * (prompt + response)

    def cost_factor(self) -> float:
        """Two views of every sequence that is not random-masked, after the branch."""
        views = 2.0 - self.random_mask_fraction
        return (self.prefix_share + (1.0 - self.prefix_share) * views) * super().cost_factor()
