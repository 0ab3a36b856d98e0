"""What goes wrong outside the settings: a damaged file, a store that cannot be written, an impatient user."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import time
from pathlib import Path

import pytest

from tests.flow.grid_runs import FLOW, environment, results, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CHEAP = {"DLLM_STEPS": "tests.flow.cheap_steps"}
SMALL = ("run", "--preset", "test", "--cells", "ar,random_mask")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.mark.parametrize("uri", ["sqlite:////dev/null/mlflow.db", "nonsense://"])
def test_a_tracking_store_that_cannot_be_written_costs_one_warning(runs: Path, uri: str) -> None:
    done = run(runs, *SMALL, MLFLOW_TRACKING_URI=uri, **CHEAP)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("warning: MLflow cannot be written") == 1
    assert {c.status for c in results(runs).cells} == {"ok"}


def test_a_damaged_gguf_is_told_by_its_hash_and_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    """The package that carries the weights is replaced by one whose file is cut off."""
    from dllm_core.backbone.sources import EMBEDDED

    (model,) = EMBEDDED.values()
    file = tmp_path / "packages" / model.package / model.file
    file.parent.mkdir(parents=True)
    (tmp_path / "packages" / model.package / "__init__.py").touch()
    file.write_bytes(b"GGUF\3\0\0\0 and no more")
    arguments = ("run", "--preset", "laptop", "--cells", "random_mask")
    done = run(runs, *arguments, PYTHONPATH=str(tmp_path / "packages"), DLLM_TRACKING="off")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()
    at = next(i for i, line in enumerate(last) if line.startswith("step 'prepare_data' failed: "))
    assert re.search(rf"is damaged: its SHA-256 is [0-9a-f]{{64}}, expected {model.sha256}\.", last[at])
    assert last[at + 1].strip().startswith("Reinstall the package it came with")
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(runs.glob("cache/[a-z]*/*")), "no entry, locks aside"
    assert {p.name for p in runs.glob("work/**/*") if p.is_file()} <= {"key.json"}, "nothing half-written"


def test_a_damaged_cache_entry_is_rebuilt_and_nothing_else_is(runs: Path) -> None:
    cells = ("run", "--preset", "test", "--cells", "random_mask,repr_align_all")
    assert run(runs, *cells, DLLM_TRACKING="off").returncode == 0
    cell = (runs / "reports" / "latest" / "cells" / "random_mask").resolve()
    weights = cell / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = run(runs, *cells, DLLM_TRACKING="off")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"train_cell/random_mask.* damaged|damaged.* train_cell/random_mask", done.stdout)) == 1
    assert re.search(r"\[random_mask\] step \d+/", done.stdout)
    assert not re.search(r"\[repr_align_all\] step \d+/", done.stdout)
    assert (runs / "reports" / "latest" / "cells" / "random_mask" / "model.safetensors").read_bytes() == whole


def on_a_terminal(runs: Path, *arguments: str, interrupt_at: str = "", **extra: str) -> tuple[int, str]:
    """Run the flow on a pseudo-terminal; type Ctrl-C once the output matches `interrupt_at`. Return status, output."""
    pid, screen = pty.fork()
    if pid == 0:
        env = environment(runs, TERM="xterm", COLUMNS="100", **extra)
        os.execve(sys.executable, [sys.executable, str(FLOW), *arguments], env)
    seen, deadline, typed = b"", time.monotonic() + 300, False
    try:
        while time.monotonic() < deadline:
            if not select.select([screen], [], [], 1.0)[0]:
                continue
            try:
                piece = os.read(screen, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            seen += piece
            if interrupt_at and not typed and re.search(interrupt_at.encode(), seen):
                os.write(screen, b"\x03")
                typed = True
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(screen)
    return os.waitstatus_to_exitcode(status), seen.decode()


def test_on_a_terminal_one_bar_is_redrawn_below_the_log(runs: Path) -> None:
    status, text = on_a_terminal(runs, *SMALL, DLLM_TRACKING="off", **CHEAP)
    assert status == 0, text
    frames = text.split("\r\x1b[K")
    bars = [frame for frame in frames if re.match(r"\[\w+\] [#-]{24} ", frame)]
    assert bars, "no bar was drawn"
    assert not [frame for frame in bars if "\n" in frame.rstrip("\r\n") or len(frame.rstrip()) > 100]
    kept = re.sub(r"[^\n]*\r\x1b\[K", "", text).replace("\r\n", "\n")
    kept = re.sub(r"\x1b\[[0-9;]*[mK]", "", kept)  # Metaflow's own colours
    assert "\x1b" not in kept
    assert "\r" not in kept
    assert not re.search(r"^\[\w+\] [#-]{24}", kept, flags=re.MULTILINE), "a bar stayed behind"
    assert "report.md" in "".join(kept.splitlines()[-6:])


def test_ctrl_c_on_a_terminal_ends_with_130_and_a_state_to_go_on_from(runs: Path) -> None:
    longer = ("--preset", "test", "--cells", "random_mask", "--set", "budget.value=64000,train.checkpoint_every_s=0.2")
    well_under_way = r"\[random_mask\] #[#-]* step "  # however fast the machine is
    status, text = on_a_terminal(runs, "run", *longer, interrupt_at=well_under_way, DLLM_TRACKING="off")
    assert status == 130, text
    assert "Interrupted." in text
    command = re.search(r"python \S*compare_grid\.py (resume --origin-run-id \d+)", text)
    assert command, text
    done = run(runs, *command[1].split(), DLLM_TRACKING="off")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[random_mask\] continues after step [1-9]", done.stdout), "it started from the beginning"
