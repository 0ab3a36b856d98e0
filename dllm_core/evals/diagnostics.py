"""What a room says of its own health, in a form that tables, trackers and JSON take alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.evals.views import device_of
from dllm_core.methods.protocol import Method, Resources


@torch.no_grad()
def diagnostics(method: Method, batch: Batch, resources: Resources | None, noise: NoiseSource) -> dict[str, Any]:
    """Return the room's figures of health on held-out sequences: numbers, and maps of numbers.

    Empty for a room without the capability `diagnostics`, and where the stores that it reads are not at hand
    (`resources` is None).
    """
    if resources is None or not method.capabilities.diagnostics:
        return {}
    found = method.diagnose(batch.to(device_of(method)), resources, noise)
    return {str(name): _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    """Return numbers as they are (not finite: None), lists as maps from index to number, keys as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return {str(index): _plain(inner) for index, inner in enumerate(value)}
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
