"""Every setting says what it means; no file holds an absolute path; nothing here imports torch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import params
from dllm_core.methods.registry import room_options
from params import schema
from params.explain import known_keys
from params.overrides import Loader
from params.schema import CellSpec, GridSpec, RowSpec, Settings

ROOT = Path(params.__file__).parent
FILES = sorted(ROOT.glob("*/*.yaml"))
SECTIONS = [getattr(schema, name) for name in schema.__all__]


@pytest.mark.parametrize("model", [m for m in SECTIONS if m is not Settings], ids=lambda m: m.__name__)
def test_every_field_is_described(model: type[Settings]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} says nothing about itself"
        assert field.description.strip().endswith((".", ".)")), f"{model.__name__}.{name}: no sentence"
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid"


def _dotted(tree: dict[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


@pytest.mark.parametrize("path", sorted(ROOT.glob("presets/*.yaml")), ids=lambda p: p.stem)
def test_every_key_of_a_preset_is_in_the_schema(path: Path) -> None:
    tree = yaml.load(path.read_text(), Loader)
    tree.pop("extends", None)
    cells = tree.pop("cells", {})
    known = set(known_keys(GridSpec))
    for key in _dotted(tree):
        assert key in known or key.startswith("data.fields."), key
    for name, tweak in cells.items():
        assert name in params.cell_names()
        for option in (tweak or {}).get("options", {}):
            assert _documents(name, option), f"{path.name}: {name}.{option}"


@pytest.mark.parametrize("name", params.cell_names())
def test_every_option_of_a_cell_is_documented_by_its_room(name: str) -> None:
    tree = yaml.load((ROOT / "cells" / f"{name}.yaml").read_text(), Loader)
    assert set(tree) <= set(CellSpec.model_fields)
    assert tree["name"] == name
    assert tree["description"].endswith(".")
    for option in tree["options"]:
        assert _documents(name, option), f"{option} is not in the docstring of its room's Options"


def _documents(cell: str, option: str) -> bool:
    method = yaml.load((ROOT / "cells" / f"{cell}.yaml").read_text(), Loader)["method"]
    docs = "\n".join(base.__doc__ or "" for base in room_options(method).__mro__)
    return re.search(rf"^\s+{option}:", docs, re.MULTILINE) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_no_absolute_path_in_any_file(path: Path) -> None:
    assert not re.search(r"(^|[\s:\"'])(/|~|[A-Z]:\\)\w", path.read_text())


def test_rows_carry_all_training_settings() -> None:
    row = params.load().rows()[0]
    assert isinstance(row, RowSpec)
    assert row.train == params.load().train


def test_loading_imports_no_torch_and_no_library() -> None:
    code = (
        "import sys, params; [params.load(p) for p in params.preset_names()]; "
        "bad = {'torch', 'transformers', 'dllm_core', 'metaflow'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
