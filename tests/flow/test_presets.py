"""The larger presets as whole grids, cut down to seconds by `--set` and to a tiny model: the code paths are theirs.

What stays as the preset has it: rows, layer rules, kind of budget, seeds, compute type, and all that is
not in `SMALL`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from dllm_core.methods.cell import load_cell
from dllm_core.methods.layer_rule import layer_names
from steps.report.schema import Results
from tests.flow.grid_runs import ROWS, manifests, results, run
from tests.tiny import TEXT, write_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SMALL = {
    "data.prompt_tokens": 8,
    "data.response_tokens": 16,
    "data.heldout_sequences": 8,
    "train.batch_size": 4,
    "eval.nelbo_sequences": 6,
    "eval.nelbo_samples": 2,
    "eval.block_size": 8,
    "eval.mask_ratio_sequences": 4,
    "eval.frontier_samples": 2,
    "eval.frontier_steps": 4,
    "eval.batch_size": 8,
    "bench.new_tokens": 16,
    "bench.prompt_tokens": 8,
    "bench.rounds": 6,
    "runtime.device": "cpu",
    "runtime.threads": 1,
}


TRAJECTORY = {
    "cells.repr_align_trajectory.options.responses": 4,
    "cells.repr_align_trajectory.options.extraction_block": 8,
    "cells.repr_align_trajectory.options.block_sizes": "[4,8]",
}
LATENT = {f"cells.{name}.options.shape": "smoke" for name in ("ldlm", "vfm", "cola")}
CELLS = ("ar_tuned", "random_mask", "repr_align_all")
"""Rows of the grids of three seeds; each is a task of its own, and a reference, a plain and an aligned one will do."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    # four windows a page: the few held-out sequences are of more than one, else no difference has an error
    for number in range(40):
        (directory / f"page{number:02}.txt").write_text(f"Page {number} of a book.\n" + TEXT[:80])
    return directory


def small_run(
    runs: Path, preset: str, model: Path, text: Path, *arguments: str, settings: Mapping[str, object]
) -> Results:
    """Run a preset cut down to seconds and return its results; every row has to be whole."""
    done = run(
        runs,
        *("run", "--preset", preset, "--model", str(model), "--data", str(text), *arguments),
        *("--set", ",".join(f"{key}={value}" for key, value in {**SMALL, **settings}.items())),
        DLLM_TRACKING="off",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = results(runs)
    assert found.preset == preset
    assert all(c.status == "ok" and c.eval for c in found.cells)
    assert all((c.bench is not None) == (c.seed == found.seeds[0]) for c in found.cells), "one seed tells the speed"
    assert all((c.train is not None) == (c.cost is not None) == c.trained for c in found.cells)
    report = (runs / "reports" / "latest" / "report.md").read_text()
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", report), "a number is missing in the report"
    return found


def test_the_published_grid_on_a_tiny_qwen3_directory(tmp_path: Path, text: Path) -> None:
    """Eight blocks: `quarters` is 2, 4, 6, 8, as it is 7, 14, 21, 28 of 28; the budget stays passes over the data."""
    runs = tmp_path / "runs"
    model = write_source(tmp_path / "qwen3", "qwen3", layers=8, max_length=64)
    sequences, epochs = 30, 1.5
    steps = math.ceil(epochs * sequences / 4)
    assert steps == 12, "11.25: the last batch is whole"
    settings = {"budget.value": epochs, "data.train_sequences": sequences, "bench.steps": "[8]"}
    found = small_run(runs, "qwen3_1_7b", model, text, settings=TRAJECTORY | LATENT | settings)
    assert [c.row_id for c in found.cells] == ROWS
    assert found.budget == {"kind": "epochs", "value": epochs}
    assert found.data["num_train"] == sequences
    assert not found.ranked
    assert {c.row_id: c.train.steps for c in found.cells if c.train} == dict.fromkeys(ROWS[1:], steps)
    assert {c.cost.response_tokens for c in found.cells if c.cost and c.trained} == {steps * 4 * 16}
    assert {tuple(c.bench.steps) for c in found.cells if c.bench} == {("ar",), ("8",)}
    read = {"repr_align_4": ("2", "4", "6", "final"), "repr_align_all": layer_names("all", 8)}
    for name, layers in read.items():
        method = load_cell(runs / "reports" / "latest" / "cells" / name)
        assert method.options.requirements(8).anchors.layers == layers
    kept = {tuple(m["material"]["fields"]["layers"]) for m in manifests(runs, "anchors")}
    assert kept == {("2", "4", "6", "final"), layer_names("all", 8), ("6",)}


@pytest.mark.parametrize("preset", ["overnight", "gpu_small"])
def test_three_seeds_rank_quality(preset: str, tmp_path: Path, text: Path) -> None:
    runs = tmp_path / "runs"
    model = write_source(tmp_path / "llama", "llama", layers=4, max_length=64)
    settings = {"budget.value": 256, "bench.steps": "[4]", "bench.batch_sizes": "[1]"}
    found = small_run(runs, preset, model, text, "--cells", ",".join(CELLS), settings=settings)
    assert found.seeds == [0, 1, 2]
    assert found.ranked
    assert [c.row_id for c in found.cells] == [f"{name}-seed{seed}" for name in CELLS for seed in (0, 1, 2)]
    losses = {c.row_id: c.train.final_loss for c in found.cells if c.train and c.trained}
    assert len(set(losses.values())) == len(losses), "every seed trains on its own noise"
    assert all(c.eval.num_documents > 1 for c in found.cells if c.eval)
    report = (runs / "reports" / "latest" / "report.md").read_text()
    likelihood = next(line for line in report.splitlines() if line.startswith("- Likelihood"))
    assert "ot ranked" not in likelihood
