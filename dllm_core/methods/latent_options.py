"""What the options and sizes of latent rooms share. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, model_validator

from dllm_core.errors import DllmError, did_you_mean
from dllm_core.methods.layer_rule import layer_from_end
from dllm_core.methods.requirements import BaseShape, RoomOptions

Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
"""A share of something that cannot be left out."""
Decay = Annotated[float, Field(ge=0, lt=1)]

S = TypeVar("S", bound=BaseModel)


def named_sizes(shape: str | S, named: Mapping[str, S], room: str) -> S:
    """Return sizes, looked up where a name was given.

    Raises:
        DllmError: unknown name.
    """
    if not isinstance(shape, str):
        return shape
    if shape not in named:
        raise DllmError(f"Unknown {room} shape '{shape}'.", did_you_mean(shape, named))
    return named[shape]


class FrozenStatesOptions(RoomOptions):
    """Options of a room that reads one layer of the frozen language model.

    Attributes:
        layer: hidden state of the frozen model that is read, counted from the end (-1 is after the final norm).
        anchor_sequences: distinct training sequences that are presented, over and over; None: all of them.
    """

    layer: int = Field(default=-3, le=-1)
    anchor_sequences: PositiveInt | None = None

    def layer_name(self, num_layers: int) -> str:
        """Return the layer's name in the anchor store.

        Raises:
            DllmError: the model has no such layer.
        """
        return layer_from_end(self.layer, num_layers)

    @property
    def keeps_language_model(self) -> bool:
        """Whether a finished cell brings a copy of the frozen language model, since generating runs it."""
        raise NotImplementedError(f"{type(self).__module__} must say whether generating runs the language model")


class LatentOptions(FrozenStatesOptions):
    """Options of a room that trains networks of its own on frozen states (`LatentMethod`).

    Attributes:
        start: `linear` starts from closed forms, which the networks refine; `random` starts from noise.
        start_sequences: training sequences from which statistics and closed forms are computed.
        token_fraction: share of a sequence's tokens in the token loss, drawn anew each step; an unbiased estimate.
        ema_decay: of the averaged weights that generate; warmed up.
        guidance: scale w of classifier-free guidance, u + w (c - u) of the predictions without and with what is
            conditioned on; 1 needs no second pass.
    """

    start: Literal["linear", "random"] = "linear"
    start_sequences: PositiveInt = 512
    token_fraction: Fraction = 0.25
    ema_decay: Decay = 0.999
    guidance: NonNegativeFloat = 1.0

    def facts(self, base: BaseShape) -> dict[str, Any]:
        """Return what a finished cell's config.json states of its options; loading under others is refused."""
        return {"layer": self.layer_name(base.layers)}


class HeadedSizes(BaseModel):
    """Widths and depths of networks with attention: fields NAME_width and NAME_depth.

    Attributes:
        head_width: of every attention head.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    head_width: PositiveInt = 64

    @model_validator(mode="after")
    def _widths_split_into_heads(self) -> Self:
        for name in type(self).model_fields:
            width = getattr(self, name)
            if name.endswith("_width") and name != "head_width" and width % (2 * self.heads(width)):
                raise ValueError(
                    f"{name} = {width} does not split into {self.heads(width)} heads of even width; "
                    f"give a multiple of head_width = {self.head_width}"
                )
        return self

    def heads(self, width: int) -> int:
        """Return the attention heads of a network of that width."""
        return max(1, width // self.head_width)

    def of(self, network: str) -> tuple[int, int, int]:
        """Return (width, depth, heads) of a network."""
        width, depth = getattr(self, f"{network}_width"), getattr(self, f"{network}_depth")
        return width, depth, self.heads(width)
