"""The inference benchmark end to end at a size for tests, and the counts behind its roofline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _report, ceilings, latent_models, ldlm_inference
from dllm_core.layers import packed_linear
from dllm_core.methods.ldlm.fast import FastSampler
from dllm_core.methods.ldlm.plans import Plan
from dllm_core.methods.ldlm.plans import Shape as Work
from dllm_core.methods.ldlm.shapes import SHAPES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("speed") / "out.json"
    assert ldlm_inference.main(["--quick", "--shapes", "smoke", "--device", "cpu", "--out", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_the_record_says_what_was_measured_and_on_what(record: dict[str, Any]) -> None:
    assert record["benchmark"] == "ldlm_inference"
    assert {"commit", "dirty", "seed", "hardware", "versions", "date", "settings"} <= set(record)
    assert "random" in record["weights"]
    assert "each weight" in record["roofline"]
    for name in ldlm_inference.SHAPES:
        assert record["shapes"][name] == _report.NOT_MEASURED
    smoke = record["shapes"]["smoke"]
    assert smoke["parameters"] > 0
    varied = [(p["tokens"], p["batch"], p["steps"]) for p in smoke["points"]]
    assert varied == [(64, 1, 10), (96, 1, 10), (64, 2, 10), (64, 1, 2)]


def test_every_number_follows_from_the_rounds(record: dict[str, Any]) -> None:
    for point in record["shapes"]["smoke"]["points"]:
        assert point["check"]["passed"]
        assert point["ceilings"]["gb_per_s"] >= point["ceilings"]["copy_gb_per_s"] > 0
        assert point["check"]["latents_relative_difference"] < 5e-2
        assert point["fast_over_eager"]["rows"] == ["fast", "eager"]
        for row in (point["fast"], point["eager"]):
            speeds = sorted(row["rounds"])
            assert len(speeds) == ldlm_inference.LEAST_ROUNDS
            median = (speeds[2] + speeds[3]) / 2
            assert row["tokens_per_s"]["median"] == pytest.approx(median)
            assert row["tokens_per_s"]["ci95"][0] <= median <= row["tokens_per_s"]["ci95"][1]
            seconds = point["tokens"] * point["batch"] / median
            assert row["gb_per_s"] == pytest.approx(point["demand"]["bytes"] / seconds / 1e9)
            assert row["tflop_per_s"] == pytest.approx(point["demand"]["flops"] / seconds / 1e12)
            assert row["share_of_roofline"] == pytest.approx(point["demand"]["floor_s"] / seconds)
            assert row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p99"]


def test_the_table_says_that_weights_are_random(record: dict[str, Any]) -> None:
    text = ldlm_inference.table(record)
    assert text.splitlines()[0].startswith("Weights: random")
    assert "qwen3_6_27b      not measured" in text
    assert text.count("smoke  ") == 4


def test_points_vary_one_factor_at_a_time() -> None:
    base, *others = ldlm_inference.points(quick=False)
    assert base == {"tokens": 64, "batch": 1, "steps": 10}
    assert all(sum(point[k] != base[k] for k in base) == 1 for point in others)
    for name, values in (
        ("tokens", [64, 128, 256, 512]),
        ("batch", [1, 2, 4, 8, 16, 32]),
        ("steps", [1, 2, 4, 10, 20]),
    ):
        assert sorted({point[name] for point in [base, *others]}) == values


def test_percentiles_are_latencies_that_occurred() -> None:
    seconds = [i / 1000 for i in range(1, 11)]
    assert ldlm_inference.percentiles(seconds[::-1]) == {"p50": 5.0, "p90": 9.0, "p99": 10.0}


def test_a_run_that_ran_out_of_time_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    monkeypatch.setattr(_report, "commit", lambda: {"commit": "abc", "dirty": False})
    monkeypatch.setattr(
        ldlm_inference, "points", lambda quick: [{**ldlm_inference.BASE_POINT, "steps": n} for n in (1, 2)]
    )
    clock, taken = iter(range(1000)), list[tuple[str, int]]()
    monkeypatch.setattr(ldlm_inference.time, "monotonic", lambda: next(clock))

    def pretend(bench: ldlm_inference.Bench, name: str, limits: Any) -> dict[str, Any]:
        taken.append((name, bench.work.steps))
        return {"tokens": 64, "batch": 1, "steps": bench.work.steps, "fast": {}, "check": {"passed": True}}

    monkeypatch.setattr(ldlm_inference, "measure", pretend)
    monkeypatch.setattr(ldlm_inference, "line", lambda name, point: "")

    def steps_of(*more: str) -> list[int]:
        taken.clear()
        command = ["--quick", "--shapes", "smoke", "--device", "cpu", "--out", str(path), *more]
        assert ldlm_inference.main(command) == 0
        return [steps for _, steps in taken]

    # the clock ticks at every look: at the start, before the shape, before each point
    assert steps_of("--time-limit", "2") == [1]
    assert [p["fast"] for p in json.loads(path.read_text())["shapes"]["smoke"]["points"]] == [{}, "not measured"]
    assert steps_of() == [2]
    assert steps_of() == []
    assert [p["fast"] for p in json.loads(path.read_text())["shapes"]["smoke"]["points"]] == [{}, {}]
    assert steps_of("--seed", "1") == [1, 2]
    monkeypatch.setattr(_report, "commit", lambda: {"commit": "abd", "dirty": False})
    assert steps_of("--seed", "1") == [1, 2]
    monkeypatch.setattr(_report, "commit", lambda: {"commit": "abd", "dirty": True})
    assert steps_of("--seed", "1") == [1, 2]


def test_a_fast_path_that_differs_is_not_timed_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Plan._predict
    monkeypatch.setattr(Plan, "_predict", lambda self, k: 1.1 * honest(self, k))
    path = tmp_path / "out.json"
    assert ldlm_inference.main(["--quick", "--shapes", "smoke", "--device", "cpu", "--out", str(path)]) == 1
    points = json.loads(path.read_text())["shapes"]["smoke"]["points"]
    assert not points[0]["check"]["passed"]
    assert "fast" not in points[0]


def test_a_shape_that_does_not_fit_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ldlm_inference, "measure", full)
    path = tmp_path / "out.json"
    assert ldlm_inference.main(["--quick", "--shapes", "smoke", "--device", "cpu", "--out", str(path)]) == 0
    points = json.loads(path.read_text())["shapes"]["smoke"]["points"]
    assert {point["fast"] for point in points} == {"not measured: out of memory"}


def test_unknown_shapes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ldlm_inference.main(["--shapes", "qwen9"])
    assert "known: " in capsys.readouterr().err


# -- counts -----------------------------------------------------------------------------------------------------------


def test_random_models_are_made_as_they_run() -> None:
    method = latent_models.random_model("smoke", CPU, torch.bfloat16, 0)
    assert {p.dtype for p in method.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta or not p.any() or not p.isfinite().all() for p in method.parameters())
    assert not list(method.ema.averages())
    assert int(method.ema.num_updates) == 0
    again = latent_models.random_model("smoke", CPU, torch.bfloat16, 0)
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["smoke", *ldlm_inference.SHAPES])
def test_weights_are_those_that_a_generation_reads(name: str) -> None:
    with torch.device("meta"):
        shape, base = SHAPES[name], latent_models.BASES[name]
        from dllm_core.methods.ldlm.networks import LatentNetworks

        networks = LatentNetworks(shape, base.hidden, base.vocab)

    def matrices(module: nn.Module, *without: str) -> int:
        return sum(p.numel() for n, p in module.named_parameters() if p.ndim > 1 and not any(w in n for w in without))

    found = {p.name: p.weights for p in latent_models.passes(name, Work(2, 8, 16, 4, "ddim"))}
    prefix = sum(block.attention.to_key_value.weight.numel() for block in networks.denoiser.dit.blocks)  # type: ignore[union-attr,operator]
    assert found == {
        "prompt": matrices(networks.prompt_encoder) + prefix,
        "denoiser": matrices(networks.denoiser, "modulation", "time"),
        "latent decoder": matrices(networks.latent_decoder),
        "token decoder": matrices(networks.token_decoder),
        "token head": base.hidden * base.vocab,
    }


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_operations_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch, guidance: float) -> None:
    monkeypatch.setattr(packed_linear, "reorders", lambda dtype: False)  # torch does not count oneDNN's own products
    method = latent_models.random_model("smoke", CPU, torch.bfloat16, 0)  # in bf16 attention is two plain products
    work = Work(2, 8, 16, 3, "ddim", guidance)
    plan = FastSampler(method).plan(work)
    with FlopCounterMode(display=False) as counter:
        plan.run()
    counted = sum(p.times * p.flops for p in latent_models.passes("smoke", work))
    # with guidance the passes without a prompt look at fewer keys and need no second product with the input
    if guidance == 1.0:
        assert counter.get_total_flops() == counted
    else:
        assert 0.85 * counted < counter.get_total_flops() < counted


def test_activations_counted_by_hand() -> None:
    found = {p.name: p.activations for p in latent_models.passes("smoke", Work(2, 8, 16, 3, "ddim"))}
    # 32 rows; in and out: 2 x 32 -> 64 and 64 -> 32; a block's products 64 -> 192, 64 -> 64, 64 -> 256, 256 -> 64; and
    # 16 queries and results, 24 keys and values a row of the batch
    block = 32 * (256 + 128 + 320 + 320)
    assert found["denoiser"] == 32 * (128 + 96) + 2 * (block + 2 * 64 * (2 * 16 + 2 * 24))
    # 32 -> 64 and 96 -> 48; 32 keys and values, of which 16 are made of the input, 64 -> 128
    assert found["latent decoder"] == 32 * (96 + 144) + block + 2 * 64 * (2 * 16 + 2 * 32) + 32 * 192
    assert found["token head"] == 32 * (48 + 512)


def test_the_floor_takes_the_slower_of_bytes_and_operations_pass_by_pass() -> None:
    work = [latent_models.Pass("a", 2, 3e12, 1e9, 0.0), latent_models.Pass("b", 1, 1e12, 4e9, 1e9)]
    found = ceilings.demand(work, 2, {"gb_per_s": 1.0, "tflop_per_s": 1.0})
    assert found["bytes"] == 2 * 2e9 + 10e9
    assert found["flops"] == 7e12
    assert found["floor_s"] == 2 * 3.0 + 10.0
    assert found["bound_by"] == {"a": "operations", "b": "bytes"}
    assert ceilings.achieved(found, 32.0)["share_of_roofline"] == 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_benchmark_runs_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert ldlm_inference.main(["--quick", "--shapes", "smoke", "--out", str(path)]) == 0
    found = json.loads(path.read_text())["shapes"]["smoke"]
    assert found["fast_path"]["graphs"]
    assert all(point["fast"]["peak_gb"] > 0 for point in found["points"])
