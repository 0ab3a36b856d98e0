"""What a cached result depends on, and the key made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from steps.cache.closure import closure

SCHEMA_VERSION = 1
"""Raise when the layout of an entry changes: every older entry is then a miss."""

KEY_LENGTH = 16


def canonical(value: Any) -> str:
    """Return the one JSON text of a value (sorted keys, no spaces, no NaN).

    Raises:
        TypeError: the value holds something that JSON has no form for (a path, an object).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Return {distribution: version}, "absent" for those not installed; imports none of them."""
    found = {}
    for name in sorted(set(names)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def material(
    kind: str, fields: Mapping[str, Any], inputs: Mapping[str, str], roots: Iterable[str], libraries: Iterable[str]
) -> dict[str, Any]:
    """Return everything a key is made of, in JSON form."""
    parts = {
        "kind": kind,
        "schema": SCHEMA_VERSION,
        "fields": dict(fields),
        "inputs": dict(inputs),
        "sources": closure(roots),
        "libraries": library_versions(libraries),
    }
    plain: dict[str, Any] = json.loads(canonical(parts))
    return plain


def key_of(parts: Mapping[str, Any]) -> str:
    """Return the key: the first 16 hex digits of the sha256 of the canonical material."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:KEY_LENGTH]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts and lists as {dotted name: leaf}."""
    if isinstance(value, Mapping):
        pairs = [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        pairs = [(f"{prefix}[{i}]", v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, item in pairs:
        flat.update(flatten(item, name))
    return flat
