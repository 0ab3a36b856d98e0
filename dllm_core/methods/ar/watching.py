"""A left-to-right decode seen from outside, token by token. B prompts, C longest prompt and its new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_core.samplers.streaming import DraftStream, OnDraft, Streamer

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone


class Watcher:
    """Reports every token of a decode that it is given to; a text that has ended does not grow any more.

    Args:
        backbone: the model that decodes.
        prompts: 1-D ids.
        max_new_tokens: most tokens a prompt is continued by.
        on_draft: called after each pass with (canvas [B, C], committed [B, C]); the mask token stands where nothing
            does yet.
        streamer: transformers' streamer protocol, one prompt only.

    Raises:
        DllmError: a streamer for several prompts.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        *,
        on_draft: OnDraft | None = None,
        streamer: Streamer | None = None,
    ) -> None:
        self._on_draft = on_draft
        self._stream = DraftStream(streamer, len(prompts)) if streamer is not None else None
        mask_id = backbone.contract.mask_token_id
        rows = [torch.cat((p.cpu(), torch.full((max_new_tokens,), mask_id))) for p in prompts]
        self._canvas_BC = pad_sequence(rows, batch_first=True, padding_value=mask_id)
        self._stop_B = torch.tensor([len(p) for p in prompts])
        self._send()

    def on_token(self, token_B: Tensor, alive_B: Tensor) -> None:
        """Take what a pass chose; see `ar_decode.OnToken`."""
        row_A = alive_B.nonzero()[:, 0]
        self._canvas_BC[row_A, self._stop_B[row_A]] = token_B[row_A]
        self._stop_B += alive_B
        if self._on_draft:
            committed_BC = torch.arange(self._canvas_BC.shape[1]) < self._stop_B[:, None]
            self._on_draft(self._canvas_BC.clone(), committed_BC)
        self._send()

    def _send(self) -> None:
        if self._stream:
            self._stream.commit(self._canvas_BC[0], int(self._stop_B[0]))

    def finish(self) -> None:
        """Close the stream."""
        if self._stream:
            self._stream.end()
