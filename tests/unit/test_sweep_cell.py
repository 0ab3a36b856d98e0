"""The sweep step on a tiny converted model: what it adds, what it finds again, what latent rows get."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dllm_core.methods
import params
from dllm_core.backbone.contract import read_contract
from dllm_core.methods.cell import save_cell
from dllm_core.methods.registry import room_method, room_options
from params import ParamsError
from params.schema import CellSpec, GridSpec, RowSpec
from steps.context import Context
from steps.evaluate_cell import Evaluation
from steps.sweep_cell import sweep_cell
from tests.plan_tools import plan
from tests.row_tools import Data, Model, Trained, model_and_data, moved_cell
from tests.toy_latent import write_room

BEFORE = Evaluation("metrics.json", {"nelbo_nats_per_token": {"value": 4.0, "se": 0.1}}, "key", False, "one", 1.0)
ON = {
    "eval.step_sweep": "{steps: [2, 8], samples: 3, infill_tokens: 6, infill_sequences: 4}",
    "eval.parallelism": "{sequences: 3, infill_tokens: 6, thresholds: [0.5, 0.03], factors: [], block_size: 4}",
}


@dataclass
class World:
    model: Model
    data: Data
    ctx: Context

    def spec(self, **overrides: str) -> GridSpec:
        settings: dict[str, Any] = {"eval.dtype": "fp32", "runtime.device": "cpu", "runtime.threads": "1"}
        return params.load("test", overrides={**settings, **overrides})

    def sweep(self, row_id: str, trained: Trained | None, row: RowSpec | None = None, **overrides: str) -> Evaluation:
        spec = self.spec(**overrides)
        return sweep_cell(spec, row or spec.row_spec(row_id, 0), trained, self.model, self.data, self.ctx, BEFORE)

    def entries(self, kind: str) -> int:
        return len(list((self.ctx.runs_dir / "cache" / kind).glob("*/manifest.json")))


@pytest.fixture
def world(tmp_path: Path, tiny_source_dir: Path) -> World:
    model, data = model_and_data(tmp_path, tiny_source_dir)
    return World(model, data, Context(run_id="one", runs_dir=tmp_path / "runs", log=lambda line: None))


@pytest.fixture
def trained(world: World, tmp_path: Path) -> Trained:
    return moved_cell(world.model, tmp_path / "c", "random_mask", room_options("random_mask")(), 0.01)


def test_nothing_is_swept_unless_asked_for(world: World, trained: Trained) -> None:
    assert world.sweep("random_mask", trained) == BEFORE


def test_presets_for_a_laptop_sweep_nothing_and_longer_ones_both() -> None:
    for name in params.preset_names():
        found = params.load(name).eval
        on = name in ("overnight", "gpu_small")
        assert (found.step_sweep is not None, found.parallelism is not None) == (on, on), name


def test_a_token_row_gets_both_and_keeps_what_it_had(world: World, trained: Trained) -> None:
    metrics = world.sweep("random_mask", trained, **ON).metrics
    assert metrics["nelbo_nats_per_token"] == BEFORE.metrics["nelbo_nats_per_token"]
    assert set(metrics["step_sweep"]["frontier"]) == set(metrics["step_sweep"]["infill"]) == {"2", "8"}
    assert metrics["step_sweep"]["infill_sequences"] == 4
    assert metrics["step_sweep"]["frontier"]["2"][0]["num_samples"] == 3
    rules = [(c["rule"], c["task"], len(c["points"])) for c in metrics["parallelism"]["curves"]]
    assert rules == [
        (rule, task, count)
        for rule, count in (("fixed", 5), ("threshold", 2), ("blocks", 5), ("blocks", 5))
        for task in ("masked", "infill")
    ]
    assert json.dumps(metrics, allow_nan=False)


def test_each_sweep_is_found_again_under_its_own_settings(world: World, trained: Trained) -> None:
    first = world.sweep("random_mask", trained, **ON).metrics
    again = world.sweep("random_mask", trained, **ON, **{"eval.nelbo_samples": "3", "eval.frontier_steps": "2"}).metrics
    assert again == first, "times included: it was not measured again"
    assert (world.entries("step_sweep"), world.entries("parallelism")) == (1, 1)
    world.sweep("random_mask", trained, **ON, **{"eval.step_sweep.samples": "2"})
    assert (world.entries("step_sweep"), world.entries("parallelism")) == (2, 1)
    world.sweep("random_mask", trained, **{**ON, "eval.parallelism.factors": "[1.0]"})
    assert (world.entries("step_sweep"), world.entries("parallelism")) == (2, 2)


def test_a_latent_row_has_text_at_every_number_of_steps_and_reasons_for_the_rest(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = write_room(tmp_path / "extra")
    monkeypatch.setattr(dllm_core.methods, "__path__", [*dllm_core.methods.__path__, str(extra)])
    method = room_method("toy_latent")(room_options("toy_latent")(), read_contract(world.model.path).model_dump())
    save_cell(
        method, tmp_path / "latent", cell="toy_latent", room="toy_latent", seed=0, tokenizer_dir=Path(world.model.path)
    )
    base = world.spec().row_spec("random_mask", 0)
    row = base.model_copy(update={"row_id": "toy_latent", "cell": CellSpec(name="toy_latent", method="toy_latent")})
    metrics = world.sweep("toy_latent", Trained(str(tmp_path / "latent")), row, **ON).metrics
    sweep = metrics["step_sweep"]
    assert {steps: points[0]["num_forwards"] for steps, points in sweep["frontier"].items()} == {"2": 3, "8": 9}
    assert (sweep["infill"], sweep["infill_context"]) == ({}, None)
    assert "cannot fill" in sweep["infill_absent"]
    assert metrics["parallelism"]["curves"] == []
    assert "latents" in metrics["parallelism"]["absent"]


def test_a_sweep_of_nothing_is_refused() -> None:
    empty = "{tokens_per_forward: [], thresholds: [], factors: [], entropy_thresholds: []}"
    with pytest.raises(ParamsError, match="nothing to vary"):
        params.load("test", overrides={"eval.parallelism": empty})


def test_what_sweeps_cost_is_in_the_plan() -> None:
    """Evaluation gets longer with every sweep; of rows that cannot fill in masks not with the curves."""

    def seconds(overrides: str) -> dict[str, float]:
        return {name: cost.evaluate_s for name, cost in plan("laptop", overrides=overrides).cost.rows.items()}

    plain, steps, curves = (seconds(s) for s in ("", "eval.step_sweep={}", "eval.parallelism={}"))
    assert all(steps[name] > plain[name] for name in plain)
    assert curves["random_mask"] > plain["random_mask"]
    assert curves["ar"] == plain["ar"]
    assert curves["ldlm"] == plain["ldlm"]
    doubled = seconds("eval.parallelism={sequences: 16}")
    assert doubled["random_mask"] - plain["random_mask"] == pytest.approx(
        2 * (curves["random_mask"] - plain["random_mask"])
    )
