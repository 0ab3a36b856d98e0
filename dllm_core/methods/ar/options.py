"""Options of the autoregressive reference rows."""

from __future__ import annotations

from dllm_core.methods.requirements import Capabilities, RoomOptions


class Options(RoomOptions):
    """Options of `ar` and `ar_tuned`.

    Attributes:
        tuned: True fine-tunes the model as an autoregressive one on the grid's data and budget; False only measures it.
    """

    tuned: bool

    def capabilities(self) -> Capabilities:
        """Exact likelihood and cached decoding; trains only when `tuned`."""
        return Capabilities(trains=self.tuned, causal=True, exact_likelihood=True, streaming=True, exact_cache=True)
