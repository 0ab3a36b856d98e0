"""Every kind of bad input, typed at the command line: two lines on stderr, status 2, nothing started, nothing written.

The wording of each is tested beside the check that says it; here it is what the user is left with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows import launcher
from tests.plan_tools import LLAMA, TWO_CORES, model_dir

Refused = Callable[..., list[str]]


class Never:
    """A flow that must not be reached."""

    def __init__(self) -> None:
        raise AssertionError(f"Metaflow was started with {sys.argv}")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home" / "runs"
    path.parent.mkdir()
    monkeypatch.setenv("DLLM_RUNS", str(path))
    return path


@pytest.fixture
def refused(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs the launcher and gives the two lines that it ends with."""

    def go(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["flows/compare_grid.py", "run", "--preset", "test", *arguments])
        assert launcher.main(Never) == launcher.BAD_INPUT == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 2, err
        assert lines[0].startswith("error: ")
        assert lines[1].strip(), "the second line says what to do"
        assert list(runs.parent.iterdir()) == [], "nothing was written"
        return lines

    return go


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        (("--preset", "labtop"), "Unknown preset 'labtop'", "Did you mean 'laptop'?"),
        (("--cells", "ar,random_masks"), "Unknown cell 'random_masks'", "Did you mean 'random_mask'?"),
        (("--set", "train.lrr=1"), "Unknown key 'train.lrr'", "Did you mean 'train.lr'?"),
        (("--set", "cells.repr_align_4.options.wieght=1"), "options.wieght'", "options.weight'?"),
        (("--set", "train.lr=-1"), "train.lr = -1 is not valid", "Allowed: a number > 0"),
        (("--seeds", "a"), "--seeds", "--seeds 0,1,2"),
        (("--cell", "ar", "--dry-run"), "Unknown option '--cell'", "Did you mean '--cells'?"),
        (("--no_cache",), "Unknown option '--no_cache'", "Did you mean '--no-cache'?"),
        (("--model", "no/such/place/here"), "There is no model directory", "Give an existing directory"),
        (("--data", "nowhere.jsonl"), "'nowhere.jsonl' does not exist", "Give a .txt"),
    ],
    ids=["preset", "cell", "key", "option", "range", "seed", "flag", "switch", "model", "data"],
)
def test_settings(refused: Refused, arguments: tuple[str, ...], problem: str, remedy: str) -> None:
    lines = refused(*arguments)
    assert problem in lines[0]
    assert remedy in lines[1]


SHIFTED = {"alignment": "shifted", "mask_token_id": 120, "num_tokens": 120}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "is not a causal language model"),
        ({**LLAMA, "model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "is a model of type 'mamba'"),
        ({**LLAMA, "dllm": {**SHIFTED, "alignment": "same_position"}}, "alignment='same_position', but"),
        ({**LLAMA, "dllm": {**SHIFTED, "mask_token_id": 7}}, "mask token id 7 is not among the rows 120..127"),
        ({**LLAMA, "dllm": {**SHIFTED, "mask_token_id": 128}}, "mask token id 128 is not among the rows 120..127"),
        ({**LLAMA, "dllm": {"mask": 7}}, "is not understood"),
        ({}, "is a model of type 'None'"),
        ("{", "no readable config.json"),
    ],
    ids=["classifier", "family", "alignment", "mask-is-a-token", "mask-has-no-row", "contract", "empty", "broken"],
)
def test_models(refused: Refused, tmp_path: Path, config: dict[str, object] | str, problem: str) -> None:
    assert problem in refused("--model", str(model_dir(tmp_path / "model", config)))[0]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\x89PNG\0\0", "is binary"),
        ("a.txt", b"un \xe9t\xe9", "is not UTF-8 (0xe9 at byte 3)"),
        ("a.csv", b"a,b\n", "ends in '.csv'"),
        ("a.jsonl", b'{"text": "good"}\n{"text": bad}\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n', "is not UTF-8 (0xff at line 2)"),
        ("a.jsonl", b'{"question": "q"}\n', "line 1 has no 'text'"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: 'text' is a int, not text"),
        ("a.parquet", b"PAR1 or not", "is not readable Parquet"),
        ("a.txt", b"short", "less than one window of 24 tokens"),
    ],
    ids=["empty", "blank", "binary", "latin1", "kind", "line", "utf8", "fields", "type", "parquet", "short"],
)
def test_data(refused: Refused, tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert problem in refused("--data", str(tmp_path / name))[0]


def test_too_little_memory(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steps.plan.probe", lambda *_: replace(TWO_CORES, memory_free=2e8))
    lines = refused()
    assert "GB of memory (estimate), 0.2 GB are free." in lines[0]
    assert "train.micro_batch_size" in lines[1]


def test_too_little_disk(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steps.plan_disk.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    lines = refused()
    assert "GB of disk (estimate" in lines[0]
    assert "python -m steps.cache gc" in lines[1]


def test_unwritable_runs_directory(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DLLM_RUNS", str(tmp_path / "file" / "runs"))
    lines = refused()
    assert "cannot be written (Not a directory)" in lines[0]
    assert lines[1] == "Make it writable, or set DLLM_RUNS to another directory."


def test_no_gpu(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steps.machine._gpu", lambda: None)
    assert "no NVIDIA GPU is visible" in refused("--set", "runtime.device=cuda")[0]


def test_missing_files_of_a_model(refused: Refused, tmp_path: Path) -> None:
    model = model_dir(tmp_path / "model", weights=False)
    assert "holds no weights" in refused("--model", str(model))[0]
    model_dir(model)
    (model / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refused("--model", str(model))[0]
