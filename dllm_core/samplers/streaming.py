"""Showing text while it forms: transformers' streamer protocol and a plain callback.

A streamer gets `put(prompt)`, then after each pass `put_draft(tokens)` with what the model would say now, `put` with
text that has become final (from left to right, block by block) and `end()`. All that was put, joined, is the returned
sequence. `transformers.TextDiffusionStreamer` fits; one without `put_draft` gets the final text only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from dllm_core.errors import DllmError

OnDraft = Callable[[Tensor, Tensor], None]


class Streamer(Protocol):
    """What `generate` asks of a streamer; `put_draft(value)` is optional."""

    def put(self, value: Tensor) -> None:
        """Take final tokens, int64 [1, n] on CPU."""

    def end(self) -> None:
        """Learn that nothing follows."""


class DraftStream:
    """Feeds one row to a streamer.

    Args:
        streamer: takes the tokens.
        num_rows: rows of the batch; a streamer shows one.

    Raises:
        DllmError: a batch of several rows.
    """

    def __init__(self, streamer: Streamer, num_rows: int) -> None:
        if num_rows != 1:
            raise DllmError(
                f"A streamer shows one sequence, not a batch of {num_rows}.",
                "Generate one prompt at a time, or pass on_draft, which sees the whole canvas.",
            )
        self.streamer = streamer
        self.sent = 0

    def draft(self, drafted_C: Tensor, stop: int) -> None:
        """Show what stands and what is proposed from the last final token to position `stop`."""
        put_draft = getattr(self.streamer, "put_draft", None)
        if put_draft is not None and stop > self.sent:
            put_draft(drafted_C[None, self.sent : stop].cpu())

    def commit(self, canvas_C: Tensor, stop: int) -> None:
        """Send the tokens before position `stop`, which are final."""
        if stop > self.sent:
            self.streamer.put(canvas_C[None, self.sent : stop].cpu())
            self.sent = stop

    def end(self) -> None:
        """Close the stream."""
        self.streamer.end()
