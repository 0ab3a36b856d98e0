"""Options of random-mask diffusion."""

from __future__ import annotations

from pydantic import Field

from dllm_core.methods.requirements import Capabilities, RoomOptions


class Options(RoomOptions):
    """Options of `random_mask`, and the base of every token-space room's options.

    Attributes:
        path_weight: weight of the path term sg(p) * CE; 0 leaves the plain bound.
    """

    path_weight: float = Field(default=1.0, ge=0)

    def capabilities(self) -> Capabilities:
        """A bidirectional network that decodes by iterative unmasking; all such cells run the same network."""
        return Capabilities(nelbo=True, unmasking=True, infill=True, streaming=True, speed_group="token_space")
