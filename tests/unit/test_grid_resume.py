"""Resuming after the step cache was cleared: a run says what is gone, and that only a new one can make it again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dllm_core.errors import DllmError
from steps.grid.run import Prepared, require_kept


@dataclasses.dataclass(frozen=True)
class Lying:
    """Stands for any artifact of a preparing step."""

    path: str = ""
    train_dir: str = ""
    heldout_dir: str = ""
    store_dir: str = ""


@pytest.fixture
def shared(tmp_path: Path) -> Prepared:
    for name in ("model", "train", "heldout", "store"):
        (tmp_path / name).mkdir()
    data: Any = Lying(train_dir=str(tmp_path / "train"), heldout_dir=str(tmp_path / "heldout"))
    model: Any = Lying(path=str(tmp_path / "model"))
    return Prepared(model, data, Lying(store_dir=str(tmp_path / "store")))


def test_what_is_there_is_there(shared: Prepared, tmp_path: Path) -> None:
    require_kept(shared, [str(tmp_path), ""])
    require_kept(dataclasses.replace(shared, anchors=None))


@pytest.mark.parametrize("name", ["model", "train", "heldout", "store"])
def test_a_run_that_was_cleared_away_cannot_be_resumed(shared: Prepared, tmp_path: Path, name: str) -> None:
    """`steps.cache gc`, then `resume`, as a full disk's message said: `Prepare the data again`, for ever."""
    (tmp_path / name).rmdir()
    with pytest.raises(DllmError) as caught:
        require_kept(shared)
    assert f"'{tmp_path / name}'" in caught.value.problem
    assert "the same `run` command" in caught.value.remedy


def test_a_trained_cell_may_be_what_is_gone(shared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(DllmError, match="no longer in the step cache"):
        require_kept(shared, [str(tmp_path / "cell")])
