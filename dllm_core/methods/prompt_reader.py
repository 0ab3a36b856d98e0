"""Prompts read through the frozen language model when generating. B batch, P prompt tokens, D hidden."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.errors import DllmError

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone


class PromptReader:
    """Keeps the language model, loaded at the first use. No module: it is no part of what is trained or saved.

    Args:
        directory: where the language model lies; None if it is not at hand.
        layer: whose states are read.
        model: the language model, where it is in memory already.
    """

    def __init__(self, directory: Path | None, layer: str, model: Backbone | None = None) -> None:
        self.directory, self.layer, self.model = directory, layer, model

    def loaded(self, dtype: torch.dtype, device: torch.device) -> Backbone:
        """Return the language model.

        Raises:
            DllmError: it is not at hand.
        """
        from dllm_core.backbone.backbone import Backbone

        if self.model is None:
            if self.directory is None:
                raise DllmError(
                    "This cell reads prompts through the language model, which is not at hand.",
                    "Load the cell from where training wrote it, or take prompt_encoder: embedding where it exists.",
                )
            self.model = Backbone.from_pretrained(self.directory, dtype=dtype, device=device).eval()
        return self.model

    def states(self, ids_BP: Tensor, visible_BP: Tensor, dtype: torch.dtype) -> Tensor:
        """Return causal states [B, P, D] of prompts, one pass; what stands in padding means nothing.

        Args:
            ids_BP: prompts, padded on either side.
            visible_BP: bool; tokens that are no padding.
            dtype: to compute in.

        Raises:
            DllmError: the language model is not at hand.
        """
        model = self.loaded(dtype, ids_BP.device)
        position_BP = (visible_BP.cumsum(1) - 1).clamp(min=0)
        document_BP = torch.where(visible_BP, 0, -1)
        with model.capture([self.layer]) as states:
            model.hidden(ids_BP, causal=True, document_BL=document_BP, position_BL=position_BP)
        return states[self.layer]
