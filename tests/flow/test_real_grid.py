"""The grid with its real steps: a tiny model, every row, then what a user does next with the result.

One run is shared by the quick tests; the slow ones kill, break and repair runs of their own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flow.grid_runs import FLOW, ROOT, ROWS, environment, results, run

HEALTH = {"ldlm": "reconstruction_accuracy", "vfm": "one_pass_nats", "cola": "reconstruction_accuracy"}
"""Rows that generate through continuous latents, and a figure that their room measures."""
TWO_CELLS = ("run", "--preset", "test", "--cells", "random_mask,repr_align_all")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the runs directory of a finished grid."""
    runs = tmp_path_factory.mktemp("grid") / "runs"
    done = run(runs, "run", "--preset", "test", DLLM_TRACKING="off")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs


@pytest.mark.timeout(900)
def test_every_row_is_trained_measured_and_reported(grid: Path) -> None:
    found = results(grid)
    assert [c.row_id for c in found.cells] == ROWS
    assert all(c.status == "ok" and c.bench and c.eval for c in found.cells)
    for cell in found.cells:
        assert cell.eval is not None
        is_ar, is_latent = cell.method == "ar", cell.method in HEALTH
        has_bound = not (is_ar or is_latent)
        assert (cell.eval.exact_nats_per_token is not None) == is_ar
        assert (cell.eval.nelbo_nats_per_token is not None) == has_bound
        assert (cell.eval.block_nelbo_nats_per_token is not None) == has_bound
        assert bool(cell.eval.diagnostics) == is_latent
        assert not is_latent or HEALTH[cell.method] in (cell.eval.diagnostics or {})
        assert cell.trained == (cell.row_id != "ar")
    assert not found.ranked
    tokens = {c.cost.response_tokens for c in found.cells if c.cost}
    assert len(tokens) == 1, "one budget for all rows"
    assert {p.name for p in (grid / "reports" / "latest").glob("*.png")} >= {"loss_curves.png", "quality_vs_speed.png"}


@pytest.mark.timeout(900)
def test_readme_lines_load_a_cell_and_generate(grid: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    code = blocks[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    small = code.replace("max_new_tokens=64", "max_new_tokens=12").replace(
        "max_denoising_steps=16", "max_denoising_steps=4"
    )
    done = subprocess.run([sys.executable, "-c", small], cwd=grid.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "My fellow citizens" in done.stdout
    assert "[3 tokens per forward]" in done.stdout


@pytest.mark.slow
def test_second_run_computes_nothing(grid: Path) -> None:
    before = results(grid)
    started = time.monotonic()
    done = run(grid, "run", "--preset", "test", DLLM_TRACKING="off")
    assert done.returncode == 0
    assert time.monotonic() - started < 60
    assert not re.search(r"step \d+/\d+ loss", done.stdout), "something was trained again"
    for old, new in zip(before.cells, results(grid).cells, strict=True):
        assert old.eval == new.eval
        assert old.bench == new.bench


@pytest.mark.slow
def test_failed_cell_is_all_that_resume_runs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = run(runs, *TWO_CELLS, DLLM_FAIL_CELL="random_mask")
    assert done.returncode == 1
    assert "cell 'random_mask' failed" in done.stderr
    command = re.search(r"python \S*compare_grid\.py (resume --origin-run-id \d+)", done.stderr)
    assert command, done.stderr
    done = run(runs, *command[1].split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\[random_mask\] step \d+/", done.stdout)
    assert not re.search(r"\[repr_align_all\] step \d+/", done.stdout)
    assert {c.row_id: c.status for c in results(runs).cells} == {"random_mask": "ok", "repr_align_all": "ok"}


def weights(runs: Path, row: str) -> bytes:
    return (runs / "reports" / "latest" / "cells" / row / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_in_the_middle_of_training_it_goes_on_and_ends_at_the_same_bits(tmp_path: Path) -> None:
    """kill -9 of the whole process group, then `run` again: weights equal those of an uninterrupted run."""
    longer = (*TWO_CELLS, "--set", "budget.value=6400,train.checkpoint_every_s=0.2")
    whole, broken = tmp_path / "whole" / "runs", tmp_path / "broken" / "runs"
    for runs in (whole, broken):
        runs.parent.mkdir()
    assert run(whole, *longer, DLLM_TRACKING="off").returncode == 0
    process = subprocess.Popen(
        [sys.executable, str(FLOW), *longer],
        cwd=broken.parent,
        env=environment(broken, DLLM_TRACKING="off"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(r"\[random_mask\] step", line) and list(broken.glob("work/train_cell/*/**/state.json")):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = run(broken, *longer, DLLM_TRACKING="off")
    assert again.returncode == 0, again.stderr[-2000:]
    assert re.search(r"\[random_mask\] continues after step [1-9]", again.stdout), "it started from the beginning"
    for row in ("random_mask", "repr_align_all"):
        assert weights(whole, row) == weights(broken, row)
    lines = (broken / "reports" / "latest" / "cells" / "random_mask").resolve().parent
    metrics = next(lines.rglob("metrics.jsonl")).read_text().splitlines()
    steps = [json.loads(line)["step"] for line in metrics if "train/loss" in json.loads(line)]
    assert steps == sorted(set(steps)), "a step is written once, however often the run was interrupted"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_row_is_trained_after_the_cell_that_it_is_built_on_and_fails_with_it(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    cells = "cola,repr_align_all"
    options = "backbone=repr_align_all", "shape=smoke", "layer=-2"
    settings = ",".join(f"cells.cola.options.{option}" for option in options)
    done = run(runs, "run", "--preset", "test", "--cells", cells, "--set", settings, DLLM_FAIL_CELL="repr_align_all")
    assert done.returncode == 1
    assert "cell 'cola' failed in train_cell: 'cola' is built on 'repr_align_all', whose training failed" in done.stderr
    assert "Mend 'repr_align_all' first, then resume" in done.stderr
    command = re.search(r"python \S*compare_grid\.py (resume --origin-run-id \d+)", done.stderr)
    assert command, done.stderr
    done = run(runs, *command[1].split())
    assert done.returncode == 0, done.stderr[-2000:]
    trained = dict.fromkeys(re.findall(r"\[(\w+)\] step \d+/10 loss", done.stdout))
    assert list(trained) == ["repr_align_all", "cola"]
    assert "anchors of repr_align_all: 48 of 48 sequences x 1 layers to compute" in done.stdout
    found = {c.row_id: c for c in results(runs).cells}
    assert list(found) == cells.split(","), "the table keeps its order"
    cost, donor = found["cola"].cost, found["repr_align_all"].cost
    assert cost is not None
    assert donor is not None
    assert cost.flops > cost.teacher_flops + donor.flops
    assert cost.extraction_s > donor.train_s + donor.extraction_s
    kept = runs / "reports" / "latest" / "cells"
    assert os.path.samefile(
        kept / "cola" / "prompt_backbone" / "model.safetensors", kept / "repr_align_all" / "model.safetensors"
    )
