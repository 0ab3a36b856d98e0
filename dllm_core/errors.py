"""Errors that a user can cause and mend. Programmer errors are asserts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DllmError(ValueError):
    """A problem the user can fix: line one says what is wrong, line two what to do."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}\n{remedy}" if remedy else problem)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.problem, self.remedy)


class ContractError(DllmError):
    """A checkpoint was made under another alignment, mask token or block size than asked for."""


class UnsupportedModelError(DllmError):
    """The model's architecture cannot be made bidirectional here."""


class DataError(DllmError):
    """A data file or record cannot be used."""


class StoreError(DllmError):
    """An anchor or trajectory store lacks an entry, or holds one that belongs to something else."""


class ResourceError(DllmError):
    """Too little memory, disk or device for what was asked."""


class MissingExtraError(DllmError):
    """An optional dependency is needed and not installed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `Did you mean 'x'? Known: ...` for an unknown word."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(names)}."
