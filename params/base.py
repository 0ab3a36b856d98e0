"""What all sections of the settings are made of: the frozen model and the kinds of numbers. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


def _not_a_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a switch is no number")
    return value


Int = Annotated[int, BeforeValidator(_not_a_switch)]
Float = Annotated[float, BeforeValidator(_not_a_switch)]
PositiveInt = Annotated[Int, Field(ge=1)]
Natural = Annotated[Int, Field(ge=0)]
Seed = Annotated[Int, Field(ge=0, le=2**32 - 1)]
"""What every generator takes that is ever seeded with it."""
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
HalfOpen = Annotated[Float, Field(ge=0, lt=1)]
OpenFraction = Annotated[Float, Field(gt=0, lt=1)]
MaskRatio = Annotated[Float, Field(gt=0, le=1)]
Dtype = Literal["auto", "fp32", "bf16"]


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys are errors, numbers are finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any, info: ValidationInfo) -> Any:
        """Take a single number or name for a list of one: `--set bench.steps=8`."""
        field = cls.model_fields[info.field_name or ""]
        wants_list = "tuple" in str(field.annotation) and not isinstance(value, (list, tuple, dict, set, type(None)))
        return [value] if wants_list else value
