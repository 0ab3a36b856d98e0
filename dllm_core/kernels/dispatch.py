"""Which implementation of an operation runs, and why."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dllm_core.errors import DllmError, did_you_mean

CHOICES = ("auto", "reference", "triton")


def choose(operation: str, available: Sequence[str]) -> tuple[str, str]:
    """Return (name, reason) of the implementation to run, following the environment variable DLLM_KERNELS.

    Args:
        operation: name of the kernel package, for messages.
        available: implementations it has, the preferred one first.

    Raises:
        DllmError: the variable holds an unknown word, or asks for what this operation does not have.
    """
    wish = os.environ.get("DLLM_KERNELS", "auto")
    if wish not in CHOICES:
        raise DllmError(f"DLLM_KERNELS='{wish}' is not a choice.", did_you_mean(wish, CHOICES))
    if wish == "auto":
        only = "the only implementation" if len(available) == 1 else "preferred here"
        return available[0], f"DLLM_KERNELS=auto: {only} of {operation}"
    if wish not in available:
        raise DllmError(
            f"DLLM_KERNELS={wish}, but {operation} has no such implementation here.",
            f"Set DLLM_KERNELS to auto or one of: {', '.join(available)}.",
        )
    return wish, f"DLLM_KERNELS={wish}"


def rows_per_chunk(num_columns: int, device_type: str) -> int:
    """Return how many rows of fp32 logits to hold at a time: about 64 MB on a CPU, 256 MB elsewhere."""
    elements = 2**24 if device_type == "cpu" else 2**26
    return max(1, elements // max(1, num_columns))
