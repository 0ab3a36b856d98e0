"""Prompts read through the language model (`prompt_encoder: backbone` alone). B batch, P prompt tokens, D hidden."""

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
    """

    def __init__(self, directory: Path | None, layer: str) -> None:
        self.directory, self.layer = directory, layer
        self.model: Backbone | None = None

    def states(self, ids_BP: Tensor, visible_BP: Tensor, dtype: torch.dtype) -> Tensor:
        """Return causal states [B, P, D] of prompts.

        Args:
            ids_BP: prompts, padded on the left.
            visible_BP: bool; tokens that are no padding.
            dtype: to compute in.

        Raises:
            DllmError: the language model is not at hand.
        """
        from dllm_core.backbone.backbone import Backbone

        if self.model is None:
            if self.directory is None:
                raise DllmError(
                    "This cell reads prompts through the language model, which is not at hand.",
                    "Load the cell from the directory that training wrote, or use prompt_encoder: embedding.",
                )
            self.model = Backbone.from_pretrained(self.directory, dtype=dtype, device=ids_BP.device)
        position_BP = (visible_BP.cumsum(1) - 1).clamp(min=0)
        document_BP = torch.where(visible_BP, 0, -1)
        with self.model.capture([self.layer]) as states:
            self.model.hidden(ids_BP, causal=True, document_BL=document_BP, position_BL=position_BP)
        return states[self.layer]
