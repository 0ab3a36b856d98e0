"""A row's options as its room validates them. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dllm_core.methods.registry import room_options

if TYPE_CHECKING:
    from dllm_core.methods.requirements import RoomOptions
    from params.schema import RowSpec


def options_of(row: RowSpec) -> RoomOptions:
    """Return the validated options of a row's room; the plan has explained by now what is wrong with them."""
    return room_options(row.cell.method).model_validate(row.cell.options)
