"""Options of representation alignment (arXiv:2605.06885)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dllm_core.methods.layer_rule import LayerRule, layer_names
from dllm_core.methods.random_mask.options import Options as RandomMaskOptions
from dllm_core.methods.requirements import AnchorNeed, Requirements


class Options(RandomMaskOptions):
    """Options of `repr_align_4`, `repr_align_all` and of the student phase of `repr_align_trajectory`.

    Attributes:
        layers: `quarters`, `all`, or a list of layer numbers from 0 (embedding output) to N (last block, post-norm).
        weight: lambda of the alignment term.
        token_fraction: share of the aligned positions used in each step, drawn anew; an unbiased estimate.
        teacher: `cache` reads the frozen model's states from the anchor store; `live` runs the frozen model.
    """

    layers: LayerRule = "all"
    weight: float = Field(default=10.0, ge=0)
    token_fraction: float = Field(default=1.0, gt=0, le=1)
    teacher: Literal["cache", "live"] = "cache"

    def requirements(self, num_layers: int) -> Requirements:
        """Ask for the teacher's states at the rows that predict response tokens; checks the layers in any case."""
        layers = layer_names(self.layers, num_layers)
        if self.teacher == "live" or self.weight == 0:
            return Requirements()
        return Requirements(anchors=AnchorNeed(layers=layers, positions="response_predictors"))

    def cost_factor(self) -> float:
        """A live teacher adds one forward to a forward and backward (1/3); cached states cost next to nothing."""
        return 1.0 + (1.0 / 3.0 if self.teacher == "live" and self.weight > 0 else 0.0)
