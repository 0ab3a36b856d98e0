"""What a cache changes: the same canvas run whole beside every cached pass. M predicted positions, D hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.samplers.denoise import CHUNK_ROWS, read_out
from dllm_core.samplers.record import CacheDrift

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.samplers.blocks import Span
    from dllm_core.samplers.denoisers import Denoiser


class DriftMeter:
    """Adds up differences over the passes of a decode.

    Args:
        backbone: reads the states out.
        reference: makes the passes that are compared with.
        guidance_scale: 1 without guidance.
    """

    def __init__(self, backbone: Backbone, reference: Denoiser, guidance_scale: float = 1.0) -> None:
        self.backbone, self.reference, self.scale = backbone, reference, guidance_scale
        self._largest = torch.zeros((), device=backbone.device)
        self._changed = torch.zeros((), dtype=torch.long, device=backbone.device)
        self._compared = 0

    def add(self, canvas_BC: Tensor, spans: Sequence[Span | None], where_M: Tensor, hidden_MD: Tensor) -> None:
        """Compare the states of a cached pass (with guidance, twice M of them) with those of a whole one."""
        whole_MD = self.reference.predict(canvas_BC, spans, where_M)
        whole, found = (states_MD.split(len(where_M)) for states_MD in (whole_MD, hidden_MD))
        num_tokens = self.backbone.contract.num_tokens
        for start in range(0, len(where_M), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            found_MV, expected_MV = (
                read_out(self.backbone, states[0], states[1] if len(states) > 1 else None, self.scale, rows)[
                    :, :num_tokens
                ]
                for states in (found, whole)
            )
            self._largest = torch.maximum(self._largest, (found_MV - expected_MV).abs().amax())
            self._changed += (found_MV.argmax(-1) != expected_MV.argmax(-1)).sum()
        self._compared += len(where_M)

    def result(self) -> CacheDrift:
        """Return the sums."""
        return CacheDrift(float(self._largest), int(self._changed), self._compared)
