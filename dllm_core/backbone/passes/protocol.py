"""What a pass of a decoder takes and gives.

B batch, L tokens run, M rows asked for (of a mask: visible keys), D hidden, W ids that stand for tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.backbone.slot_cache import SlotCache


class DecoderPass(Protocol):
    """Runs a decoder both ways on a canvas, whole or in part.

    Attributes:
        head_WD: rows of the output head that stand for tokens, laid out for products with the states.
    """

    head_WD: Tensor

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
            position_BL: with a cache, positions of the tokens, [B or 1, L].
            attention_mask_B1LM: bool, True where query sees key; None is everywhere.
            cache: as for `Backbone.hidden`.
        """


def real_head(backbone: Backbone) -> Tensor:
    """Return the rows of the output head that stand for tokens, [W, D]; leaving the others out is less than masking."""
    return backbone.head_weight_VD[: backbone.contract.num_tokens].detach()


def require_fit(backbone: Backbone, length: int, cache: SlotCache | None) -> None:
    """Check that so many tokens fit the model's positions, or the cache's slots.

    Raises:
        DllmError: they do not.
    """
    if cache is None:
        backbone.check_length(length)
    else:
        cache.require_room(length)
