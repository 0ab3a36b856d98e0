"""The evaluation and benchmark steps on a tiny converted model, without a flow."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm_core.methods
import params
from dllm_core.backbone.contract import read_contract
from dllm_core.backbone.sources import read_config
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import DllmError
from dllm_core.evals.memory import loaded_bytes
from dllm_core.evals.nelbo import block_nelbo
from dllm_core.methods.cell import load_cell, save_cell
from dllm_core.methods.registry import room_method, room_options
from dllm_core.methods.requirements import AnchorNeed
from params.schema import CellSpec, GridSpec, RowSpec
from steps.benchmark import ROOM_TO_WORK_BYTES, benchmark
from steps.context import Context
from steps.estimates import ModelShape, laid_out_bytes
from steps.evaluate_cell import evaluate_cell, judge_identity
from steps.row_options import options_of
from tests.row_tools import Data, Model, Trained, model_and_data, moved_cell
from tests.toy_latent import write_room

METRICS = {
    "nelbo_nats_per_token",
    "ppl_bound",
    "bits_per_byte",
    "block_nelbo_nats_per_token",
    "block_size",
    "exact_nats_per_token",
    "perplexity",
    "masked_accuracy",
    "masked_nll",
    "unigram_nats_per_token",
    "frontier",
    "reference_text",
    "samples",
    "history",
    "prediction_strip",
    "num_sequences",
    "num_documents",
    "num_scored_tokens",
    "eval_s",
    "dtype",
    "per_sequence",
    "diagnostics",
}


@dataclass
class World:
    spec: GridSpec
    model: Model
    data: Data
    ctx: Context
    log: list[str]

    def train(self, row_id: str, nudge: float) -> Trained:
        """Save the base model, slightly moved, as a finished cell."""
        row = next(r for r in self.spec.rows() if r.row_id == row_id)
        directory = Path(self.data.train_dir).parent / row_id
        return moved_cell(self.model, directory, row.cell.method, options_of(row), nudge)


@pytest.fixture
def world(tmp_path: Path, tiny_source_dir: Path) -> World:
    model, data = model_and_data(tmp_path, tiny_source_dir)
    settings: dict[str, Any] = {
        "eval.dtype": "fp32",
        "train.dtype": "fp32",
        "runtime.device": "cpu",
        "bench.steps": "[2, 4]",
        "bench.rounds": "2",
    }
    spec = params.load("test", overrides=settings)
    log: list[str] = []
    return World(spec, model, data, Context(run_id="one", runs_dir=tmp_path / "runs", log=log.append), log)


def no_nan(value: Any) -> bool:
    return json.dumps(value, allow_nan=False) is not None


def test_untrained_ar_row_is_measured_from_the_base(world: World) -> None:
    row = world.spec.row_spec("ar", 0)
    found = evaluate_cell(world.spec, row, None, world.model, world.data, world.ctx)
    metrics = found.metrics
    assert set(metrics) == METRICS
    assert metrics["nelbo_nats_per_token"] is None
    assert metrics["masked_accuracy"] == {}
    assert metrics["history"] is None
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["exact_nats_per_token"]["value"]))
    assert set(metrics["per_sequence"]) == {"exact"}
    assert no_nan(metrics)
    assert json.loads(Path(found.path).read_text()) == metrics


def test_masked_row_gets_both_bounds_and_pictures(world: World) -> None:
    row = world.spec.row_spec("random_mask", 0)
    found = evaluate_cell(world.spec, row, world.train("random_mask", 0.01), world.model, world.data, world.ctx)
    metrics, settings = found.metrics, world.spec.eval
    assert set(metrics) == METRICS
    assert metrics["exact_nats_per_token"] is None
    assert set(metrics["per_sequence"]) == {"nelbo", "block_nelbo"}
    for name in ("nelbo", "block_nelbo"):
        per = metrics["per_sequence"][name]
        assert len(per["nats"]) == len(per["tokens"]) == settings.nelbo_sequences == metrics["num_sequences"]
        assert metrics[f"{name}_nats_per_token"]["value"] == pytest.approx(sum(per["nats"]) / sum(per["tokens"]))
    assert set(metrics["masked_accuracy"]) == set(metrics["masked_nll"]) == {"0.15", "0.5", "0.85"}
    assert [p["temperature"] for p in metrics["frontier"]] == [*settings.frontier_temperatures]
    assert {p["judge"] for p in metrics["frontier"]} == {"base (self-judged)"}
    assert len(metrics["history"]["commit_step"]) == len(metrics["history"]["tokens"]) == 16
    assert set(metrics["history"]["commit_step"]) == {1, 2, 3, 4}
    strip = metrics["prediction_strip"]
    assert len(strip["tokens"]) == len(strip["state"]) == 24
    assert strip["state"][:8] == ["given"] * 8
    assert strip["state"].count("given") == 8 + 8
    assert len(metrics["samples"]) == settings.frontier_samples * len(settings.frontier_temperatures)
    assert no_nan(metrics)


def test_the_base_never_stands_in_for_a_lost_cell(world: World) -> None:
    row, lost = world.spec.row_spec("random_mask", 0), Trained(world.data.train_dir)
    with pytest.raises(DllmError):
        evaluate_cell(world.spec, row, lost, world.model, world.data, world.ctx)


def test_results_are_found_again_under_what_they_depend_on(world: World) -> None:
    row, trained = world.spec.row_spec("random_mask", 0), world.train("random_mask", 0.01)
    first = evaluate_cell(world.spec, row, trained, world.model, world.data, world.ctx)
    again = evaluate_cell(world.spec, row, trained, world.model, world.data, world.ctx)
    assert (first.hit, again.hit, again.metrics) == (False, True, first.metrics)
    other = world.spec.model_copy(update={"bench": world.spec.bench.model_copy(update={"rounds": 3})})
    assert evaluate_cell(other, row, trained, world.model, world.data, world.ctx).hit, "speed settings do not matter"
    moved = world.train("random_mask", 0.02)
    assert not evaluate_cell(world.spec, row, moved, world.model, world.data, world.ctx).hit
    deeper = world.spec.model_copy(update={"eval": world.spec.eval.model_copy(update={"nelbo_samples": 3})})
    assert not evaluate_cell(deeper, row, moved, world.model, world.data, world.ctx).hit
    assert sum("reference_text" in line for line in world.log) >= 3, "held-out text is judged once for all rows"


def test_equal_weights_give_equal_numbers_in_any_room_of_the_family(world: World) -> None:
    """Noise is common to all rows: a paired difference of equal models is exactly zero."""
    found = [
        evaluate_cell(
            world.spec, world.spec.row_spec(name, 0), world.train(name, 0.01), world.model, world.data, world.ctx
        ).metrics
        for name in ("random_mask", "repr_align_all")
    ]
    for key in ("per_sequence", "masked_nll", "frontier"):
        assert found[0][key] == found[1][key]


def test_benchmark_times_all_rows_and_marks_the_untrained(world: World) -> None:
    names = ("ar", "random_mask", "repr_align_4", "repr_align_all")
    rows = [world.spec.row_spec(n, 0) for n in names]
    trained = {n: world.train(n, 0.01) for n in names[1:3]}
    result = benchmark(world.spec, rows, trained, world.model, world.ctx)
    assert set(result.rows) == set(names)
    assert result.rows["repr_align_all"] == {"steps": {}, "trained": False}
    assert set(result.rows["ar"]["steps"]) == {"ar"}
    assert set(result.rows["random_mask"]["steps"]) == {"2", "4"}
    figures = result.rows["random_mask"]["steps"]["4"]
    assert (figures["num_forwards"], figures["tokens_per_forward"]) == (4, 4.0)
    assert len(figures["rounds"]) == 2
    low, high = figures["tokens_per_s"]["ci95"]
    assert low <= figures["tokens_per_s"]["median"] <= high
    assert [(t["rows"], t["steps"]) for t in result.ties] == [
        (["random_mask", "repr_align_4"], "2"),
        (["random_mask", "repr_align_4"], "4"),
    ]
    assert {t["verdict"] for t in result.ties} == {"not resolved"}, "two rounds prove nothing"
    assert no_nan(result.rows)
    assert benchmark(world.spec, rows, trained, world.model, world.ctx).hit
    assert any("repr_align_all was not trained" in line for line in world.log)


def test_a_judge_with_another_tokenizer_is_another_judge(world: World, tmp_path: Path) -> None:
    """A judge whose tokenizer was mended went on with the figures that the broken one had given."""
    directory = tmp_path / "judge"
    shutil.copytree(world.model.path, directory)
    judged = world.spec.eval.model_copy(update={"judge": str(directory)})
    spec = world.spec.model_copy(update={"eval": judged})
    before = judge_identity(spec, world.model)
    assert judge_identity(spec, world.model) == before
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": {"max_length": 4}}))
    assert judge_identity(spec, world.model) != before


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "DLLM_KERNELS"])
def test_speed_is_measured_again_with_other_kernels_or_threads(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The speed of the fast kernels was shown for `DLLM_KERNELS=reference`, which decodes through other modules."""
    rows = [world.spec.row_spec("ar", 0)]
    monkeypatch.delenv(name, raising=False)
    assert not benchmark(world.spec, rows, {}, world.model, world.ctx).hit
    assert benchmark(world.spec, rows, {}, world.model, world.ctx).hit
    monkeypatch.setenv(name, {"OMP_NUM_THREADS": "1", "DLLM_KERNELS": "reference"}[name])
    assert not benchmark(world.spec, rows, {}, world.model, world.ctx).hit


def test_benchmark_in_laps_when_memory_is_short(world: World) -> None:
    tight = world.spec.runtime.model_copy(update={"memory_limit_gb": 0.001})
    spec = world.spec.model_copy(update={"runtime": tight})
    rows = [spec.row_spec(n, 0) for n in ("ar", "random_mask")]
    result = benchmark(spec, rows, {"random_mask": world.train("random_mask", 0.01)}, world.model, world.ctx)
    assert result.together is False
    assert len(result.rows["random_mask"]["steps"]["2"]["rounds"]) == 2
    assert any("one after another" in line for line in world.log)


def test_copies_for_decoding_on_a_cpu_count_in_whether_rows_fit(world: World) -> None:
    """`ar` and two rows that unmask decode from matrices that are laid out a second time."""
    trained = {n: world.train(n, 0.01) for n in ("random_mask", "repr_align_4")}
    rows = [world.spec.row_spec(n, 0) for n in ("ar", *trained)]
    folders = [Path(world.model.path), *(Path(t.cell_dir) for t in trained.values())]
    weights = sum(loaded_bytes(folder, torch.float32) for folder in folders)
    copy = laid_out_bytes(ModelShape.from_config(read_config(world.model.path)), "cpu", "fp32")
    assert copy > 0
    for copies, together in ((2.9, False), (3.1, True)):
        limit = {"memory_limit_gb": (weights + ROOM_TO_WORK_BYTES + copies * copy) / 1e9}
        spec = world.spec.model_copy(update={"runtime": world.spec.runtime.model_copy(update=limit)})
        assert benchmark(spec, rows, trained, world.model, world.ctx).together is together


# -- rows without backbone, masks or bound --------------------------------------------------------------------------


class States:
    """Stands for anchors of one need and their store."""

    teacher, dtype = "teacher-1", "bf16"

    def __init__(self, covers: bool = True) -> None:
        self.covers = covers

    def find(self, need: AnchorNeed) -> object | None:
        return self if self.covers and need.heldout else None

    def open(self) -> States:
        return self

    def states(self, keys: tuple[str, ...]) -> torch.Tensor:
        return torch.full((len(keys),), 0.25)


@pytest.fixture
def latent(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RowSpec, Trained]:
    extra = write_room(tmp_path / "extra")
    monkeypatch.setattr(dllm_core.methods, "__path__", [*dllm_core.methods.__path__, str(extra)])
    base = world.spec.row_spec("random_mask", 0)
    cell = CellSpec(name="toy_latent", method="toy_latent")
    row = base.model_copy(update={"row_id": "toy_latent", "cell": cell})
    method = room_method("toy_latent")(room_options("toy_latent")(), read_contract(world.model.path).model_dump())
    save_cell(
        method, tmp_path / "latent", cell="toy_latent", room="toy_latent", seed=0, tokenizer_dir=Path(world.model.path)
    )
    return row, Trained(str(tmp_path / "latent"))


def test_latent_row_gets_text_overlap_and_health_but_no_likelihood(world: World, latent: Any) -> None:
    found = evaluate_cell(world.spec, latent[0], latent[1], world.model, world.data, world.ctx, anchors=States())
    metrics = found.metrics
    assert set(metrics) == METRICS
    for name in ("nelbo_nats_per_token", "block_nelbo_nats_per_token", "exact_nats_per_token", "bits_per_byte"):
        assert metrics[name] is None
    assert metrics["per_sequence"] == metrics["masked_accuracy"] == metrics["masked_nll"] == {}
    assert metrics["prediction_strip"] is metrics["history"] is None
    assert metrics["diagnostics"] == {
        "reconstruction_accuracy": 0.25,
        "decode_accuracy_from_x0_hat": {"0.2": 0.5, "0.4": None},
        "adaptive_bin_losses": {"0": 1.0, "1": 2.0},
        "num_sequences_seen": metrics["num_sequences"],
        "grad": False,
    }
    assert [p["num_forwards"] for p in metrics["frontier"]] == [5.0], "denoising steps and one pass to decode"
    for point in metrics["frontier"]:
        assert point["unigram_entropy_nats"] == 0.0
        assert 0.0 <= point["overlap_1"] <= 1.0
        assert point["overlap_1_gain"]["value"] == pytest.approx(point["overlap_1"] - point["overlap_1_other"])
    assert no_nan(metrics)


@pytest.mark.parametrize("anchors", [None, States(covers=False)])
def test_without_the_states_there_is_no_health_and_the_log_says_so(world: World, latent: Any, anchors: Any) -> None:
    found = evaluate_cell(world.spec, latent[0], latent[1], world.model, world.data, world.ctx, anchors=anchors)
    assert found.metrics["diagnostics"] == {}
    assert any("toy_latent: no states of held-out sequences" in line for line in world.log)
    whole = evaluate_cell(world.spec, latent[0], latent[1], world.model, world.data, world.ctx, anchors=States())
    assert not whole.hit
    assert whole.metrics["diagnostics"]


def test_states_matter_only_to_rows_that_read_them(world: World) -> None:
    row = world.spec.row_spec("ar", 0)
    evaluate_cell(world.spec, row, None, world.model, world.data, world.ctx)
    again = evaluate_cell(world.spec, row, None, world.model, world.data, world.ctx, anchors=States())
    assert again.hit
    assert again.metrics["diagnostics"] == {}


def test_benchmark_times_latent_rows_by_denoising_steps_and_ties_them_with_nobody(world: World, latent: Any) -> None:
    rows = [world.spec.row_spec("ar", 0), world.spec.row_spec("random_mask", 0), latent[0]]
    trained = {"random_mask": world.train("random_mask", 0.01), "toy_latent": latent[1]}
    result = benchmark(world.spec, rows, trained, world.model, world.ctx)
    figures = result.rows["toy_latent"]
    assert {s: f["num_forwards"] for s, f in figures["steps"].items()} == {"2": 3, "4": 5}
    assert figures["trained"]
    assert figures["load_s"] > 0
    assert result.ties == []
    assert no_nan(result.rows)


def test_a_block_causal_row_has_the_bound_on_its_own_blocks_alone(tmp_path: Path, world: World) -> None:
    overrides = {"eval.dtype": "fp32", "train.dtype": "fp32", "runtime.device": "cpu", "eval.nelbo_samples": "32"}
    overrides["cells.block_causal.options.block_size"] = "4"
    world.spec = params.load("test", cells="block_causal", overrides=overrides)
    row, trained = world.spec.row_spec("block_causal", 0), world.train("block_causal", 0.01)
    metrics = evaluate_cell(world.spec, row, trained, world.model, world.data, world.ctx).metrics
    assert set(metrics) == METRICS
    assert metrics["nelbo_nats_per_token"] is None
    assert metrics["block_size"] == 4
    assert set(metrics["per_sequence"]) == {"block_nelbo"}
    bound = metrics["block_nelbo_nats_per_token"]["value"]
    assert metrics["ppl_bound"] == pytest.approx(math.exp(bound))
    assert metrics["bits_per_byte"] is not None

    # the same bound from views of one block at a time, whose tokens see nothing of what is hidden elsewhere
    method = load_cell(trained.cell_dir)
    heldout = SequenceSet.load(world.data.heldout_dir).batch_of(range(world.spec.eval.nelbo_sequences))
    other = block_nelbo(method, heldout, samples=64, block_size=4, noise=NoiseSource(5)).per_token()
    assert bound == pytest.approx(other.value, abs=0.05)
    assert metrics["history"]["commit_step"], "it decodes block by block, with a history"
    assert no_nan(metrics)
