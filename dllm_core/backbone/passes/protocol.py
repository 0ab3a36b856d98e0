"""What a pass of a decoder takes and gives.

B batch, L tokens run, M rows asked for (of a mask: visible keys), D hidden, W ids that stand for tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.backbone.slot_cache import SlotCache


class Asked(NamedTuple):
    """What `DecoderPass.__call__` was given."""

    input_ids_BL: Tensor
    row_M: Tensor | None = None
    position_BL: Tensor | None = None
    mask_B1LM: Tensor | None = None
    cache: SlotCache | None = None


class DecoderPass(ABC):
    """Runs a decoder both ways on a canvas, whole or in part. Without gradients.

    Args:
        backbone: the model.
        head_WD: rows of the output head that stand for tokens, laid out for products with the states.
    """

    def __init__(self, backbone: Backbone, head_WD: Tensor) -> None:
        self.backbone, self.head_WD = backbone, head_WD

    @torch.no_grad()
    def __call__(
        self,
        input_ids_BL: Tensor,
        *,
        row_M: Tensor | None = None,
        position_BL: Tensor | None = None,
        attention_mask_B1LM: Tensor | None = None,
        cache: SlotCache | None = None,
    ) -> Tensor:
        """Return the states after the final norm: [B, L, D], or [M, D] of the rows asked for.

        Args:
            input_ids_BL: int64.
            row_M: int64; flat indices b * L + l.
            position_BL: positions of the tokens, [B or 1, L]; None: as for `Backbone.hidden`.
            attention_mask_B1LM: bool, True where query sees key; None is everywhere.
            cache: as for `Backbone.hidden`.

        Raises:
            DllmError: so many tokens do not fit the model's positions, or the cache's slots.
        """
        if cache is None:
            self.backbone.check_length(input_ids_BL.shape[1])
        else:
            cache.require_room(input_ids_BL.shape[1])
        return self.states(Asked(input_ids_BL, row_M, position_BL, attention_mask_B1LM, cache))

    @abstractmethod
    def states(self, asked: Asked) -> Tensor:
        """Return what `__call__` returns, for tokens that fit."""


def real_head(backbone: Backbone) -> Tensor:
    """Return the rows of the output head that stand for tokens, [W, D]; leaving the others out is less than masking."""
    return backbone.head_weight_VD[: backbone.contract.num_tokens].detach()
