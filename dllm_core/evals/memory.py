"""What one row needs to generate, while other rows sit in the same process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_INTEGERS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
"""Bytes of a value, by its name in safetensors."""


@dataclass
class Peak:
    """Filled when the watched block ends.

    Attributes:
        extra_bytes: most memory held at once above the level at the start; None where the system cannot tell.
    """

    extra_bytes: float | None = None


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters and buffers, shared ones once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def loaded_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Return the bytes of all weights stored below a directory once they are loaded, from the heads of the files.

    Args:
        directory: of a model or a finished cell.
        dtype: that floating-point weights get.
    """
    total = 0
    for path in directory.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                kind = stored.get_dtype()
                size = dtype.itemsize if kind.startswith(("F", "BF")) else _INTEGERS[kind]
                total += math.prod(stored.get_shape()) * size
    return total


def _status(field: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise OSError(f"no {field} in {_STATUS}")


@contextmanager
def watch_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak inside the block: the allocator's on a GPU, the process's resident set on Linux otherwise."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.extra_bytes = float(torch.cuda.max_memory_allocated(device) - before)
        return
    try:
        _CLEAR.write_text("5")  # resets the high-water mark
        start = _status("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.extra_bytes = max(0.0, _status("VmHWM") - start)
