"""torch.compile for small functions: whether it can run here, what it has cost so far, and how many kernels it keeps.

What it makes is kept on disk by torch itself (inductor's FX graph cache, in the directory that TORCHINDUCTOR_CACHE_DIR
names, by default one per user among the system's temporary files), so that a second process compiles for a fraction of
the time of the first.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

KEPT_KERNELS = 256


@dataclass
class Spending:
    """What compiling has cost this process.

    Attributes:
        seconds: in `metered` contexts.
        fault: the first line of what a compiler said that is there and does not work; None as long as it does.
    """

    seconds: float = 0.0
    fault: str | None = None


SPENT = Spending()


def can_compile(device: torch.device) -> str | None:
    """Return why torch.compile cannot make kernels for a device, None where it can as far as one can see."""
    if device.type == "cuda":
        return None if find_spec("triton") else "triton is not installed"
    return None if any(shutil.which(name) for name in ("g++", "clang++", "c++")) else "no C++ compiler at hand"


@contextlib.contextmanager
def many_shapes() -> Iterator[None]:
    """Let torch.compile keep a kernel per shape; its own limit takes a few shapes for a mistake."""
    config: Any = torch._dynamo.config
    names = [n for n in ("recompile_limit", "accumulated_recompile_limit") if hasattr(config, n)]
    with config.patch({n: max(KEPT_KERNELS, getattr(config, n)) for n in names}):
        yield


@contextlib.contextmanager
def metered() -> Iterator[None]:
    """Add the time inside to what compiling has cost, and let it make as many kernels as it has to."""
    start = time.perf_counter()
    try:
        with many_shapes():
            yield
    finally:
        SPENT.seconds += time.perf_counter() - start


def complaint(error: BaseException) -> str:
    """Return the first line of what a compiler said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
