"""Device, peak rate and memory as the run sees them."""

from __future__ import annotations

import json

import pytest
import torch

from dllm_core import hardware
from dllm_core.errors import ResourceError


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
