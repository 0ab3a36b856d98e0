"""`--set a.b=c,d.e=f` and the YAML scalars in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from params.errors import ParamsError

ALIASES = {"eval.samples": "eval.nelbo_samples"}
"""Short names for `--set` -> the key in the schema."""


class Loader(yaml.SafeLoader):
    """YAML with the two surprises taken out: `1e-4` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; a repeated key is an error instead of the last one winning."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_value(key: str, text: str) -> Any:
    """Return `text` read as YAML: `8` is a number, `true` a switch, `[8, 32]` a list, `null` nothing.

    Raises:
        ParamsError: not YAML.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        raise ParamsError(
            f"--set {key}={text} cannot be read.", "Allowed: a number, true/false, null, text, or a list like [8,32]."
        ) from None


def parse_overrides(given: Mapping[str, Any] | Iterable[str] | str | None) -> dict[str, Any]:
    """Return {dotted key as typed: value} for all `--set` arguments; a later one wins.

    Args:
        given: `"a.b=1,c.d=[2,3]"`, several of those, or a mapping whose text values are read as YAML. A piece
            without `=` belongs to the value before it: `bench.steps=8,32` is a list.

    Raises:
        ParamsError: not of the form KEY=VALUE.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {key: parse_value(key, value) if isinstance(value, str) else value for key, value in given.items()}
    found: dict[str, Any] = {}
    for argument in [given] if isinstance(given, str) else given:
        for key, text in _assignments(argument):
            found[key] = parse_value(key, text)
    return found


def _assignments(argument: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, list[str]]] = []
    for piece in _split_outside_brackets(argument):
        key, equals, text = piece.partition("=")
        if equals and re.fullmatch(r"[A-Za-z0-9_.\s-]+", key):
            pairs.append((key.strip(), [text.strip()]))
        elif pairs and piece.strip():
            pairs[-1][1].append(piece.strip())
        elif piece.strip():
            raise ParamsError(
                f"--set {piece.strip()} has no value.", "Allowed: --set key=value, e.g. --set train.lr=1e-4."
            )
    return [(key, texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]") for key, texts in pairs]


def _split_outside_brackets(argument: str) -> list[str]:
    pieces, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(argument):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth <= 0:
            pieces.append(argument[start:i])
            start = i + 1
    return [*pieces, argument[start:]]
