"""The one error of this package: a setting that the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ParamsError(ValueError):
    """A setting is unknown, out of range or contradicts another one.

    Line one says what is wrong with which value, line two what is allowed or what to do.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}\n{remedy}" if remedy else problem)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.problem, self.remedy)


def did_you_mean(word: str, known: Iterable[str], *, limit: int = 24) -> str:
    """Return `Did you mean 'x'? Known: ...` for an unknown word; long lists are cut to `limit` names."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    shown = ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
    return f"{hint}Known: {shown}."
