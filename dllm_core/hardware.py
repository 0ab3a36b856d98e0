"""What the computation runs on: device, peak rate, memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dllm_core.errors import ResourceError

_SIZE = 768


def device(wish: str = "auto") -> torch.device:
    """Return the device to compute on.

    Args:
        wish: `auto` (cuda when there is one), `cpu` or `cuda`.

    Raises:
        ResourceError: cuda was asked for and is not usable.
    """
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wish == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "runtime.device=cuda, but torch sees no usable GPU.",
            "Use runtime.device=auto or cpu, or install the CUDA build (make install TORCH=cuda).",
        )
    return torch.device(wish)


@cache
def peak_flops(kind: str, dtype: torch.dtype) -> float:
    """Return the best rate of a few matrix products in FLOP/s, measured once per process (about a tenth of a second).

    Args:
        kind: `cpu` or `cuda`.
        dtype: of the product.
    """
    size = _SIZE if kind == "cpu" else 8192
    a, b = (torch.randn(size, size, device=kind).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):  # the first one warms up; the best one is the least disturbed
        synchronise(kind)
        start = time.perf_counter()
        a @ b
        synchronise(kind)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def memory_gb(where: torch.device | str = "cpu") -> tuple[float, float]:
    """Return (now, peak) in GB (1e9 bytes): resident set of the process on a CPU, allocated on a GPU."""
    kind = torch.device(where).type
    if kind == "cuda":
        return torch.cuda.memory_allocated(where) / 1e9, torch.cuda.max_memory_allocated(where) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9 if statm.exists() else peak
    return now, peak


def describe() -> dict[str, Any]:
    """Return the machine and the versions that a published number has to name."""
    has_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if has_gpu else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def synchronise(where: torch.device | str) -> None:
    """Wait for the device, so that a clock read afterwards is right."""
    if torch.device(where).type == "cuda":
        torch.cuda.synchronize()
