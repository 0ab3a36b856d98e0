"""Checks that all settings share. Imports no torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dllm_core.errors import DllmError, did_you_mean


def refuse_unknown(cls: type, given: dict[str, Any], what: str) -> None:
    """Refuse settings that a dataclass does not have.

    Raises:
        DllmError: naming the first of them and the nearest known one.
    """
    known = [f.name for f in fields(cls)]
    for name in given:
        if name not in known:
            remedy = did_you_mean(name, known) if known else "It has no settings: leave it out."
            raise DllmError(f"Unknown {what} setting '{name}'.", remedy)


def is_int(value: Any) -> bool:
    """Whether a value is an integer and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_positive(name: str, value: Any) -> None:
    """Refuse what is not an integer of at least 1.

    Raises:
        DllmError: naming setting and value.
    """
    if not (is_int(value) and value >= 1):
        raise DllmError(f"{name}={value!r} is not a positive integer.", f"Give {name} a value of at least 1.")


def require_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        DllmError: naming setting and value.
    """
    if not isinstance(value, bool):
        raise DllmError(f"{name}={value!r} is neither True nor False.", f"Give {name} a truth value.")


def require_above_zero(name: str, value: Any) -> None:
    """Refuse what is not a finite number above 0.

    Raises:
        DllmError: naming setting and value.
    """
    if not is_number(value) or not 0 < value < float("inf"):
        raise DllmError(f"{name}={value!r} is not a number above 0.", f"Give {name} a finite number above 0.")
