"""What a cache changes: the same canvas run whole beside every cached pass. M predicted positions, D hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.methods.protocol import CacheDrift
from dllm_core.samplers.denoise import CHUNK_ROWS

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.samplers.blocks import Span
    from dllm_core.samplers.denoisers import Denoiser


class DriftMeter:
    """Adds up differences over the passes of a decode.

    Args:
        backbone: reads the states out.
        reference: makes the passes that are compared with.
    """

    def __init__(self, backbone: Backbone, reference: Denoiser) -> None:
        self.backbone, self.reference = backbone, reference
        self._largest = torch.zeros((), device=backbone.device)
        self._changed = torch.zeros((), dtype=torch.long, device=backbone.device)
        self._compared = 0

    def add(self, canvas_BC: Tensor, spans: Sequence[Span | None], where_M: Tensor, hidden_MD: Tensor) -> None:
        """Compare the states of a cached pass with those of a whole one."""
        whole_MD = self.reference.predict(canvas_BC, spans, where_M)
        num_tokens = self.backbone.contract.num_tokens
        for start in range(0, len(hidden_MD), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            found_MV = self.backbone.logits(hidden_MD[rows])[:, :num_tokens]
            expected_MV = self.backbone.logits(whole_MD[rows])[:, :num_tokens]
            self._largest = torch.maximum(self._largest, (found_MV - expected_MV).abs().amax())
            self._changed += (found_MV.argmax(-1) != expected_MV.argmax(-1)).sum()
        self._compared += len(hidden_MD)

    def result(self) -> CacheDrift:
        """Return the sums."""
        return CacheDrift(float(self._largest), int(self._changed), self._compared)
