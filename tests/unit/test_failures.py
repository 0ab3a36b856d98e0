"""What an exception means for the user, and how it reaches the launcher; and the watchdog of tasks."""

from __future__ import annotations

import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dllm_core.errors import DataError
from params import ParamsError
from steps.failures import (
    WORD_VARIABLE,
    RowFailed,
    closing_left,
    describe,
    forget,
    killed,
    leave_closing,
    leave_word,
    words_left,
)
from steps.locks import gpu_lock, hold_if_free
from steps.watchdog import is_alive

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "kind", "problem", "remedy"),
    [
        (DataError("bad file", "mend it"), "user", "bad file", "mend it"),
        (ParamsError("bad key"), "user", "bad key", ""),
        (RuntimeError("CUDA out of memory. Tried to allocate\nmore"), "error", "out of memory: CUDA out", "Try --set"),
        (MemoryError(), "error", "out of memory: MemoryError", "Try --set"),
        (OSError(28, "No space left"), "error", "no space left on the disk", "gc --keep"),
        (OSError(122, "Disk quota exceeded"), "error", "no space left on the disk: [Errno 122]", "gc --keep"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "error",
            "no space left on the disk: Error while serializing",
            "the same `run` command",
        ),
        (sqlite3.OperationalError("database or disk is full"), "error", "no space left on the disk", "gc --keep"),
        (KeyError("x"), "error", "KeyError: 'x'", ""),
        (AssertionError(), "error", "AssertionError: AssertionError", ""),
    ],
)
def test_causes_in_one_line(error: Exception, kind: str, problem: str, remedy: str) -> None:
    found = describe(error, "row", "train_cell")
    assert found.kind == kind
    assert found.problem.startswith(problem)
    assert "\n" not in found.problem
    assert remedy in found.remedy
    assert bool(found.trace) == (kind == "error")


def test_a_full_disk_is_told_through_what_it_broke() -> None:
    """A writer that fails again while it closes its file hides the cause behind an error of its own."""
    error = RuntimeError("unexpected pos 576 vs 534")
    error.__context__ = OSError(28, "No space left on device", "weights.bin")
    found = describe(error, "row", "train_cell")
    assert found.problem == "no space left on the disk: [Errno 28] No space left on device: 'weights.bin'"
    assert "unexpected pos" in found.trace


def test_a_word_that_cannot_be_left_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "word").touch()
    monkeypatch.setenv(WORD_VARIABLE, str(tmp_path / "word"))
    leave_word(killed("ar"))
    assert (tmp_path / "word").is_file()


def test_failure_survives_pickling_and_reraising() -> None:
    failed = pickle.loads(pickle.dumps(RowFailed(killed("ar"))))
    assert describe(failed, "elsewhere", "elsewhere") == killed("ar")


def test_words_reach_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORD_VARIABLE, str(tmp_path / "word"))
    leave_word(killed("ar"))
    leave_word(describe(KeyError("x"), "random_mask", "train_cell"))
    forget("ar")
    leave_closing(["a", "b"])
    assert [f.where for f in words_left(tmp_path / "word")] == ["random_mask"]
    assert closing_left(tmp_path / "word") == ["a", "b"]


def test_without_a_launcher_words_are_not_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(WORD_VARIABLE, raising=False)
    leave_word(killed("ar"))
    forget("ar")
    leave_closing(["the end"])
    assert capsys.readouterr().out == "the end\n"


TASK = """
import time
from steps.watchdog import die_with_parent
die_with_parent()
print("up", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
from steps.watchdog import announce_parent
announce_parent()
child = subprocess.Popen([sys.executable, "-c", {task!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def test_task_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(task=TASK)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    task = int(parent.stdout.readline())
    assert is_alive(task)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    deadline = time.monotonic() + 10
    while is_alive(task) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(task)


def test_task_born_to_a_dead_parent_ends_at_once() -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    environment = {**os.environ, "DLLM_PARENT_PID": gone.stdout.strip()}
    task = subprocess.run([sys.executable, "-c", TASK], cwd=ROOT, env=environment, capture_output=True, timeout=20)
    assert task.returncode == -signal.SIGKILL
    assert task.stdout == b""


def test_gpu_lock_is_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with gpu_lock("cpu", print):
        assert not list(tmp_path.iterdir())
    with gpu_lock("cuda", print):
        (lock,) = tmp_path.iterdir()
        with hold_if_free(lock) as free:
            assert not free
    with hold_if_free(lock) as free:
        assert free
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    lock.unlink()
    with gpu_lock("cuda", print):
        assert not list(tmp_path.iterdir())
