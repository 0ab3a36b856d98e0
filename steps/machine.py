"""The machine as a plan needs to know it, without torch: cores, memory, GPU, and rates to expect from them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

# achieved in training a small decoder, per core; test_plan_estimates holds them to times that were measured
_CPU_CORE_FLOPS = {"bf16": 90e9, "fp32": 50e9}
_CPU_BYTES_PER_S = 9e9
_CPU_OVERHEAD_S = 0.015
# GPU name -> (achieved bf16 training FLOP/s, memory bytes/s); the first name that occurs in the driver's wins
_GPUS: dict[str, tuple[float, float]] = {
    "B200": (500e12, 5.0e12),
    "H200": (260e12, 3.6e12),
    "H100": (260e12, 2.5e12),
    "A100": (120e12, 1.4e12),
    "L40": (90e12, 0.6e12),
    "5090": (100e12, 1.3e12),
    "4090": (80e12, 0.8e12),
    "3090": (40e12, 0.7e12),
    "L4": (30e12, 0.2e12),
    "T4": (15e12, 0.2e12),
}
_UNKNOWN_GPU = (40e12, 0.5e12)
_GPU_OVERHEAD_S = 0.02
_FIRST_BF16_CAPABILITY = 8.0  # Ampere; what came before computes bf16 in fp32 units
_REFERENCE_GPU: dict[str, Any] = {
    "name": "an A100 (no GPU is visible here)",
    "native_bf16": True,
    "memory_total": float("inf"),
    "memory_free": float("inf"),
    "flops_bf16": _GPUS["A100"][0],
    "flops_fp32": _GPUS["A100"][0] / 4,
    "bytes_per_s": _GPUS["A100"][1],
    "overhead_s": _GPU_OVERHEAD_S,
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the plan reckons with.

    Attributes:
        device: `cpu` or `cuda`.
        name: for people.
        cores: CPU cores this process may use.
        native_bf16: the device is fast at bf16.
        memory_total, memory_free: bytes of the memory that training happens in (GPU memory on cuda).
        flops_bf16, flops_fp32: expected rates, FLOP/s.
        bytes_per_s: expected memory rate.
        overhead_s: fixed cost of one step or forward.
        visible: False for a machine that was asked for and is not here; its rates are those of a common one.
    """

    device: Literal["cpu", "cuda"]
    name: str
    cores: int
    native_bf16: bool
    memory_total: float
    memory_free: float
    flops_bf16: float
    flops_fp32: float
    bytes_per_s: float
    overhead_s: float
    visible: bool = True

    def dtype(self, wanted: str) -> str:
        """Resolve `auto`: bf16 where the device is fast at it, else fp32."""
        return ("bf16" if self.native_bf16 else "fp32") if wanted == "auto" else wanted

    def seconds(self, flops: float, calls: float, dtype: str) -> float:
        """Estimate the time of `calls` steps or forwards with `flops` operations in all."""
        return flops / (self.flops_bf16 if dtype == "bf16" else self.flops_fp32) + calls * self.overhead_s


def probe(device: str = "auto", threads: int | None = None) -> Machine:
    """Look at this machine; `auto` is cuda when the driver lists a GPU and torch was built for one."""
    gpu = _gpu() if device != "cpu" else None
    if gpu is not None and (device == "cuda" or _torch_has_cuda()):
        name, total, free, capability = gpu
        flops, rate = next((v for key, v in _GPUS.items() if key in name), _UNKNOWN_GPU)
        return Machine(
            device="cuda",
            name=name,
            cores=_cores(),
            native_bf16=capability >= _FIRST_BF16_CAPABILITY,
            memory_total=total,
            memory_free=free,
            flops_bf16=flops,
            flops_fp32=flops / 4,
            bytes_per_s=rate,
            overhead_s=_GPU_OVERHEAD_S,
        )
    if device == "cuda":
        return replace(_cpu(None), device="cuda", visible=False, **_REFERENCE_GPU)
    return _cpu(threads)


def speed_conditions(machine: Machine) -> dict[str, Any]:
    """Return what a measured time depends on beside the work: the machine, its threads and the chosen kernels."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "device": machine.device,
        "name": machine.name,
        "cores": machine.cores,
        "processor": processor,
        "omp_threads": os.environ.get("OMP_NUM_THREADS", ""),
        "kernels": os.environ.get("DLLM_KERNELS", "auto"),
    }


def _cpu(threads: int | None) -> Machine:
    import psutil

    cores = min(threads or _cores(), _cores())
    bf16 = _cpu_has_bf16()
    memory = psutil.virtual_memory()
    limit = _cgroup_limit()
    fp32 = cores * _CPU_CORE_FLOPS["fp32"]
    return Machine(
        device="cpu",
        name=f"{cores} CPU core{'s' if cores > 1 else ''}{' with native bf16' if bf16 else ''}",
        cores=cores,
        native_bf16=bf16,
        memory_total=min(float(memory.total), limit),
        memory_free=min(float(memory.available), limit),
        flops_bf16=cores * _CPU_CORE_FLOPS["bf16"] if bf16 else fp32 / 3,
        flops_fp32=fp32,
        bytes_per_s=_CPU_BYTES_PER_S,
        overhead_s=_CPU_OVERHEAD_S,
    )


def _cores() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return available or 1


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _cgroup_limit() -> float:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            return float(text)
    return float("inf")


def _gpu() -> tuple[str, float, float, float] | None:
    """Return (name, total bytes, free bytes, compute capability) of the first GPU, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        name, total, free, capability = (part.strip() for part in out.splitlines()[0].split(","))
        return name, float(total) * 2**20, float(free) * 2**20, float(capability)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _torch_has_cuda() -> bool:
    try:
        return "+cpu" not in version("torch")
    except PackageNotFoundError:
        return False
