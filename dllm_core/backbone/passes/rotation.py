"""Tables of rotary positions (arXiv 2104.09864) in the form in which passes turn heads.

B batch, L tokens, H head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.backbone.slot_cache import SlotCache


class Rotation(NamedTuple):
    """Tables [B or 1, L, 1, H]: turned = x * cos + (x with the halves of a head exchanged) * sin."""

    cos: Tensor
    sin: Tensor

    def scaled(self, scale: float) -> Rotation:
        """Return tables that scale as they turn."""
        return Rotation(self.cos * scale, self.sin * scale)


class Rotations:
    """Makes a decoder's tables, and keeps those of the positions from 0, which every step of a decode asks for.

    Args:
        backbone: the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._rotary: Any = backbone.decoder.rotary_emb
        self._like = backbone.embedding_weight_VD.detach()
        self._kept: tuple[int, Rotation] | None = None

    def at(self, position_BL: Tensor) -> Rotation:
        """Return the tables of positions, [B or 1, L]."""
        cos_BLH, sin_BLH = self._rotary(self._like, position_BL)
        first, second = sin_BLH.chunk(2, dim=-1)
        return Rotation(cos_BLH[:, :, None], torch.cat((-first, second), dim=-1)[:, :, None])

    def of_pass(self, length: int, position_BL: Tensor | None, cache: SlotCache | None) -> Rotation:
        """Return the tables of a pass over `length` tokens; where no positions are given, see `Backbone.hidden`."""
        if position_BL is None and cache is not None:
            position_BL = cache.window.position_BL(length, self._like.device)
        if position_BL is not None:
            return self.at(position_BL)
        if self._kept is None or self._kept[0] != length:
            self._kept = length, self.at(torch.arange(length, device=self._like.device)[None])
        return self._kept[1]
