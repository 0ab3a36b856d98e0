"""Where the time of a call goes on the device: the kernels it spent most on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import targets
from benchmarks.gpu.parts import Context, Measured
from dllm_core.hardware import synchronise

ROWS = 20
CALLS = 3


def top_kernels(call: Callable[[], object], device: torch.device) -> Measured:
    """Return what a few calls spent most on, by their own time on the device (on a CPU: there), longest first.

    Args:
        call: the work; it is run once beforehand, so that nothing is made or compiled while it is watched.
        device: where it runs.
    """
    call()
    synchronise(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as watched:
        for _ in range(CALLS):
            call()
        synchronise(device)
    events, kind = watched.key_averages(), "self_cpu_time_total"
    if device.type == "cuda":
        # the calls that launched a kernel bear its time as well: each would count twice
        kind = "self_device_time_total"
        events = [event for event in events if event.device_type == DeviceType.CUDA]
    found = sorted(events, key=lambda event: -float(getattr(event, kind)))
    total = sum(float(getattr(event, kind)) for event in found)
    rows: list[dict[str, Any]] = [
        {
            "name": event.key[:160],
            "ms_per_call": float(getattr(event, kind)) / 1e3 / CALLS,
            "share": float(getattr(event, kind)) / max(total, 1e-9),
            "times_per_call": event.count / CALLS,
        }
        for event in found[:ROWS]
    ]
    return {"device_ms_per_call": total / 1e3 / CALLS, "top": rows}


def profile_a_miss(
    context: Context, row: str, found: Measured | None, call: Callable[[], Callable[[], object]]
) -> None:
    """Add a profile of a row to the record where profiles are wished for and the row misses a target.

    Args:
        context: of the part.
        row: its name.
        found: what was measured.
        call: makes the work to watch.
    """
    if context.profile and found is not None and (context.smoke or targets.misses(context.name, row, found)):
        context.row(f"profile of {row}", lambda: top_kernels(call(), context.device), needs_s=20.0)
