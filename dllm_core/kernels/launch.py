"""What a Triton launch has to know about the device, and a scope that launches there. Imports no Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

_INTERPRETER_UNITS = 1
_SMALLEST_SHARED_MEMORY = 99 * 1024
"""Bytes a block may use on the consumer GPUs of compute capability 8.6 to 12.0."""


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors there are to fill; 1 for the interpreter."""
    if device.type != "cuda":
        return _INTERPRETER_UNITS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one block may use."""
    if device.type != "cuda":
        return _SMALLEST_SHARED_MEMORY
    found = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    return int(found or _SMALLEST_SHARED_MEMORY)


def scope(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on this device: it takes the current one, not that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
