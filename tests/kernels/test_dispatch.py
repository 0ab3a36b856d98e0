"""Which implementation runs where, and why; and that Triton stays out of the way where it is not wanted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm_core.errors import DllmError
from dllm_core.kernels import dispatch, masked_ce, token_stats

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLLM_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize("operation", [token_stats, masked_ce])
def test_a_cpu_takes_the_reference(operation, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    reason = "DLLM_KERNELS=auto: the tensors are on cpu"
    assert operation.implementation("cpu", torch.float32) == ("reference", reason)
    monkeypatch.setenv("DLLM_KERNELS", "reference")
    assert operation.implementation("cpu", torch.float32) == ("reference", "DLLM_KERNELS=reference")
    name = operation.__name__.rpartition(".")[2]
    for wish, message in (("triton", f"{name} cannot run .*on cpu"), ("tritn", "Did you mean 'triton'")):
        monkeypatch.setenv("DLLM_KERNELS", wish)
        with pytest.raises(DllmError, match=message):
            operation.implementation("cpu", torch.float32)


@pytest.mark.usefixtures("with_gpu")
def test_a_gpu_takes_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose("op", GPU, torch.bfloat16) == ("triton", "DLLM_KERNELS=auto: a GPU that Triton compiles for")
    assert dispatch.choose("op", GPU, torch.float64)[1] == "DLLM_KERNELS=auto: there are no kernels for float64"
    monkeypatch.setenv("DLLM_KERNELS", "reference")
    assert dispatch.choose("op", GPU, torch.bfloat16)[0] == "reference"
    monkeypatch.setenv("DLLM_KERNELS", "triton")
    assert dispatch.choose("op", GPU, torch.bfloat16) == ("triton", "DLLM_KERNELS=triton")
    with pytest.raises(DllmError, match="no kernels for float64"):
        dispatch.choose("op", GPU, torch.float64)


@pytest.mark.usefixtures("with_gpu")
def test_what_keeps_triton_from_running_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dispatch.choose("op", GPU, torch.float32)[1].endswith("compute capability 7.5 is older than 8.0")
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert dispatch.choose("op", GPU, torch.float32)[1].endswith("triton is not installed")


@pytest.mark.usefixtures("with_gpu")
def test_the_interpreter_is_only_used_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for device in (CPU, GPU):
        name, reason = dispatch.choose("op", device, torch.float32)
        assert name == "reference"
        assert "TRITON_INTERPRET" in reason
    monkeypatch.setenv("DLLM_KERNELS", "triton")
    assert dispatch.choose("op", CPU, torch.float32)[0] == "triton"


def test_choices_name_every_operation_and_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.announce.cache_clear()
    with caplog.at_level(logging.INFO, dispatch.__name__):
        for _ in range(3):
            found = dispatch.choices(CPU, torch.float32)
    assert found == dict.fromkeys(("masked_ce", "token_stats"), "reference (DLLM_KERNELS=auto: the tensors are on cpu)")
    assert len(caplog.messages) == 2
    assert {f"{operation}: {told}" for operation, told in found.items()} <= set(dispatch.announced())
    packages = {p.parent.name for p in (ROOT / "dllm_core" / "kernels").glob("*/triton.py")}
    assert packages == set(dispatch.OPERATIONS)


def test_the_library_works_where_triton_cannot_be_imported() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from dllm_core.kernels.masked_ce import token_losses\n"
        "from dllm_core.kernels.token_stats import stats\n"
        "hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)\n"
        "assert stats(hidden, weight).argmax_M.shape == (3,)\n"
        "token_losses(hidden, weight, torch.zeros(3, dtype=torch.long), ce_M=torch.ones(3)).total.backward()\n"
        "assert hidden.grad.shape == (3, 4)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DLLM_KERNELS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
