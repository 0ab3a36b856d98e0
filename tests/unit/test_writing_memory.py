"""What decoding on a CPU keeps beside the weights: estimated, counted on the tensors made, and measured."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.passes import choice, quick_weights
from dllm_core.evals.memory import loaded_bytes, watch_peak, weight_bytes
from dllm_core.layers.packed_linear import reorders
from steps import estimates
from steps.check_model import _KNOWN
from steps.estimates import ModelShape, laid_out_bytes
from steps.plan import render
from tests.plan_tools import TWO_CORES, plan
from tests.tiny import tiny_backbone

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ON_A_GPU = replace(TWO_CORES, device="cuda", memory_free=1e12)


def shape_of(backbone: Backbone) -> ModelShape:
    return ModelShape.from_config(backbone.config.to_dict())


def copied(weights: quick_weights.LaidOut) -> Iterator[Tensor]:
    yield weights.head_WD
    for block in weights.blocks:
        for part in (*block.query_key_value.parts, block.out, block.gate, block.up, block.down):
            yield part.weight


def test_the_limit_is_that_of_the_pass() -> None:
    assert estimates.LARGEST_COPY == quick_weights.LARGEST_COPY


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_matrices_are_those_that_a_pass_multiplies_with(family: str, dtype: str) -> None:
    backbone = tiny_backbone(family, layers=3).to(DTYPES[dtype])
    # rows of the table that stand for no token are not copied: at most 64 more of them in a converted checkpoint
    shape, found = replace(shape_of(backbone), vocab=backbone.contract.num_tokens), 0
    if choice.obstacle(backbone) is None:
        found = sum(t.numel() * t.element_size() for t in copied(quick_weights.laid_out(backbone)))
    assert found == laid_out_bytes(shape, "cpu", dtype)
    matrices = [p for layer in backbone.layers for p in layer.parameters() if p.dim() == 2]
    assert shape.matrices == sum(p.numel() for p in matrices)
    assert laid_out_bytes(shape, "cuda", dtype) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_first_pass_takes_as_much_memory_as_estimated(dtype: str) -> None:
    if not reorders(DTYPES[dtype]) or sys.platform != "linux":
        pytest.skip("this torch reorders no weights, or this system does not tell the memory of a process")
    backbone = tiny_backbone("llama", layers=12, hidden=512).to(DTYPES[dtype])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the other dtype took would be used again, unseen
    with watch_peak(torch.device("cpu")) as peak:
        kept = quick_weights.laid_out(backbone)
    if peak.extra_bytes is None:
        pytest.skip("this process may not reset its high-water mark")
    assert next(copied(kept)).is_mkldnn
    # what is joined before it is reordered may stay with the allocator
    assert peak.extra_bytes == pytest.approx(laid_out_bytes(shape_of(backbone), "cpu", dtype), rel=0.35)


def test_no_copy_beyond_the_limit() -> None:
    shape = _KNOWN["Qwen/Qwen3-0.6B"]
    size = laid_out_bytes(shape, "cpu", "bf16")
    assert size == 2 * (shape.matrices + shape.vocab * 1024)
    assert shape.matrices == 28 * 1024 * (2 * 2048 + 2 * 1024 + 3 * 3072)
    assert size < estimates.LARGEST_COPY < 2 * size
    assert laid_out_bytes(shape, "cpu", "fp32") == 0


def test_the_plan_names_the_rows_that_keep_a_copy() -> None:
    cells = "ar,random_mask,repr_align_4,ldlm,vfm,cola"
    made = plan("laptop", cells=cells, seeds="0,1")
    once = 2.0 * 576 * (30 * (2 * 576 + 2 * 192 + 3 * 1536) + 49_152)
    assert made.cost.copies == {"ar-seed0": once, "random_mask-seed0": once, "repr_align_4-seed0": once}
    line = "decoding on a CPU keeps the model's matrices a second time: 269.0 MB for each of 3 rows in the benchmark"
    assert line in render(made)
    for without in (plan("laptop", cells="ldlm,vfm"), plan("laptop", cells=cells, machine=ON_A_GPU)):
        assert not without.cost.copies
        assert "a second time" not in render(without)


def test_samples_during_training_lay_the_matrices_out_too() -> None:
    often = "train.sample_every_steps=10"
    quiet, sampling = (plan("laptop", cells="random_mask,vfm", overrides=o).cost.memories for o in ("", often))
    assert sampling["vfm"] == quiet["vfm"], "it decodes without the pass"
    assert sampling["random_mask"].total - quiet["random_mask"].total == 2.0 * (
        _KNOWN[SMOLLM2].matrices + _KNOWN[SMOLLM2].embedding
    )
    assert "matrices laid out for its samples 269.0 MB" in render(plan("laptop", cells="random_mask", overrides=often))
    on_a_gpu = plan("laptop", cells="random_mask", overrides=often, machine=ON_A_GPU)
    assert on_a_gpu.cost.memory.copies == 0


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_are_counted_from_the_heads_of_files(dtype: torch.dtype, tmp_path: Path) -> None:
    backbone = tiny_backbone("qwen3")
    backbone.save_pretrained(tmp_path)
    assert loaded_bytes(tmp_path, dtype) == weight_bytes(backbone.to(dtype)) - _unsaved(backbone)
    (tmp_path / "part").mkdir()
    more = {"a": torch.zeros(3, 5), "flags": torch.zeros(7, dtype=torch.bool), "ids": torch.zeros(2, dtype=torch.int64)}
    before = loaded_bytes(tmp_path, dtype)
    save_file(more, tmp_path / "part" / "more.safetensors")
    assert loaded_bytes(tmp_path, dtype) - before == 15 * dtype.itemsize + 7 + 16


def _unsaved(backbone: Backbone) -> int:
    return sum(b.numel() * b.element_size() for b in backbone.buffers())
