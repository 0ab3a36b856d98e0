"""The parts of the GPU suite at tiny shapes on a CPU: records that are complete, counts that are right."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import decode_demand, kernel_errors, kernels, parts, profiling, random_backbone, targets, train
from benchmarks.gpu.parts import Context, Rows
from dllm_core.kernels.masked_ce import reference as masked_ce_reference
from dllm_core.kernels.token_stats import reference as token_stats_reference
from dllm_core.layers import packed_linear
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.loop import generate

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
OURS = ("kernels", "ldlm", "decode", "train")


@pytest.fixture(scope="module", params=OURS)
def record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a part writes in a smoke run, as the suite's own process runs it."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = Rows(folder / "record.json", {"hardware": {"gpu": None}, "benchmark": "gpu/run_all"}, {})
    context = Context(request.param, CPU, True, 0, False, rows, folder, time.monotonic() + 300)
    rows.whole = import_module(f"benchmarks.gpu.{request.param}").run(context)
    rows.write()
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return {**found, "part": request.param}


def test_every_row_is_measured_and_every_target_has_its_number(record: dict[str, Any]) -> None:
    assert [name for name, row in record["rows"].items() if "found" not in row] == []
    for target in targets.TARGETS[record["part"]]:
        told = targets.judge(target, record["rows"], smoke=True)
        assert told["measured"] is not None, target.row
        assert told["verdict"] == "not measured", "a smoke run reaches nothing and misses nothing"
    for row in record["rows"].values():
        parts.require_finite(row["found"])


def test_a_row_with_a_bound_on_its_speed_has_the_two_numbers(record: dict[str, Any]) -> None:
    for target in targets.TARGETS[record["part"]]:
        found = record["rows"][target.row]["found"]
        if target.bound is not None and target.number in ("tokens_per_s", "mfu", "over_random_mask"):
            assert set(found["two_numbers"]) == {"bytes_s", "operations_s"}
            assert 0 < max(found["two_numbers"].values()) < found["seconds"] * 10


def test_what_a_part_says_of_itself_is_in_the_record(record: dict[str, Any]) -> None:
    if record["part"] == "kernels":
        detail = record["rows"][targets.ERRORS]["found"]["detail"]
        assert {row["kernel"] for row in detail} >= {"token_stats", "masked_ce", "ldlm place", "ldlm step"}
        assert all(row["error"] < row["tolerance"] for row in detail)
    else:
        assert "random weights" in record["weights"]


# -- kernels ----------------------------------------------------------------------------------------------------------


def _worst(dtype: str, kernel: str) -> float:
    found = kernel_errors.measure(CPU, [dtype], quick=True, seed=3)
    return max(row["error"] / row["tolerance"] for row in found if row["kernel"] == kernel)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_kernel_that_is_wrong_is_seen(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _worst(dtype, "token_stats") < 1
    assert _worst(dtype, "masked_ce") < 1
    honest_stats, honest_losses = token_stats_reference.stats, masked_ce_reference.chunk_losses

    def stats(*args: Any, **kwargs: Any) -> Any:
        found = honest_stats(*args, **kwargs)
        return found._replace(entropy_M=1.1 * found.entropy_M)

    def losses(*args: Any) -> Any:
        gradient = honest_losses(*args)
        return None if gradient is None else gradient.mul_(1.05)

    monkeypatch.setattr(token_stats_reference, "stats", stats)
    monkeypatch.setattr(masked_ce_reference, "chunk_losses", losses)
    assert _worst(dtype, "token_stats") > 1
    assert _worst(dtype, "masked_ce") > 1


def test_the_parts_of_the_latent_sampler_are_compared_one_by_one() -> None:
    from dllm_core.methods.ldlm import parts as sampler_parts

    eager = sampler_parts.eager()
    fused = dataclasses.replace(eager, place=sampler_parts.place_fused, step=sampler_parts.step_fused, in_tensors=True)
    cases = kernel_errors.part_cases(48, 3, 2, 5, torch.float32, CPU, 0)
    assert set(cases) == {f.name for f in dataclasses.fields(eager)} - {"in_tensors"}
    for name, (call, want) in cases.items():
        for kind in (eager, fused):
            assert kernel_errors.difference(call(kind), want) < 1e-5, name
        wrong = dataclasses.replace(eager, **{name: _scaled(getattr(eager, name))})
        assert kernel_errors.difference(call(wrong), want) > 1e-2, name


def _scaled(function: Any) -> Any:
    def run(*args: Any) -> Any:
        found = function(*args)
        if found is None:  # a step works in place
            args[0].mul_(1.1)
            return None
        return tuple(1.1 * x for x in found) if isinstance(found, tuple) else 1.1 * found

    return run


def test_a_gpu_whose_kernels_did_not_run_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = ["reference"]

    def measure(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        row = {"error": 0.0, "tolerance": 1.0}
        return [{**row, "kernel": k, "implementation": i} for k in kernel_errors.KERNELS for i in ran]

    monkeypatch.setattr(kernel_errors, "measure", measure)
    monkeypatch.setattr(kernel_errors, "measure_parts", lambda *args, **kwargs: [])
    for device, passed in (("cpu", True), ("cuda", False)):
        context = Context("kernels", torch.device(device), True, 0, False, None, Path(), 0.0)  # type: ignore[arg-type]
        assert kernels.errors(context)["passed"] is passed
    ran.append("triton")
    found = kernels.errors(context)
    assert found["passed"]
    assert found["headline"]["kernels"] == 2


def test_sizes_are_those_asked_for() -> None:
    found = kernels.points(smoke=False)
    assert {(operation, dtype) for operation, _, _, dtype in found} == {
        (operation, dtype)
        for operation in ("token_stats", "token_losses", "chunk_losses")
        for dtype in ("bf16", "fp32")
    }
    assert {rows for operation, _, rows, _ in found if operation == "token_stats"} >= {1, 8192}
    assert {kernels.timing.SHAPES[shape][1] for _, shape, _, _ in found} == {49_152, 151_936}
    assert found[0][3] == "bf16"


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "steps"), [(1, 4), (2, 3)])
def test_operations_of_a_decode_are_those_that_torch_counts(
    batch: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch does not count oneDNN's own products; in bf16 attention is two plain ones
    monkeypatch.setattr(packed_linear, "reorders", lambda dtype: False)
    backbone = random_backbone.random_backbone("tiny", CPU, torch.bfloat16, 0)
    config = DiffusionGenerationConfig(max_new_tokens=12, max_denoising_steps=steps, stop_at_eos=False)
    with FlopCounterMode(display=False) as counter:
        generate(backbone, [torch.arange(5) + row for row in range(batch)], config)
    work = decode_demand.passes(backbone.config, 301, config, 5, batch)
    least, counted = sum(p.times * p.flops for p in work), counter.get_total_flops()
    # at most: queries and attention of the last block also for the rows that nobody reads
    read = sum(p.activations for p in work if p.name.startswith("head")) / 32
    unread = steps * batch * 17 - read
    assert least <= counted <= least + unread * (2 * 32 * 32 + 4 * 17 * 32)


def test_weights_and_activations_of_a_step_counted_by_hand() -> None:
    backbone = random_backbone.random_backbone("tiny", CPU, torch.float32, 0)
    config = DiffusionGenerationConfig(max_new_tokens=6, max_denoising_steps=2, stop_at_eos=False)
    work = decode_demand.passes(backbone.config, 301, config, 1, 1)
    assert [p.name for p in work] == ["blocks, step 1", "head, step 1", "blocks, step 2", "head, step 2"]
    matrices = sum(p.numel() for p in backbone.layers.parameters() if p.ndim == 2)
    assert [p.weights for p in work] == [matrices, 32.0 * 301] * 2
    assert [p.flops for p in work[1::2]] == [2.0 * 6 * 32 * 301, 2.0 * 3 * 32 * 301]
    assert [p.activations for p in work[1::2]] == [6 * 32, 3 * 32]
    # keys and values 32 -> 2 x 16; then 32 -> 32 twice, 32 -> 2 x 64, 64 -> 32; queries and results 32 each
    of_all, of_read = 64 + 2 * 16, 64 + 64 + 160 + 96 + 2 * 32
    assert work[2].activations == 7 * (of_all + of_read) + 7 * of_all + 3 * of_read
    per_row = 2 * (32 * 32 * 2 + 32 * 128 + 64 * 32) + 4 * 7 * 32
    assert work[2].flops == (7 + 3) * per_row + 2 * 7 * 2 * 32 * 32


def test_with_the_exact_cache_a_pass_runs_its_block_and_sees_what_was_kept() -> None:
    backbone = random_backbone.random_backbone("tiny", CPU, torch.float32, 0)
    config = DiffusionGenerationConfig(max_new_tokens=8, max_denoising_steps=4, cache="exact", stop_at_eos=False)
    work = decode_demand.cached_passes(backbone.config, 301, config, 8, 4)[::2]
    assert len(work) == 4
    per_row, of_all = 2 * (32 * 32 * 2 + 32 * 128 + 64 * 32), 2 * 2 * 32 * 16
    # the second pass of a block of four: four tokens see the eight of the prompt and themselves, two are masked still
    assert work[1].flops == (4 + 2) * (per_row + 4 * 12 * 32) + 2 * 4 * of_all
    # of the second block: they see four more
    assert work[3].flops == (4 + 2) * (per_row + 4 * 16 * 32) + 2 * 4 * of_all
    # the first pass of all runs the prompt too, whose two blocks see 4 and 8, the one at work 12
    first = 12 * (per_row + 4 * 8 * 32) + 4 * (per_row + 4 * 8 * 32) + 2 * 12 * of_all
    assert work[0].flops == first


def test_random_models_are_one_model_in_the_ways_that_rows_need() -> None:
    models = random_backbone.RandomModels("tiny", CPU, torch.float32, 0, 4)
    ours, plain, base = models.backbone, models.plain, models.base
    assert ours.contract.mask_token_id == 301
    assert ours.embedding_weight_VD.shape[0] == 320
    assert base.get_input_embeddings().weight.shape[0] == 301
    assert torch.equal(plain.get_input_embeddings().weight, ours.embedding_weight_VD)
    assert torch.equal(base.get_input_embeddings().weight, ours.embedding_weight_VD[:301])
    ids_BL = torch.arange(12)[None]
    with torch.no_grad():
        for causal in (False, True):
            states_BLD = ours.hidden(ids_BL, causal=causal)
            torch.testing.assert_close(plain.base_model(ids_BL, is_causal=causal).last_hidden_state, states_BLD)
        torch.testing.assert_close(base.base_model(ids_BL).last_hidden_state, states_BLD)
    assert models.in_blocks.contract.block_size == models.in_blocks_fp32().contract.block_size == 4
    other = random_backbone.random_model("tiny", CPU, torch.float32, 1, rows=320)
    assert not torch.equal(other.get_input_embeddings().weight, plain.get_input_embeddings().weight)


def test_the_shape_is_that_of_the_model() -> None:
    with torch.device("meta"):
        model = random_backbone.random_model("qwen3_1_7b", torch.device("meta"), torch.bfloat16, 0, rows=151_936)
    assert sum(p.numel() for p in model.parameters()) == 1_720_574_976, "what the card calls 1.7B"


# -- training ---------------------------------------------------------------------------------------------------------


def test_mfu_is_of_the_vendors_rate_where_it_is_known() -> None:
    assert train.vendor_rate("NVIDIA H200") == 989.4
    assert train.vendor_rate("a GPU of tomorrow") is None
    assert train.vendor_rate(None) is None


def test_mfu_follows_from_operations_and_seconds(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "record.json", {}, {})
    context = Context("train", CPU, True, 0, False, rows, tmp_path, time.monotonic() + 60)
    args = train._arguments(context)
    found = train._mfu(context, "tiny", args, {"tflop_per_s": 0.5, "gb_per_s": 10.0})
    headline, flops = found["headline"], found["demand"]["flops"]
    assert headline["mfu"] == pytest.approx(flops / headline["step_s"] / 0.5e12)
    assert headline["tokens_per_s"] == pytest.approx(2 * 16 / headline["step_s"])
    backbone = random_backbone.random_backbone("tiny", CPU, torch.float32, 0)
    least, most = (3 * backbone.flops_forward(2 * 16, 16, head_rows) for head_rows in (0, 2 * 16))
    assert least < flops < most


# -- profiles and the whole -------------------------------------------------------------------------------------------


def test_a_profile_names_what_took_longest() -> None:
    a = torch.randn(300, 300)
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        (a @ a).add_(1.0)

    found = profiling.top_kernels(work, CPU)
    assert len(calls) == 1 + profiling.CALLS
    assert found["top"][0]["name"] == "aten::mm"
    assert found["top"][0]["times_per_call"] == 1.0
    assert [row["share"] for row in found["top"]] == sorted((row["share"] for row in found["top"]), reverse=True)
    assert 0.9 < sum(row["share"] for row in found["top"]) <= 1.0 + 1e-9


@pytest.mark.slow
def test_the_whole_suite_runs_and_goes_on(tmp_path: Path) -> None:
    words = ["--smoke", "--profile", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    runs = [
        subprocess.run(
            [sys.executable, "benchmarks/gpu/run_all.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=900
        )
        for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr[-3000:]
    assert "measured in" in runs[0].stderr
    assert "measured in" not in runs[1].stderr, "everything was there"
    for part in OURS:
        found = json.loads((tmp_path / f"smoke-{part}.json").read_text())
        assert found["status"] == "finished"
        assert all("found" in row for row in found["rows"].values())
        assert len(found["targets"]) == len(targets.TARGETS[part])
        assert str(tmp_path) not in json.dumps(found)
    assert "random_mask, 2048 tokens" in json.loads((tmp_path / "smoke-train.json").read_text())["rows"]
