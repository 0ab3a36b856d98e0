"""Preset + cells + command line -> GridSpec.

A preset is a YAML file that may extend another one. Its `cells` is a mapping from cell name to overrides of that
cell's file (`{}`: as it stands) or a plain list of names. With `optional: true` among them they wait for `--cells` to
name the cell, and make no row by themselves. Later layers win: extended preset, preset, `--model` / `--data` /
`--seeds`, `--set`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from params.errors import ParamsError, did_you_mean
from params.explain import explain, known_keys, show, unknown_key
from params.overrides import ALIASES, Loader, parse_overrides
from params.schema import CellSpec, GridSpec
from params.sources import require_source, with_absolute_sources

ROOT = Path(__file__).parent
_CELL_KEYS = ("options", "train", "description", "optional")
_ABOUT_THE_SOURCE = {"model": ("scratch",), "data": ("split", "fields")}
"""Keys that describe one source and are dropped when another source is named."""


@dataclass
class _Draft:
    """Settings while the layers are merged.

    Attributes:
        tree: everything but the cells.
        cells: chosen cell names, in table order.
        tweaks: cell name -> overrides of its file.
        origins: dotted key -> the layer that set it last.
        typed: dotted key -> the short name that the user typed for it.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    cells: list[str] = field(default_factory=list)
    tweaks: dict[str, dict[str, Any]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)

    def locate(self, key: str) -> str:
        """Return ` (from LAYER)` for the layer that set `key`, its nearest parent or one of its parts."""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            origin = self.origins.get(".".join(parts[:end]))
            if origin:
                return f" (from {origin})"
        return ""


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return sorted(p.stem for p in (ROOT / "presets").glob("*.yaml"))


def cell_names() -> list[str]:
    """Return the names of all cells."""
    return sorted(p.stem for p in (ROOT / "cells").glob("*.yaml"))


def load(
    preset: str = "laptop",
    *,
    cells: Sequence[str] | str | None = None,
    overrides: Mapping[str, Any] | Iterable[str] | str | None = None,
    model: str | None = None,
    data: str | None = None,
    seeds: Sequence[int] | str | None = None,
) -> GridSpec:
    """Return the settings of a grid.

    Args:
        preset: name of a file in params/presets, or a path to a YAML file.
        cells: names of files in params/cells or paths to YAML files (also as one text, comma-separated); None takes
            the preset's.
        overrides: `--set` arguments: `"train.lr=1e-4"`, a list of those, or a mapping. Cells are reached as
            `cells.NAME.options.KEY`, `cells.NAME.train.KEY`.
        model: replaces `model.source`.
        data: replaces `data.source`.
        seeds: replaces `seeds`.

    Raises:
        ParamsError: unknown preset, cell or key, value out of range, or settings that contradict each other.
    """
    draft = _Draft()
    for name, layer in _preset_layers(preset):
        _merge(draft, layer, name)
    draft.tree["preset"] = Path(preset).stem
    files = _choose_cells(draft, cells)
    for section, source in (("model", model), ("data", data)):
        if source is not None:
            require_source(section, source)
            _merge(draft, {section: {"source": source}}, f"--{section}")
    if seeds is not None:
        draft.tree["seeds"] = _seeds(seeds)
        draft.origins["seeds"] = "--seeds"
    _apply_overrides(draft, parse_overrides(overrides))
    chosen = [_cell(draft, name, files) for name in draft.cells]
    tree = {**with_absolute_sources(draft.tree), "cells": chosen, "donors": _donors(draft, chosen, files)}
    try:
        return GridSpec.model_validate(tree)
    except ValidationError as error:
        raise _as_typed(explain(error, GridSpec, draft.locate), draft.typed) from None


def _as_typed(error: ParamsError, typed: Mapping[str, str]) -> ParamsError:
    """Name a key as the user did."""
    for key, short in typed.items():
        if error.problem.startswith(f"{key} "):
            return ParamsError(short + error.problem.removeprefix(key), error.remedy)
    return error


# -- files ---


def _find(kind: str, name: str, known: list[str]) -> Path:
    singular = kind.removesuffix("s")
    if _is_path(name):
        if not Path(name).is_file():
            raise ParamsError(f"No {singular} file '{name}'.", "Check the path, or give the name of a known one.")
        return Path(name)
    if name not in known:
        raise ParamsError(f"Unknown {singular} '{name}'.", did_you_mean(name, known))
    return ROOT / kind / f"{name}.yaml"


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name


def _shown(path: Path) -> str:
    return f"params/{path.relative_to(ROOT).as_posix()}" if path.is_relative_to(ROOT) else str(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except UnicodeDecodeError:
        raise ParamsError(f"{_shown(path)} is not UTF-8 text.", "Save it as UTF-8.") from None
    except OSError as error:
        raise ParamsError(
            f"{_shown(path)} cannot be read ({error.strerror}).", "Make it readable, or give another file."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ParamsError(f"{_shown(path)}{line}: {problem}.", "Correct the YAML; indent with spaces.") from None
    if not isinstance(tree, dict):
        raise ParamsError(f"{_shown(path)} holds {show(tree)}.", "Allowed: a mapping of settings.")
    return tree


def _preset_layers(preset: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, settings) of the preset and all it extends, the base first."""
    layers: list[tuple[str, dict[str, Any]]] = []
    name: str | None = preset
    while name is not None:
        path = _find("presets", name, preset_names())
        shown = _shown(path)
        if shown in [n for n, _ in layers]:
            raise ParamsError(f"{shown} extends itself.", "Remove one of the extends: lines.")
        tree = _read(path)
        name = _extended(tree.pop("extends", None), path)
        if "preset" in tree:
            raise ParamsError(f"Unknown key 'preset' (from {shown}).", "A preset is named by its file.")
        layers.append((shown, tree))
    return layers[::-1]


def _extended(name: Any, path: Path) -> str | None:
    """Return what a preset's file extends: a preset by name, or a path from where that file lies."""
    if name is None or isinstance(name, str):
        return os.path.normpath(path.parent / name) if name and _is_path(name) else name
    raise ParamsError(
        f"extends = {show(name)} is not valid (from {_shown(path)}).",
        "Allowed: the name of a preset, or a path to a YAML file.",
    )


# -- layers ---


def _merge(draft: _Draft, layer: Mapping[str, Any], origin: str) -> None:
    layer = dict(layer)
    cells = layer.pop("cells", None)
    _one_of_budget_and_steps(draft, layer, origin)
    _deep(draft, draft.tree, layer, origin, "")
    if isinstance(cells, Mapping):
        for name, tweak in cells.items():
            _merge_cell(draft, str(name), tweak, origin)
    elif isinstance(cells, list):
        draft.cells = [str(name) for name in cells]
    elif cells is not None:
        raise ParamsError(f"cells = {show(cells)} is not valid (from {origin}).", "Allowed: a list of cell names.")


def _merge_cell(draft: _Draft, name: str, tweak: Any, origin: str) -> None:
    tweak = {} if tweak is None else tweak
    if not isinstance(tweak, Mapping):
        raise ParamsError(
            f"cells.{name} = {show(tweak)} is not valid (from {origin}).", "Allowed: a mapping of its settings, or {}."
        )
    for key in tweak:
        if key not in _CELL_KEYS:
            known = iter(f"cells.{name}.{k}" for k in _CELL_KEYS)
            raise unknown_key(f"cells.{name}.{key}", known, lambda _: f" (from {origin})")
    tweak = dict(tweak)
    optional = tweak.pop("optional", False)
    if not isinstance(optional, bool):
        raise ParamsError(
            f"cells.{name}.optional = {show(optional)} is not valid (from {origin}).", "Allowed: true or false."
        )
    if optional and name in draft.cells:
        draft.cells.remove(name)
    elif not optional and name not in draft.cells:
        draft.cells.append(name)
    _deep(draft, draft.tweaks.setdefault(name, {}), tweak, origin, f"cells.{name}.")


def _deep(draft: _Draft, into: dict[str, Any], layer: Mapping[str, Any], origin: str, prefix: str) -> None:
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        if dotted == "data.source" or dotted == "model.source":
            _forget_source(draft, dotted.split(".")[0], value, into, layer)
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _deep(draft, into[key], value, origin, f"{dotted}.")
        else:
            into[key] = copy.deepcopy(dict(value)) if isinstance(value, Mapping) else value
            draft.origins[dotted] = origin


def _forget_source(draft: _Draft, section: str, source: Any, into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    if into.get("source") not in (None, source):
        for key in _ABOUT_THE_SOURCE[section]:
            if key not in layer:
                into.pop(key, None)


def _one_of_budget_and_steps(draft: _Draft, layer: Mapping[str, Any], origin: str) -> None:
    """A layer that sets one of the two drops what it inherits of the other; both in one layer stay and are refused."""
    train = layer.get("train")
    steps = isinstance(train, Mapping) and train.get("steps") is not None
    budget = layer.get("budget")
    if steps and "budget" not in layer:
        draft.tree.pop("budget", None)
    if budget is not None and not steps:
        draft.tree.get("train", {}).pop("steps", None)
    inherited = draft.tree.get("budget") or {}
    kind = budget.get("kind") if isinstance(budget, Mapping) and "value" not in budget else None
    if kind is not None and inherited and kind != inherited["kind"]:
        raise ParamsError(
            f"budget.kind = {show(kind)} (from {origin}) changes the unit of "
            f"budget.value = {show(inherited['value'])}.",
            "Set budget.value together with budget.kind.",
        )


def _seeds(seeds: Sequence[int] | str) -> list[Any]:
    if not isinstance(seeds, str):
        return list(seeds)
    try:
        return [int(s) for s in seeds.split(",") if s.strip()]
    except ValueError:
        raise ParamsError(f"--seeds {seeds} cannot be read.", "Allowed: whole numbers, e.g. --seeds 0,1,2.") from None


def _apply_overrides(draft: _Draft, overrides: Mapping[str, Any]) -> None:
    layer: dict[str, Any] = {}
    known = [k for k in known_keys(GridSpec) if k not in ("cells", "donors", "preset")]
    for short, value in overrides.items():
        key = ALIASES.get(short, short)
        if key != short:
            draft.typed[key] = short
        path = key.split(".")
        if path[0] == "cells":
            _check_cell_key(draft, key, path, known)
        elif key not in known and not (path[:2] == ["data", "fields"] and len(path) == 3):
            raise unknown_key(key, iter(known), lambda _: " (from --set)")
        node = layer
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ParamsError(f"--set gives both {key} and the whole of its section.", "Set one of the two.")
        node[path[-1]] = value
    _merge(draft, layer, "--set")


def _check_cell_key(draft: _Draft, key: str, path: list[str], known: list[str]) -> None:
    if len(path) < 2 or path[1] not in draft.cells:
        name = path[1] if len(path) > 1 else key
        raise ParamsError(
            f"Unknown key '{key}' (from --set): '{name}' is no cell of this grid.",
            did_you_mean(name, draft.cells) if draft.cells else "The grid has no cells.",
        )
    if len(path) < 4 or path[2] not in ("options", "train"):
        below = f"cells.{path[1]}"
        raise ParamsError(
            f"Unknown key '{key}' (from --set).", f"Allowed: {below}.options.KEY=VALUE or {below}.train.KEY=VALUE."
        )


# -- cells ---


def _choose_cells(draft: _Draft, cells: Sequence[str] | str | None) -> dict[str, Path]:
    """Apply `--cells`; return cell name -> file for all known cells and those given as a path."""
    files = {name: ROOT / "cells" / f"{name}.yaml" for name in cell_names()}
    if cells is not None:
        names = cells.split(",") if isinstance(cells, str) else list(cells)
        draft.cells = [n.strip() for n in names if n.strip()]
        if not draft.cells:
            raise ParamsError("--cells names no cell.", f"Known: {', '.join(cell_names())}.")
    for i, name in enumerate(draft.cells):
        path = _find("cells", name, cell_names())
        draft.cells[i] = path.stem
        files[path.stem] = path
    return files


def _cell(draft: _Draft, name: str, files: Mapping[str, Path]) -> CellSpec:
    path = files[name]
    tree = _read(path)
    if tree.get("name", name) != name:
        raise ParamsError(f"name = {tree['name']} is not the file's name (from {_shown(path)}).", f"Allowed: {name}.")
    own = _Draft(origins={f"cells.{name}": _shown(path), **draft.origins})
    _overlay(tree, draft.tweaks.get(name, {}))
    try:
        return CellSpec.model_validate({"name": name, **tree})
    except ValidationError as error:
        raise explain(error, CellSpec, own.locate, prefix=f"cells.{name}.") from None


def _overlay(tree: dict[str, Any], tweak: Mapping[str, Any]) -> None:
    for key, value in tweak.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _overlay(tree[key], value)
        else:
            tree[key] = value


def _donors(draft: _Draft, chosen: list[CellSpec], files: Mapping[str, Path]) -> list[CellSpec]:
    """Return cells that no row is made of but that the options of a row name (a prefix to continue from)."""
    have = {cell.name for cell in chosen}
    donors: list[CellSpec] = []
    queue = list(chosen)
    while queue:
        for value in _texts(queue.pop(0).options):
            if value in files and value not in have:
                have.add(value)
                donors.append(_cell(draft, value, files))
                queue.append(donors[-1])
    return donors


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _texts(v)]
    return [t for v in value for t in _texts(v)] if isinstance(value, list) else []
