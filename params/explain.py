"""Turns pydantic's findings into two lines: the key as typed, its value, where it stands, what is allowed."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from params.errors import ParamsError, did_you_mean

Locate = Callable[[str], str]
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}
_UNKNOWN = ("extra_forbidden", "invalid_key")
"""What pydantic finds of a key that is not in the schema; the second of one that is no text."""
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def nowhere(key: str) -> str:
    """Give no hint about where `key` was written."""
    return ""


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of `model`, nested models included, lists of models left out."""
    for name, field in model.model_fields.items():
        inner = _model_of(field.annotation)
        yield f"{prefix}{name}"
        if inner is not None:
            yield from known_keys(inner, f"{prefix}{name}.")


def explain(error: ValidationError, model: type[BaseModel], locate: Locate = nowhere, prefix: str = "") -> ParamsError:
    """Return the two-line error for the most telling finding.

    Args:
        error: what pydantic raised.
        model: the model that was validated.
        locate: dotted key -> ` (from FILE)` or an empty string.
        prefix: put before every key, e.g. `cells.ar.train.`.
    """
    # an unknown key is the likeliest cause of everything else
    first = min(error.errors(include_url=False), key=lambda e: e["type"] not in _UNKNOWN)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ParamsError):
        return cause
    path = [str(part) for part in first["loc"]]
    key = prefix + _key(model, path, extra=first["type"] in _UNKNOWN)
    if first["type"] in _UNKNOWN:
        return unknown_key(key, (prefix + k for k in known_keys(model)), locate)
    may_be = f"Allowed: {allowed(model, path)}."
    if first["type"] == "missing" and not path[-1].isdigit():
        return ParamsError(f"{key} is not set{locate(key)}.", may_be)
    return ParamsError(f"{key} = {show(first['input'])} is not valid{locate(key)}.", may_be)


def unknown_key(key: str, known: Iterator[str], locate: Locate = nowhere) -> ParamsError:
    """Return the error for a key that does not exist, with the nearest one, else those of the same section."""
    names = list(known)
    section = key.rpartition(".")[0]
    siblings = [n for n in names if n.rpartition(".")[0] == section]
    remedy = did_you_mean(key, names)
    if siblings:
        hint = remedy.partition("Known:")[0] if remedy.startswith("Did") else ""
        remedy = f"{hint}Known: {', '.join(sorted(siblings))}."
    return ParamsError(f"Unknown key '{key}'{locate(key)}.", remedy)


def show(value: Any) -> str:
    """Return a value as it would be typed in YAML, shortened."""
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = text if text is not None else (str(value) if isinstance(value, str) else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def allowed(model: type[BaseModel], path: list[str]) -> str:
    """Return in words what the field at `path` may hold, e.g. `a number > 0`."""
    current: Any = model
    for depth, part in enumerate(path):
        fields = getattr(current, "model_fields", {})
        if part not in fields:
            break
        field = fields[part]
        inner = _model_of(field.annotation)
        if inner is None or depth == len(path) - 1:
            return _words(field.annotation, tuple(field.metadata))
        current = inner
    return "a mapping"


def _key(model: type[BaseModel], path: list[str], *, extra: bool) -> str:
    """Return the dotted key of a location, without list indices and pydantic's names for members of a union."""
    parts: list[str] = []
    current: type[BaseModel] | None = model
    for part in path:
        if current is None or part not in current.model_fields:
            mapping = current is None and parts and not part.isdigit() and part != "[key]" and "[" not in part
            return ".".join([*parts, part] if mapping or extra or not parts else parts)
        parts.append(part)
        field = current.model_fields[part]
        current = _model_of(field.annotation)
        if current is None and get_origin(field.annotation) is not dict:
            break
    return ".".join(parts)


def _words(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(args[0], (*_flat(args[1:]), *metadata))
    if origin in (Union, types.UnionType):
        parts = [_words(a, metadata) for a in args if a is not type(None)]
        return " or ".join([*parts, "null"] if type(None) in args else parts)
    if origin is Literal:
        return ", ".join(str(a) for a in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list, each {_words(args[0])}"
        return f"a list of {len(args)}, each {_words(args[0])}"
    if origin is dict:
        return f"a mapping from {_words(args[0])} to {_words(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping of {', '.join(annotation.model_fields)}"
    return _KINDS.get(annotation, "text") + _bounds(metadata)


def _flat(metadata: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(m for item in metadata for m in (item.metadata if hasattr(item, "metadata") else (item,)))


def _bounds(metadata: tuple[Any, ...]) -> str:
    words = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in _BOUNDS.items() if hasattr(m, name)]
    patterns = [f"matching {m.pattern}" for m in metadata if getattr(m, "pattern", None)]
    return "".join(" " + " and ".join(group) for group in (words, patterns) if group)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *get_args(annotation)] if get_origin(annotation) is not tuple else []
    for item in candidates:
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
    return None
