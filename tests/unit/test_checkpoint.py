"""Resume is bit-exact, whatever ends the run; damaged checkpoints are skipped."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm_core.errors import ContractError, StoreError
from dllm_core.training.checkpoint import checkpoint_path, newest_checkpoint, read_checkpoint, write_checkpoint
from dllm_core.training.tensor_file import file_digest, write_tensors
from tests.training_toy import SETTINGS, ToyMethod, make_trainer, slow_trainer, weights

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for the end of a process."""


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_killed_at_six_and_resumed_equals_the_whole(tmp_path: Path, dtype: str) -> None:
    settings = replace(SETTINGS, dtype=dtype)
    straight_rows: list[dict] = []
    straight = make_trainer(tmp_path / "a", settings, method=ToyMethod(dropout=0.2), callbacks=straight_rows.append)
    whole = straight.run()

    def kill(row: dict) -> None:
        if row["step"] == 6:
            raise Killed

    first = make_trainer(tmp_path / "b", settings, method=ToyMethod(dropout=0.2), callbacks=kill, checkpoint_at=(2, 4))
    with pytest.raises(Killed):
        first.run()
    rows: list[dict] = []
    second = make_trainer(tmp_path / "b", settings, method=ToyMethod(dropout=0.2, seed=9), callbacks=rows.append)
    resumed = second.run()
    assert [r["step"] for r in rows] == [5, 6, 7, 8, 9, 10]
    _equal(weights(straight), weights(second))
    timing = {"wall_s", "tokens_per_s", "peak_memory_gb"}
    for name, value in vars(whole).items():
        assert name in timing or getattr(resumed, name) == value, name
    for ours, theirs in zip(rows, straight_rows[4:], strict=True):
        assert ours["train/loss"] == theirs["train/loss"]
        assert ours["train/lr"] == theirs["train/lr"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the victim has it: sums come out the same to the bit only with the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kill_9_in_the_middle(tmp_path: Path, dtype: str) -> None:
    victim = subprocess.Popen(
        [sys.executable, "-m", "tests.training_toy", str(tmp_path / "killed"), dtype],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert victim.stdout is not None
    for line in victim.stdout:
        if int(line) >= 6:
            victim.send_signal(signal.SIGKILL)
            break
    assert victim.wait() == -signal.SIGKILL
    rows: list[dict] = []
    again = slow_trainer(tmp_path / "killed", dtype, rows.append)
    again.run()
    assert 1 < rows[0]["step"] <= 8
    assert rows[-1]["step"] == 12
    whole = slow_trainer(tmp_path / "whole", dtype, lambda row: None)
    whole.run()
    _equal(weights(whole), weights(again))


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_checkpoints_at_the_next_step_boundary(tmp_path: Path, number: int, kind: type) -> None:
    def interrupt(row: dict) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(kind) as caught:
        make_trainer(tmp_path, callbacks=interrupt).run()
    if kind is SystemExit:
        assert caught.value.code == 143
    assert signal.getsignal(number) is before
    found = newest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 3
    straight, resumed = make_trainer(tmp_path / "other"), make_trainer(tmp_path)
    straight.run()
    resumed.run()
    _equal(weights(straight), weights(resumed))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_prefix_changes_nothing_and_can_be_branched_from(tmp_path: Path, dtype: str) -> None:
    settings = replace(SETTINGS, dtype=dtype)
    straight = make_trainer(tmp_path / "a", settings)
    whole = straight.run()
    prefix = make_trainer(tmp_path / "prefix", settings)
    assert not prefix.run(stop_at=4).finished
    point = checkpoint_path(tmp_path / "prefix" / "checkpoints", 4)

    continued = make_trainer(tmp_path / "b", settings, method=ToyMethod(seed=9))
    result = continued.run(resume_from=point)
    _equal(weights(straight), weights(continued))
    assert result.flops == whole.flops
    assert result.wall_s > 0

    # another method of the same backbone: own phases, own settings, the prefix's weights, moments, steps and cost
    branch_rows: list[dict] = []
    branch = make_trainer(
        tmp_path / "c",
        replace(settings, lr=0.001, steps=9, phase_starts=(0, 4)),
        method=ToyMethod(shares=(0.4, 0.6), seed=9),
        callbacks=branch_rows.append,
    )
    branched = branch.run(resume_from=point)
    assert [r["phase"] for r in branch_rows] == ["phase 1"] * 5
    assert branched.response_tokens == 9 * 4 * 8
    assert next(iter(branch.optimiser._adamw.state.values()))["step"].item() == 9


def test_own_checkpoints_win_over_the_prefix(tmp_path: Path) -> None:
    make_trainer(tmp_path / "prefix").run(stop_at=2)
    point = checkpoint_path(tmp_path / "prefix" / "checkpoints", 2)
    make_trainer(tmp_path / "own").run(stop_at=7, resume_from=point)
    rows: list[dict] = []
    make_trainer(tmp_path / "own", callbacks=rows.append).run(resume_from=point)
    assert rows[0]["step"] == 8


def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Killed):
        make_trainer(tmp_path, callbacks=_killer(6), checkpoint_at=(3, 5)).run()
    tensors = checkpoint_path(tmp_path / "checkpoints", 5) / "tensors.safetensors"
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1
    tensors.write_bytes(raw)
    (tmp_path / "checkpoints" / ".step_00000006.123").mkdir()
    rows: list[dict] = []
    with caplog.at_level(logging.WARNING):
        second = make_trainer(tmp_path, callbacks=rows.append)
        second.run()
    assert rows[0]["step"] == 4
    assert "damaged" in caplog.text
    assert not list((tmp_path / "checkpoints").glob(".step_*"))
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    _equal(weights(straight), weights(second))


def _killer(step: int):  # type: ignore[no-untyped-def]
    def kill(row: dict) -> None:
        if row["step"] == step:
            raise Killed

    return kill


def test_checkpoints_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    make_trainer(tmp_path).run(stop_at=5)
    rows: list[dict] = []
    make_trainer(tmp_path, replace(SETTINGS, lr=0.5), callbacks=rows.append).run(stop_at=2)
    assert rows[0]["step"] == 1
    rows.clear()
    make_trainer(tmp_path, replace(SETTINGS, log_every_s=1.0), callbacks=rows.append).run()
    assert rows[0]["step"] > 1


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    counters = make_trainer(tmp_path / "x").counters.as_dict()
    write_checkpoint(root, 3, {"param/other": torch.zeros(2)}, {"identity": "?", "counters": counters})
    with pytest.raises(ContractError, match=r"backbone\.table\.weight"):
        make_trainer(tmp_path / "y").run(resume_from=checkpoint_path(root, 3))


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    make_trainer(tmp_path, replace(SETTINGS, checkpoint_every_s=0.0)).run()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000008", "step_00000009"]


def test_an_incomplete_directory_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("tensors.safetensors", "state.json", "manifest.json"):
        path = write_checkpoint(tmp_path / name, 1, {"a": torch.ones(3)}, {})
        assert newest_checkpoint(tmp_path / name) is not None
        (path / name).unlink()
        with pytest.raises(StoreError):
            read_checkpoint(path)
        assert newest_checkpoint(tmp_path / name) is None


def test_a_full_disk_leaves_the_older_checkpoints_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a checkpoint stayed behind and kept the disk full for whatever the user tried next."""

    def full(path: Path, tensors: object) -> tuple[int, str]:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    write_checkpoint(tmp_path, 1, {"a": torch.ones(3)}, {})
    monkeypatch.setattr("dllm_core.training.checkpoint.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, 2, {"a": torch.ones(3)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_our_tensor_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "strided": torch.arange(12).reshape(3, 4).t(),
    }
    size, digest = write_tensors(tmp_path / "x.safetensors", tensors)
    assert size == (tmp_path / "x.safetensors").stat().st_size
    assert digest == file_digest(tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name


def test_state_is_plain_json(tmp_path: Path) -> None:
    make_trainer(tmp_path).run(stop_at=3)
    state = json.loads((checkpoint_path(tmp_path / "checkpoints", 3) / "state.json").read_text())
    assert state["step"] == 3
    assert state["counters"]["response_tokens"] == 3 * 4 * 8
    assert len(state["counters"]["recent"]) == 3
