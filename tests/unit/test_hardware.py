"""Device, dtype and memory as the run sees them."""

from __future__ import annotations

import json

import pytest
import torch

from dllm_core import hardware
from dllm_core.errors import ResourceError


@pytest.mark.parametrize(("rates", "expected"), [((50e9, 200e9), torch.bfloat16), ((50e9, 20e9), torch.float32)])
def test_dtype_follows_the_measurement(rates, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(zip((torch.float32, torch.bfloat16), rates, strict=True))
    monkeypatch.setattr(hardware, "peak_flops", lambda kind, dtype: known[dtype])
    dtype, reason = hardware.compute_dtype("cpu")
    assert dtype == expected
    assert f"bf16 {rates[1] / 1e9:.0f} against fp32 50 GFLOP/s" in reason


def test_an_explicit_wish_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "peak_flops", lambda *_: pytest.fail("measured"))
    assert hardware.compute_dtype("cpu", "fp32") == (torch.float32, "fp32 was asked for")
    assert hardware.compute_dtype("cpu", "bf16")[0] == torch.bfloat16


def test_measured_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_SIZE", 64)
    hardware.peak_flops.cache_clear()
    first = hardware.peak_flops("cpu", torch.float32)
    assert first > 0
    assert hardware.peak_flops("cpu", torch.float32) == first
    assert hardware.peak_flops.cache_info().hits == 1
    hardware.peak_flops.cache_clear()


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.device().type == hardware.device("cpu").type == "cpu"
    with pytest.raises(ResourceError, match="no usable GPU"):
        hardware.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.device().type == hardware.device("cuda").type == "cuda"


def test_peak_memory_grows_with_what_is_held() -> None:
    before = hardware.memory_gb()[1]
    block = torch.ones(int((before + 0.2) * 1e9 / 4))
    assert hardware.memory_gb()[1] >= block.numel() * 4 / 1e9


def test_description_is_json() -> None:
    described = json.loads(json.dumps(hardware.describe()))
    assert described["torch"] == torch.__version__
    assert described["cores"] >= 1
    assert described["memory_gb"] > 0
