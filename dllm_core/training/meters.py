"""What a step is measured by: losses, speed, share of the device's peak, memory; and the file that keeps it."""

from __future__ import annotations

import json
import resource
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

_GEMM = 1024


@cache
def measured_peak_flops(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the best rate of a plain square GEMM in FLOP/s: what this machine gives, as the base of MFU.

    Measured once a process.
    """
    device = torch.device(device)
    size = _GEMM if device.type == "cpu" else 8 * _GEMM
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        synchronise(device)
        before = time.perf_counter()
        a @ b
        synchronise(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - before))
    return best


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_gb(device: torch.device) -> tuple[float, float]:
    """Return (now, peak) in 1e9 bytes: allocated on a CUDA device, resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9, torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9 if statm.exists() else peak
    return now, peak


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with the number of finished steps under "step".

    Args:
        path: the file; appended to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows; a last line cut off by a kill is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, step: int, source: Path | None = None) -> None:
        """Keep only rows of the first `step` steps, so that a resumed run writes each step once.

        Args:
            step: finished steps to keep.
            source: take the rows from this file instead (a prefix that another run wrote).
        """
        rows = (MetricsLog(source) if source is not None else self).rows()
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(kept, encoding="utf-8")
        temporary.replace(self.path)
