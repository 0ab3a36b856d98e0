"""The training step on a tiny model: cached, resumable, and bit-equal with or without a shared first part."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import params
from dllm_core.backbone.conversion import convert
from dllm_core.errors import DllmError
from dllm_core.methods.cell import load_cell
from dllm_core.training.metrics_log import MetricsLog
from params.schema import GridSpec
from steps.cache_anchors import AnchorArtifact, cache_anchors
from steps.context import Context
from steps.extract_trajectories import extract_trajectories
from steps.prepare_data import DataArtifact
from steps.prepare_model import ModelArtifact
from steps.train_cell import TrainedCell, train_cell
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS, ROWS

NUM, LENGTH, PROMPT, BATCH, STEPS = 24, 24, 8, 4, 10
OVERRIDES = {
    "data.train_sequences": str(NUM),
    "data.heldout_sequences": "8",
    "train.batch_size": str(BATCH),
    "train.dtype": "fp32",
    "budget.kind": "tokens",
    "budget.value": str(STEPS * BATCH * (LENGTH - PROMPT)),
    "runtime.device": "cpu",
    "cells.repr_align_trajectory.options.responses": "6",
}


@dataclass
class World:
    """A prepared model and data, and the means to run steps on them."""

    root: Path
    model: ModelArtifact
    data: DataArtifact

    def spec(self, *cells: str, **overrides: str) -> GridSpec:
        dotted = {name.replace("__", "."): value for name, value in overrides.items()}
        given = {**OVERRIDES, **dotted}
        if "repr_align_trajectory" not in cells:
            del given["cells.repr_align_trajectory.options.responses"]
        return params.load("test", cells=list(cells), overrides=given)

    def context(self, runs: str = "runs", run_id: str = "first") -> Context:
        lines: list[str] = []
        ctx = Context(run_id=run_id, runs_dir=self.root / runs, device="cpu", log=lines.append)
        ctx.lines = lines  # type: ignore[attr-defined]
        return ctx

    def anchors(self, spec: GridSpec, ctx: Context) -> AnchorArtifact | None:
        return cache_anchors(spec, self.model, self.data, ctx)

    def train(self, spec: GridSpec, cell: str, ctx: Context, seed: int = 0) -> TrainedCell:
        anchors = self.anchors(spec, ctx)
        return train_cell(spec, spec.row_spec(cell, seed), self.model, self.data, anchors, None, ctx)


def _model(root: Path, source: Path) -> ModelArtifact:
    contract = convert(source, root / "model", alignment="shifted")
    return ModelArtifact(
        path=str(root / "model"),
        identity="model",
        tokenizer="tokenizer",
        source=str(source),
        family="llama",
        alignment="shifted",
        mask_token_id=contract.mask_token_id,
        num_tokens=NUM_TOKENS,
        num_layers=2,
        hidden_size=32,
        num_parameters=0,
        max_length=64,
        pretrain_nats_per_token=None,
        key="",
        hit=False,
        origin="first",
        seconds=0.0,
    )


def _data(root: Path) -> DataArtifact:
    train, held = random_sequences(NUM, LENGTH, PROMPT, 9), random_sequences(8, LENGTH, PROMPT, 9, seed=1)
    train.save(root / "train")
    held.save(root / "heldout")
    (root / "keys.json").write_text(json.dumps(list(train.keys)))
    return DataArtifact(
        train_dir=str(root / "train"),
        heldout_dir=str(root / "heldout"),
        keys_file=str(root / "keys.json"),
        fingerprint="data",
        train_fingerprint=train.fingerprint,
        num_train=NUM,
        num_heldout=8,
        mean_response_tokens=float(LENGTH - PROMPT),
        length=LENGTH,
        unigram_nats_per_token=1.0,
        kind="text",
        num_documents=1,
        num_tokens=1,
        train_available=NUM,
        hit=False,
        origin="first",
        seconds=0.0,
    )


@pytest.fixture
def world(tmp_path: Path, tiny_source_dir: Path) -> World:
    return World(tmp_path, _model(tmp_path, tiny_source_dir), _data(tmp_path))


def _weights(cell: TrainedCell) -> dict[str, torch.Tensor]:
    return load_file(Path(cell.cell_dir) / "model.safetensors")


def _assert_equal(a: TrainedCell, b: TrainedCell) -> None:
    left, right = _weights(a), _weights(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_a_row_trains_once_and_can_be_loaded(world: World) -> None:
    spec = world.spec("random_mask")
    ctx = world.context()
    seen: list[tuple[str, int]] = []
    ctx.listeners.append(lambda row, record: seen.append((row, record["step"])))
    trained = world.train(spec, "random_mask", ctx)
    assert not trained.hit
    assert seen == [("random_mask", step) for step in range(1, STEPS + 1)]
    summary = trained.summary
    assert summary["steps"] == STEPS
    assert summary["response_tokens"] == STEPS * BATCH * (LENGTH - PROMPT)
    assert summary["distinct_samples"] == NUM
    assert summary["teacher_flops"] == summary["extraction_s"] == 0
    rows = MetricsLog(Path(trained.metrics_path)).rows()
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert summary["final_loss"] == pytest.approx(sum(r["train/loss"] for r in rows[-10:]) / 10)

    again = world.train(spec, "random_mask", world.context(run_id="second"))
    assert again.hit
    assert (again.origin, again.summary, again.cell_dir) == ("first", summary, trained.cell_dir)
    cell = load_cell(trained.cell_dir)
    assert cell.backbone.head_weight_VD.shape[0] == ROWS
    assert next(cell.parameters()).dtype == torch.float32


def test_only_what_matters_is_in_the_key(world: World) -> None:
    base = world.train(world.spec("random_mask"), "random_mask", world.context())
    for same in ({"train__log_every_s": "3"}, {"train__checkpoint_every_s": "7"}, {"eval__nelbo_samples": "3"}):
        assert world.train(world.spec("random_mask", **same), "random_mask", world.context()).hit, same
    for other in (
        {"train__lr": "0.01"},
        {"train__batch_size": "2"},
        {"cells__random_mask__options__path_weight": "0.5"},
    ):
        assert not world.train(world.spec("random_mask", **other), "random_mask", world.context()).hit, other
    assert base.key


def test_a_row_that_is_only_measured(world: World) -> None:
    trained = world.train(world.spec("ar", "random_mask"), "ar", world.context())
    assert trained.hit
    assert (trained.cell_dir, trained.metrics_path, trained.summary["steps"]) == ("", "", 0)


def test_a_shared_first_part_changes_nothing(world: World) -> None:
    both = world.spec("repr_align_all", "repr_align_trajectory")
    ctx = world.context("shared")
    anchors = world.anchors(both, ctx)
    orders = extract_trajectories(both, world.model, world.data, anchors, ctx)
    assert orders is not None
    assert list(orders.paths) == ["repr_align_trajectory"]
    rows: list[int] = []
    ctx.listeners.append(lambda row, record: rows.append(record["step"]))
    shared = world.train(both, "repr_align_all", ctx)
    assert rows == list(range(5, STEPS + 1))  # 4 of 10 steps come from the prefix
    branched = world.train(both, "repr_align_trajectory", ctx)
    assert rows[-6:] == list(range(5, STEPS + 1))

    alone = world.train(world.spec("repr_align_all"), "repr_align_all", world.context("alone"))
    _assert_equal(shared, alone)
    for name in ("flops", "teacher_flops", "response_tokens", "positions", "final_losses", "distinct_samples"):
        assert shared.summary[name] == alone.summary[name], name
    ours, theirs = (MetricsLog(Path(t.metrics_path)).rows() for t in (shared, alone))
    assert [r["train/loss"] for r in ours] == [r["train/loss"] for r in theirs]
    phases = [r["phase"] for r in MetricsLog(Path(branched.metrics_path)).rows()]
    assert phases == ["train"] * 4 + ["trajectory"] * 6
    assert not torch.equal(
        _weights(shared)["model.embed_tokens.weight"], _weights(branched)["model.embed_tokens.weight"]
    )
    # every reader is charged for what it reads as if it were alone
    assert branched.summary["extraction_flops"] > 0
    assert branched.summary["extraction_s"] > shared.summary["extraction_s"] > 0
    (part,) = anchors.parts  # type: ignore[union-attr]
    per_sequence = part.flops / len(part.sample_ids)
    for trained in (shared, branched):
        expected = per_sequence * trained.summary["distinct_samples"]
        assert trained.summary["teacher_flops"] == pytest.approx(expected)
    assert branched.summary["response_tokens"] == shared.summary["response_tokens"]


def test_a_trajectory_row_prepares_what_is_missing(world: World) -> None:
    """Nothing was extracted before; the row alone is in the grid, its donor is not a row."""
    spec = world.spec("repr_align_trajectory")
    trained = world.train(spec, "repr_align_trajectory", world.context())
    assert trained.summary["steps"] == STEPS
    kinds = {p.name for p in (world.root / "runs" / "cache").iterdir() if p.is_dir()}
    assert {"train_prefix", "trajectories", "train_cell"} <= kinds
    assert world.train(spec, "repr_align_trajectory", world.context(run_id="second")).hit


def test_failed_extraction_is_reported_per_row(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = world.spec("random_mask", "repr_align_trajectory")
    ctx = world.context()
    anchors = world.anchors(spec, ctx)
    import steps.trajectory_run as run

    def broken(*_: Any) -> None:
        raise RuntimeError("the student is on strike\nsecond line")

    monkeypatch.setattr(run, "extract", broken)
    found = extract_trajectories(spec, world.model, world.data, anchors, ctx)
    assert found is not None
    assert found.errors == {"repr_align_trajectory": "the student is on strike"}
    assert not found.paths
    row = spec.row_spec("repr_align_trajectory", 0)
    with pytest.raises(RuntimeError, match="on strike"):
        train_cell(spec, row, world.model, world.data, anchors, found, ctx)
    monkeypatch.undo()
    assert train_cell(spec, row, world.model, world.data, anchors, found, ctx).summary["steps"] == STEPS


def test_no_orders_are_extracted_when_nobody_trains_on_them(world: World) -> None:
    assert extract_trajectories(world.spec("random_mask"), world.model, world.data, None, world.context()) is None


def test_the_fail_hook_raises_half_way_and_a_second_try_continues(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = world.spec("random_mask", train__checkpoint_every_s="0.000001")
    monkeypatch.setenv("DLLM_FAIL_CELL", "random_mask")
    with pytest.raises(RuntimeError, match=f"step {STEPS // 2}"):
        world.train(spec, "random_mask", world.context())
    (work,) = (world.root / "runs" / "work" / "train_cell").iterdir()
    words = json.loads((work / "last_words.json").read_text())
    assert words["row"] == "random_mask"
    assert words["total_steps"] == STEPS
    assert (work / "checkpoints").is_dir()
    monkeypatch.delenv("DLLM_FAIL_CELL")
    ctx = world.context()
    seen: list[int] = []
    ctx.listeners.append(lambda row, record: seen.append(record["step"]))
    trained = world.train(spec, "random_mask", ctx)
    assert seen[0] == STEPS // 2  # the failing step came before its checkpoint
    assert not work.exists()
    _assert_equal(trained, world.train(world.spec("random_mask"), "random_mask", world.context("other")))
    assert [r["step"] for r in MetricsLog(Path(trained.metrics_path)).rows()] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("kind", ["flops", "seconds"])
def test_budgets_in_flops_and_seconds(world: World, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import steps.train_run as run

    monkeypatch.setattr(run, "seconds_per_step", lambda job, anchors, work: 0.5)
    tokens = world.train(world.spec("repr_align_all"), "repr_align_all", world.context())
    # ten steps of training and one teacher forward for each of the sequences, all of which they present
    value = {"flops": tokens.summary["flops"], "seconds": 5.0}[kind]
    spec = world.spec("repr_align_all", "repr_align_trajectory", budget__kind=kind, budget__value=str(value))
    ctx = world.context("other")
    donor = world.train(spec, "repr_align_all", ctx)
    assert abs(donor.summary["steps"] - STEPS) <= (1 if kind == "flops" else 0)
    branched = world.train(spec, "repr_align_trajectory", ctx)
    phases = [r["phase"] for r in MetricsLog(Path(branched.metrics_path)).rows()]
    # its own steps cost 1.75 times as much (two views of three sequences in four), so there are fewer of them; 16
    # sequences are known from the first four steps, six of the other eight are the subset that it loops over
    per_step = (tokens.summary["flops"] - tokens.summary["teacher_flops"]) / STEPS
    left = 6 + {"flops": 2 * tokens.summary["teacher_flops"] / NUM / per_step, "seconds": 0.0}[kind]
    assert phases.count("train") == 4
    assert phases.count("trajectory") == round(left / 1.75)
    if kind == "flops":
        assert branched.summary["flops"] - branched.summary["extraction_flops"] == pytest.approx(value, rel=0.1)


def test_text_samples_are_kept(world: World) -> None:
    trained = world.train(world.spec("random_mask", train__sample_every_steps="5"), "random_mask", world.context())
    lines = (Path(trained.cell_dir).parent / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10]
    assert all(isinstance(text, str) for line in lines for text in json.loads(line)["texts"])


def test_samples_of_steps_that_are_done_again_are_kept_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two checkpoints left its samples behind, and the resumed run wrote them a second time."""
    spec = world.spec("random_mask", train__sample_every_steps="2")
    monkeypatch.setenv("DLLM_FAIL_CELL", "random_mask")
    with pytest.raises(RuntimeError, match="made to fail"):
        world.train(spec, "random_mask", world.context())
    monkeypatch.delenv("DLLM_FAIL_CELL")
    trained = world.train(spec, "random_mask", world.context())
    lines = (Path(trained.cell_dir).parent / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "DLLM_KERNELS"])
def test_the_time_of_a_step_is_measured_again_under_other_conditions(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget in seconds was turned into steps by what another machine, or another number of threads, had taken."""
    import steps.train_run as run

    times = iter([0.5, 1.0])
    monkeypatch.setattr(run, "seconds_per_step", lambda job, anchors, work: next(times))
    spec = world.spec("random_mask", budget__kind="seconds", budget__value="5.0")
    monkeypatch.delenv(name, raising=False)
    assert world.train(spec, "random_mask", world.context()).summary["steps"] == 10
    assert world.train(spec, "random_mask", world.context(run_id="second")).hit
    monkeypatch.setenv(name, {"OMP_NUM_THREADS": "1", "DLLM_KERNELS": "reference"}[name])
    assert world.train(spec, "random_mask", world.context(run_id="third")).summary["steps"] == 5


def test_a_branch_needs_room(world: World) -> None:
    spec = world.spec("repr_align_trajectory", budget__value=str(BATCH * (LENGTH - PROMPT)))
    with pytest.raises(DllmError, match="between the first and the last"):
        world.train(spec, "repr_align_trajectory", world.context())


def test_looking_up_a_finished_row_imports_no_torch() -> None:
    code = "import steps.train_cell, steps.extract_trajectories, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


def test_activation_checkpointing_and_bf16_run_through_the_step(world: World) -> None:
    settings = {"train__dtype": "bf16", "train__activation_checkpointing": "true", "train__micro_batch_size": "2"}
    trained = world.train(world.spec("repr_align_4", **settings), "repr_align_4", world.context())
    assert all(t.dtype == torch.float32 for t in _weights(trained).values())
