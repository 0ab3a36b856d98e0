"""The flow's own behaviour with step functions that cost nothing: who runs again, what is said, what is left running.

Each run starts a dozen Python processes, so there are few tests and they look at many things.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOW = ROOT / "flows" / "compare_grid.py"
SMALL = ("run", "--preset", "test", "--cells", "ar,random_mask")

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def start(runs: Path, tmp_path: Path) -> Iterator[Start]:
    """Start the flow from another directory, without a terminal and without a user name."""
    started: list[subprocess.Popen[str]] = []

    def go(*arguments: str, **extra: str) -> subprocess.Popen[str]:
        hidden = ("USER", "USERNAME", "LOGNAME", "DLLM_RUNS", "MLFLOW_TRACKING_URI")
        environment = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("METAFLOW_")}
        environment |= {"DLLM_STEPS": "tests.flow.cheap_steps", "DLLM_TRACKING": "off", **extra}
        command = [sys.executable, str(FLOW), *arguments, "--runs-dir", str(runs)]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield go
    for process in started:
        if process.poll() is None:
            process.kill()


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def calls(runs: Path) -> list[str]:
    return (runs / "calls.txt").read_text().splitlines()


def statuses(runs: Path) -> dict[str, str]:
    cells = json.loads((runs / "reports" / "latest" / "results.json").read_text())["cells"]
    return {cell["row_id"]: cell["status"] for cell in cells}


def resume_command(err: str) -> list[str]:
    found = re.search(r"python \S*compare_grid\.py (resume --origin-run-id \d+)", err)
    assert found, err
    return found[1].split()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.1)


def processes_of(runs: Path) -> list[str]:
    """Return command lines of live processes that work in `runs` (found by their environment)."""
    mark = f"DLLM_RUNS={runs}".encode()
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (directory / "environ").read_bytes().split(b"\0"):
                found.append((directory / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_failed_row_costs_the_others_nothing_and_resume_runs_only_it(start: Start, runs: Path) -> None:
    """The first of two rows fails: the other finishes, the words at the end say what to do, and doing it helps."""
    cells = ("run", "--preset", "test", "--cells", "random_mask,ar")
    status, _, err = finish(start(*cells, DLLM_FAIL_CELL="random_mask"))
    assert status == 1
    last = err.splitlines()[-4:]
    assert last[0] == "", "a blank line parts our words from Metaflow's"
    assert last[1] == "cell 'random_mask' failed in train_cell: RuntimeError: made to fail: random_mask"
    done = calls(runs)
    assert done == ["train_cell random_mask", "train_cell ar", "evaluate_cell ar", "train_cell random_mask"]

    status, out, err = finish(start(*resume_command(err)))
    assert status == 0, err
    assert calls(runs)[len(done) :] == [
        "train_cell random_mask",
        "evaluate_cell random_mask",
        "benchmark random_mask,ar",
    ]
    assert statuses(runs) == {"random_mask": "ok", "ar": "ok"}
    closing = out[out.rindex("Done!") :]
    assert "report.md" in closing
    assert "--no-cache" in closing


@pytest.mark.slow
def test_second_run_is_all_hits_and_a_new_cell_is_all_that_is_computed(start: Start, runs: Path) -> None:
    assert finish(start(*SMALL))[0] == 0
    first = calls(runs)
    status, out, _ = finish(start("run", "--preset", "test", "--cells", "ar,random_mask,repr_align_4"))
    assert status == 0
    assert calls(runs)[len(first) :] == [
        "train_cell repr_align_4",
        "evaluate_cell repr_align_4",
        "benchmark ar,random_mask,repr_align_4",
    ]
    assert out.count("cache hit train_cell/") == 2


@pytest.mark.slow
def test_killed_task_is_told_by_its_index(start: Start, runs: Path) -> None:
    """A task that gets SIGKILL (out of memory) leaves no artifacts; the others run on, and resume comes back to it."""
    status, _, err = finish(start(*SMALL, DLLM_KILL_CELL="ar"))
    assert status == 1
    assert "cell 'ar' failed: the task was killed" in err
    assert "evaluate_cell random_mask" in calls(runs)
    status, _, err = finish(start(*resume_command(err)))
    assert status == 0, err
    assert statuses(runs) == {"ar": "ok", "random_mask": "ok"}


@pytest.mark.slow
def test_failed_trajectories_fail_only_the_rows_that_need_them(start: Start, runs: Path) -> None:
    cells = ("run", "--preset", "test", "--cells", "random_mask,repr_align_trajectory")
    status, _, err = finish(start(*cells, DLLM_NO_TRAJECTORIES="1"))
    assert status == 1
    assert "cell 'repr_align_trajectory' failed in extract_trajectories: RuntimeError: no trajectories today" in err
    assert "evaluate_cell random_mask" in calls(runs)
    assert finish(start(*resume_command(err)))[0] == 0
    assert statuses(runs) == {"random_mask": "ok", "repr_align_trajectory": "ok"}


@pytest.mark.slow
def test_interrupt_ends_with_130_and_a_way_on(start: Start, runs: Path) -> None:
    process = start(*SMALL, DLLM_SLEEP_CELL="ar")
    wait_for(lambda: (runs / "calls.txt").exists() and "train_cell ar" in calls(runs), "training")
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130
    assert "Interrupted." in err
    wait_for(lambda: not processes_of(runs), "end of all tasks", 10)
    assert finish(start(*resume_command(err)))[0] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_kill_of_the_parent_leaves_nothing_running(start: Start, runs: Path) -> None:
    process = start(*SMALL, DLLM_SLEEP_CELL="ar")
    wait_for(lambda: (runs / "calls.txt").exists() and "train_cell ar" in calls(runs), "training")
    assert processes_of(runs)
    process.kill()
    process.wait()
    wait_for(lambda: not processes_of(runs), "end of all tasks", 10)
    status, _, _ = finish(start(*SMALL))
    assert status == 0, "the lock of the killed task is free again"
    assert calls(runs).count("train_cell ar") == 2


@pytest.mark.slow
def test_bad_data_found_late_ends_with_2_and_no_traceback(start: Start) -> None:
    status, out, err = finish(start(*SMALL, DLLM_BAD_DATA="1"))
    assert status == 2
    assert "step 'prepare_data' failed: The data is bad." in err
    assert "Bring other data." in err
    assert "Traceback" not in out + err
