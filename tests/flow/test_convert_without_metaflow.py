"""The conversion of the GPU suite beside the flow: the same numbers in the same form; killed, and gone on."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import convert, convert_grid, parts
from steps.report.schema import Results
from tests.convert_tools import SETTINGS, results, small, where_much_is_missing, write_inputs
from tests.flow import grid_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
CLOCKED = {"run_id", "created_at", "command", "origin", "hardware", "versions", "git_commit", "git_dirty"}
CLOCKED |= {"tokens_per_s", "first_token_s", "load_s", "eval_s", "train_s", "extraction_s", "wall_s", "seconds"}
CLOCKED |= {"peak_memory_gb", "rounds", "hit", "ties", "speed_contrasts"}
"""What differs from run to run, by the clock, the machine or the name."""


def form(value: Any) -> Any:
    """Return what a record is made of: names and types, values left out; of lists the kinds of entries."""
    if isinstance(value, dict):
        return {key: form(entry) for key, entry in value.items()}
    if isinstance(value, list):
        kinds: list[Any] = []
        for entry in map(form, value):
            kinds += [] if entry in kinds else [entry]
        return kinds
    return type(value).__name__


def settled(value: Any) -> Any:
    """Return a record without what differs from run to run."""
    if isinstance(value, dict):
        return {key: settled(entry) for key, entry in value.items() if key not in CLOCKED}
    return [settled(entry) for entry in value] if isinstance(value, list) else value


def test_it_gives_what_the_flow_gives(tmp_path: Path) -> None:
    """Every row; each side with a step cache of its own, so that nothing is taken over."""
    inputs = write_inputs(tmp_path / "inputs")
    process = where_much_is_missing(small(tmp_path, inputs), OMP_NUM_THREADS="1")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == convert.OK, said
    ours = results(tmp_path)

    settings = {**SETTINGS, "runtime.device": "cpu"}
    flow_runs = tmp_path / "flow-runs"
    done = grid_runs.run(
        flow_runs,
        *("run", "--preset", "test", "--cells", convert_grid.CELLS, *inputs),
        *("--set", ",".join(f"{key}={value}" for key, value in settings.items())),
        DLLM_TRACKING="off",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    theirs = grid_runs.results(flow_runs)

    assert [row.row_id for row in ours.cells] == convert_grid.CELLS.split(",")
    left, right = (found.model_dump(mode="json") for found in (ours, theirs))
    assert set(right["hardware"]) <= set(left["hardware"])
    assert settled(left) == settled(right), "the same numbers, whoever calls the steps"
    for record in (left, right):
        del record["hardware"]
        for row in record["cells"]:
            del row["origin"]  # a row that was taken from the cache has one
    assert form(left) == form(right), "what goes by the clock has the same names and types"


def test_a_killed_conversion_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 in the middle of training; the weights are those of a run that was left alone, bit for bit."""
    inputs = write_inputs(tmp_path / "inputs")
    longer = ("--cells", "random_mask", "--set", "budget.value=12800", "--set", "train.checkpoint_every_s=0.2")
    process = where_much_is_missing(small(tmp_path / "killed", inputs, *longer), OMP_NUM_THREADS="1")
    work = tmp_path / "killed" / "runs" / "work" / "train_cell"
    ends = time.monotonic() + 300
    while not list(work.glob("*/checkpoints/step_????????")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for place in ("killed", "alone"):
        process = where_much_is_missing(small(tmp_path / place, inputs, *longer), OMP_NUM_THREADS="1")
        said, _ = process.communicate(timeout=600)
        assert process.returncode == convert.OK, said
        assert bool(re.search(r"continues after step [1-9]\d* of 200", said)) == (place == "killed")
    weights = [
        next((tmp_path / place / "runs" / "cache" / "train_cell").glob("*/payload/cell/model.safetensors")).read_bytes()
        for place in ("killed", "alone")
    ]
    assert weights[0] == weights[1]


def test_calls_with_a_deadline_finish_the_work_between_them(tmp_path: Path) -> None:
    """Real seconds: every call ends within its own, and leaves less for the next."""
    inputs = write_inputs(tmp_path / "inputs")
    cells = "ar_tuned,random_mask,repr_align_4,block_causal"
    arguments = small(tmp_path, inputs, "--cells", cells, "--set", "budget.value=64000", "--deadline", "45")
    statuses = []
    for _ in range(12):
        begun = time.monotonic()
        process = where_much_is_missing(arguments, OMP_NUM_THREADS="1")
        said, _ = process.communicate(timeout=300)
        statuses.append(process.returncode)
        assert time.monotonic() - begun < 60, said
        if process.returncode == convert.OK:
            break
        assert process.returncode == convert.CALL_AGAIN, said
    assert statuses[-1] == convert.OK
    assert len(statuses) > 1, "one call was enough: this shows nothing"
    assert {row.status for row in results(tmp_path).cells} == {"ok"}


def test_as_a_part_of_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: the second time every row stands in the record already."""
    monkeypatch.setenv("DLLM_RUNS", os.environ.get("DLLM_RUNS", ""))
    monkeypatch.setattr(convert_grid, "CELLS", "ar,ar_tuned,block_causal,repr_align_all")

    def context() -> parts.Context:
        head = {"hardware": {"gpu": None}, "commit": "abc", "dirty": False}
        return parts.Context(
            name="convert",
            device=torch.device("cpu"),
            smoke=True,
            seed=0,
            profile=False,
            rows=parts.Rows(tmp_path / "smoke-convert.json", head, {"identity": "this"}),
            work=tmp_path / "work",
            deadline=time.monotonic() + 600,
        )

    first = context()
    whole = convert.run(first)
    assert [told["verdict"] for told in whole["judged_by_part"]] == ["shown", "shown"]
    assert list(first.rows.found) == ["ar", "ar_tuned", "block_causal", "repr_align_all", "benchmark"]
    assert all("found" in row for row in first.rows.found.values()), first.rows.found
    found = Results.model_validate_json((tmp_path / convert_grid.RESULTS).read_text())
    tuned = first.rows.found["ar_tuned"]["found"]["headline"]["nats_per_token"]
    assert tuned == found.cells[1].eval.exact_nats_per_token.value
    assert found.git_commit == "abc"

    again = context()
    assert convert.run(again)["judged_by_part"] == whole["judged_by_part"]
    assert again.rows.found == first.rows.found, "kept, not measured again"
