"""The pass through transformers' modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dllm_core.backbone.passes.protocol import real_head

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone


class PlainPass:
    """Runs the model's own modules; see `protocol.DecoderPass`.

    Args:
        backbone: the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.head_WD = backbone, real_head(backbone)

    def __call__(self, input_ids_BL: Tensor, *, row_M: Tensor | None = None, **options: Any) -> Tensor:
        """Return states; see `protocol.DecoderPass`."""
        states_BLD = self.backbone.hidden(input_ids_BL, causal=False, **options)
        return states_BLD if row_M is None else states_BLD.flatten(0, 1).index_select(0, row_M)
