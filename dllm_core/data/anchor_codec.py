"""Stored precisions of hidden states and what they cost in accuracy. R rows, D hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_core.data.anchor_files import SCALE_SUFFIX, SCALED

STORED_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
_LARGEST = {"fp8": 448.0, "int8": 127.0}


def encode(name: str, states_RD: Tensor, dtype: str) -> dict[str, Tensor]:
    """Return the tensors that keep a layer's states: `name`, and `name.scale` (fp32 [R]) for fp8 and int8.

    8 bits hold the state divided by its largest element in magnitude, so a row's direction survives and its norm does
    to within the rounding of that one element: enough for a cosine, not for reconstruction.
    """
    if dtype not in SCALED:
        return {name: states_RD.to("cpu", STORED_DTYPE[dtype]).contiguous()}
    states_RD = states_RD.to("cpu", torch.float32)
    scale_R = states_RD.abs().amax(dim=-1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST[dtype]
    unit_RD = states_RD / scale_R[:, None]
    if dtype == "int8":
        unit_RD = unit_RD.round()
    return {name: unit_RD.to(STORED_DTYPE[dtype]).contiguous(), name + SCALE_SUFFIX: scale_R}


def decode(stored_RD: Tensor, scale_R: Tensor | None) -> Tensor:
    """Return states: as stored for fp32 and bf16, rescaled to fp32 for fp8 and int8."""
    return stored_RD if scale_R is None else stored_RD.float() * scale_R[:, None]


def select(stored_RD: Tensor, index_M: Tensor) -> Tensor:
    """Return rows of a stored tensor; also of fp8, for which torch has no indexing on CPU."""
    if stored_RD.dtype == torch.float8_e4m3fn:
        return stored_RD.view(torch.uint8).index_select(0, index_M).view(stored_RD.dtype)
    return stored_RD.index_select(0, index_M)


def standardised_error(stored_MD: Tensor, live_MD: Tensor) -> Tensor:
    """Return, per dimension, the RMS difference in units of the live states' standard deviation: [D], float32.

    A plain relative error would hide the loss in small dimensions behind the few with norms hundreds of times larger.
    Leave position 0 of each document out of both arguments: its norm dwarfs the rest and would inflate the deviation.
    """
    live_MD = live_MD.double()
    deviation_D = live_MD.std(dim=0, correction=0).clamp_min(torch.finfo(torch.float64).tiny)
    return ((stored_MD.double() - live_MD).square().mean(dim=0).sqrt() / deviation_D).float()
