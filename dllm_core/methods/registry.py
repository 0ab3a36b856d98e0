"""Rooms are found by module name: every Metaflow task is a new process, so nothing registers itself."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from dllm_core.errors import DllmError, did_you_mean
from dllm_core.methods.requirements import RoomOptions

if TYPE_CHECKING:
    from dllm_core.methods.protocol import Method


def room_names() -> list[str]:
    """Return the names of all rooms: the packages below `dllm_core.methods`."""
    package = import_module("dllm_core.methods")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg)


def _check(room: str) -> None:
    if room not in room_names():
        raise DllmError(f"Unknown method '{room}'.", did_you_mean(room, room_names()))


def room_options(room: str) -> type[RoomOptions]:
    """Return the room's options model; imports no torch.

    Raises:
        DllmError: no such room.
    """
    _check(room)
    options: type[RoomOptions] = import_module(f"dllm_core.methods.{room}.options").Options
    return options


def room_method(room: str) -> type[Method]:
    """Return the room's method class (imports torch).

    Raises:
        DllmError: no such room.
    """
    _check(room)
    method: type[Method] = import_module(f"dllm_core.methods.{room}.method").Method
    return method
