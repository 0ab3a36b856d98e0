"""Which implementation of an operation runs, and why."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dllm_core.errors import DllmError, did_you_mean

CHOICES = ("auto", "reference", "triton")
OPERATIONS = ("masked_ce", "token_stats")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_GPU = (8, 0)
"""Compute capability from which bf16 products run on the matrix units."""

_log = logging.getLogger(__name__)
_told: dict[str, None] = {}


def choose(operation: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return (name, reason) of the implementation to run, following the environment variable DLLM_KERNELS.

    `auto` takes Triton on a GPU that can run it and the reference elsewhere. The first choice of a kind is logged.

    Args:
        operation: name of the kernel package, for messages.
        device: where the tensors are.
        dtype: in which their products are made.

    Raises:
        DllmError: the variable holds an unknown word, or asks for Triton where it cannot run.
    """
    wished = wish()
    name, reason = "reference", f"DLLM_KERNELS={wished}"
    if wished != "reference":
        obstacle = triton_obstacle(device, dtype)
        if obstacle is not None and wished == "triton":
            raise DllmError(
                f"DLLM_KERNELS=triton, but {operation} cannot run through Triton here: {obstacle}.",
                "Set DLLM_KERNELS to auto or reference.",
            )
        # the interpreter is for tests: nobody wants it by default
        if obstacle is None and wished == "auto" and interpreted():
            obstacle = "Triton would only be interpreted (TRITON_INTERPRET=1)"
        name = "triton" if obstacle is None else "reference"
        if wished == "auto":
            reason = f"DLLM_KERNELS=auto: {obstacle or 'a GPU that Triton compiles for'}"
    announce(operation, name, reason)
    return name, reason


def choices(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return `name (reason)` for every operation, to be printed where a program says what it runs."""
    return {operation: "{} ({})".format(*choose(operation, device, dtype)) for operation in OPERATIONS}


def wish() -> str:
    """Return what the environment variable DLLM_KERNELS asks for.

    Raises:
        DllmError: a word that is none of `CHOICES`.
    """
    wished = os.environ.get("DLLM_KERNELS", "auto")
    if wished not in CHOICES:
        raise DllmError(f"DLLM_KERNELS='{wished}' is not a choice.", did_you_mean(wished, CHOICES))
    return wished


@cache
def announce(operation: str, name: str, reason: str) -> None:
    """Log once which implementation of an operation runs, and why."""
    _log.info("%s runs its %s implementation (%s)", operation, name, reason)
    _told[f"{operation}: {name} ({reason})"] = None


def announced() -> tuple[str, ...]:
    """Return what this process has run so far, `operation: name (reason)` in the order of first use.

    For programs to print; the library itself only logs it.
    """
    return tuple(_told)


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton kernels cannot run on tensors of a device and dtype, None where they can."""
    if dtype not in TRITON_DTYPES:
        return f"there are no kernels for {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"the tensors are on {device.type}"
    if not _triton_is_installed():
        return "triton is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_GPU:
            return "compute capability {}.{} is older than {}.{}".format(*capability, *OLDEST_GPU)
    return None


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether Triton kernels are interpreted instead of compiled (TRITON_INTERPRET=1, also on a CPU)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def product_dtype(hidden_MD: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products with these states run: autocast's where it is on, else their own."""
    kind = hidden_MD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_MD.dtype


def rows_per_chunk(num_columns: int, device_type: str) -> int:
    """Return how many rows of fp32 logits to hold at a time: about 64 MB on a CPU, 256 MB elsewhere."""
    elements = 2**24 if device_type == "cpu" else 2**26
    return max(1, elements // max(1, num_columns))
