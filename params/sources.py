"""Sources given as paths, made absolute: a run may be resumed from another directory than it was started in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from params.errors import ParamsError

_SOURCES = (("model", "source", "scratch"), ("data", "source", ""), ("eval", "judge", "base"))
"""Section, key, and the word that never means a directory of that name."""


def with_absolute_sources(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which every source that exists as a path is absolute; anything else stays as it was typed."""
    made = dict(tree)
    for section, key, word in _SOURCES:
        part = made.get(section)
        if isinstance(part, Mapping) and isinstance(part.get(key), str) and part[key] not in ("", word):
            made[section] = {**part, key: absolute_source(part[key])}
    return made


def absolute_source(source: str) -> str:
    """Return a source with its path absolute, if it is one; `hf:DIRECTORY[:CONFIG]` keeps what stands around the path.

    Args:
        source: as for `model.source`, `data.source` and `eval.judge`.

    Raises:
        ParamsError: it begins with `~`, and nobody knows where that is.
    """
    if source.startswith("embedded:"):
        return source
    if source.startswith("hf:"):
        name, colon, config = source.removeprefix("hf:").partition(":")
        return f"hf:{Path(name).absolute()}{colon}{config}" if name and Path(name).is_dir() else source
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # no HOME, or no such user
        raise ParamsError(f"'{source}' is in a home directory that is not known here.", "Write out the path.") from None
    return str(path.absolute()) if path.exists() else source


def require_source(section: str, source: str) -> None:
    """Refuse an empty source, which would be read as the working directory.

    Raises:
        ParamsError: nothing but spaces.
    """
    if not source.strip():
        raise ParamsError(f"--{section} is empty.", f"Name a source, or leave out --{section} to take the preset's.")
