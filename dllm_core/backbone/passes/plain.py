"""The pass through transformers' modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dllm_core.backbone.passes.protocol import Asked, DecoderPass, real_head

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone


class PlainPass(DecoderPass):
    """Runs the model's own modules.

    Args:
        backbone: the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, real_head(backbone))

    def states(self, asked: Asked) -> Tensor:
        """Return states; see `DecoderPass`."""
        states_BLD = self.backbone.hidden(
            asked.input_ids_BL,
            causal=False,
            position_BL=asked.position_BL,
            attention_mask_B1LM=asked.mask_B1LM,
            cache=asked.cache,
        )
        return states_BLD if asked.row_M is None else states_BLD.flatten(0, 1).index_select(0, asked.row_M)
