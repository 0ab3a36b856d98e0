"""A left-to-right decode seen from outside, token by token. B prompts, C longest prompt and its new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_core.samplers.streaming import DraftStream, OnDraft, Streamer

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.methods.protocol import GenerationOutput


class Watcher:
    """Reports every token of a decode that runs inside its `with` block.

    A pass is fed the tokens that were chosen before it, so the model's own input says what is final; those of the last
    pass are fed to nobody and come with `finish`.

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
        self._decoder, self._on_draft = backbone.decoder, on_draft
        self._stream = DraftStream(streamer, len(prompts)) if streamer is not None else None
        mask_id = backbone.contract.mask_token_id
        rows = [torch.cat((p.cpu(), torch.full((max_new_tokens,), mask_id))) for p in prompts]
        self._canvas_BC = pad_sequence(rows, batch_first=True, padding_value=mask_id)
        self._length_B = torch.tensor([len(p) for p in prompts])
        self._passes = 0

    def __enter__(self) -> Self:
        if self._stream:
            self._stream.commit(self._canvas_BC[0], int(self._length_B[0]))
        self._hook = self._decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def _before_pass(self, decoder: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if self._passes:
            place_B1 = (self._length_B + self._passes - 1)[:, None]
            self._canvas_BC.scatter_(1, place_B1, inputs["input_ids"][:, -1:].cpu())
            self._report(self._length_B + self._passes)
        self._passes += 1

    def _report(self, stop_B: Tensor) -> None:
        if self._on_draft:
            committed_BC = torch.arange(self._canvas_BC.shape[1]) < stop_B[:, None]
            self._on_draft(self._canvas_BC.clone(), committed_BC)
        if self._stream:
            self._stream.commit(self._canvas_BC[0], int(stop_B[0]))

    def finish(self, output: GenerationOutput) -> None:
        """Report what was returned, and close the stream."""
        for row, sequence in enumerate(output.sequences):
            self._canvas_BC[row, : len(sequence)] = sequence
        self._report(torch.tensor([len(sequence) for sequence in output.sequences]))
        if self._stream:
            self._stream.end()
