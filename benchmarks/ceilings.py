"""What a device can do at best, measured: bytes moved and operations done per second; and the floor that follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dllm_core.hardware import synchronise
from dllm_core.layers.packed_linear import layout, linear

if TYPE_CHECKING:
    from benchmarks.latent_models import Pass

DEFINITION = (
    "floor = sum over the network passes of a generation of max(bytes / bandwidth, operations / rate). Bytes of a pass:"
    " each weight of the pass read once, and what goes into and comes out of its matrix products and attentions."
    " Bandwidth and rate are the ceilings measured in the same run: the better of a large copy (bytes read and written)"
    " and a matrix times a vector (bytes read), and a large matrix product. Share of the roofline = floor / median"
    " latency. GB/s and TFLOP/s are those bytes and operations over the median latency."
)


def _best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 2):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best


def _bandwidths(rows: int, columns: int, device: torch.device, dtype: torch.dtype, repeats: int) -> tuple[float, float]:
    """Return the bytes per second of a copy (read and written) and of a matrix times a vector (read)."""
    source = torch.randn(rows, columns, device=device, dtype=dtype)
    target, vector = torch.empty_like(source), torch.randn(columns, device=device, dtype=dtype)
    size = source.numel() * source.element_size()
    copying = _best_seconds(lambda: target.copy_(source), device, repeats)
    return 2 * size / copying, size / _best_seconds(lambda: source @ vector, device, repeats)


def _rate(side: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Return the operations per second of a square product, the better of the two ways the library multiplies."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    laid = layout(device, dtype, side)(b)
    plain = _best_seconds(lambda: a @ b, device, repeats)
    return 2.0 * side**3 / min(plain, _best_seconds(lambda: linear(a, laid), device, repeats))


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> dict[str, float]:
    """Return the ceilings: `gb_per_s` with the two it is the better of, and `tflop_per_s`.

    Args:
        device: where.
        dtype: of the matrices.
        quick: small sizes, for tests; the numbers mean little.
    """
    rows, columns, side = (4096, 512, 512) if quick else (65536, 16384, 8192)
    if device.type == "cpu" and not quick:
        rows, columns, side = 16384, 4096, 2048
    repeats = 3 if quick else 10
    copied, read = _bandwidths(rows, columns, device, dtype, repeats)
    return {
        "gb_per_s": max(copied, read) / 1e9,
        "copy_gb_per_s": copied / 1e9,
        "matrix_vector_gb_per_s": read / 1e9,
        "tflop_per_s": _rate(side, device, dtype, repeats) / 1e12,
    }


def demand(work: Sequence[Pass], element_bytes: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Return bytes, operations and the floor in seconds of a generation, and what sets it for each network."""
    moved = [element_bytes * (p.weights + p.activations) for p in work]
    by_bytes = [b / (1e9 * ceilings["gb_per_s"]) for b in moved]
    by_flops = [p.flops / (1e12 * ceilings["tflop_per_s"]) for p in work]
    return {
        "bytes": sum(p.times * b for p, b in zip(work, moved, strict=True)),
        "flops": sum(p.times * p.flops for p in work),
        "floor_s": sum(p.times * max(a, b) for p, a, b in zip(work, by_bytes, by_flops, strict=True)),
        "bound_by": {
            p.name: "bytes" if a >= b else "operations" for p, a, b in zip(work, by_bytes, by_flops, strict=True)
        },
    }


def achieved(found: dict[str, Any], seconds: float) -> dict[str, float]:
    """Return what a latency amounts to."""
    return {
        "gb_per_s": found["bytes"] / seconds / 1e9,
        "tflop_per_s": found["flops"] / seconds / 1e12,
        "share_of_roofline": found["floor_s"] / seconds,
    }
