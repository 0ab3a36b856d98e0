"""Where Triton kernels are tested: on a GPU, or on this CPU through Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from dllm_core.kernels.dispatch import interpreted


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Insist on Triton; return the device whose tensors it takes here."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed (it comes with the CUDA build of torch)")
    if not interpreted() and not torch.cuda.is_available():
        pytest.skip("no GPU, and Triton is not interpreted (TRITON_INTERPRET=1)")
    monkeypatch.setenv("DLLM_KERNELS", "triton")
    return torch.device("cpu" if interpreted() else "cuda")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with nan, or with a number that is no token id."""
    empty = torch.empty

    def poison(*args, **kwargs):  # type: ignore[no-untyped-def]
        made = empty(*args, **kwargs)
        if made.is_floating_point():
            return made.fill_(torch.nan)
        return made.fill_(-(2**30)) if made.dtype in (torch.int32, torch.int64) else made

    monkeypatch.setattr(torch, "empty", poison)
