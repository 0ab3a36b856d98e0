"""The element-wise parts of a gated decoder's pass, as one function each, so that a compiler makes one kernel of each.

B batch, L length, R = B L rows, D hidden, N heads, H head width, I inner width. `eager()` are written for few passes
over memory without a compiler, `compiled()` for a compiler; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Parts:
    """Implementations.

    Attributes:
        normed: see `normed`.
        turned: see `turned_eager`.
        gated: see `gated`.
        compiled: they are made by torch.compile.
    """

    normed: Callable[..., Tensor]
    turned: Callable[..., Tensor]
    gated: Callable[..., Tensor]
    compiled: bool


def normed(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return the root-mean-square norm of rows (arXiv 1910.07467)."""
    return F.rms_norm(x_RD, x_RD.shape[-1:], weight_D, eps)


def turned_eager(x_BLNH: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise heads, turn them by their positions and put them first.

    Args:
        x_BLNH: heads of a product.
        cos: [B or 1, L, 1, H]; turned = x * cos + (x with its halves exchanged) * sin (arXiv 2104.09864).
        sin: likewise, signs included.
        weight: of the heads' root-mean-square norm, [H] or [N, H]; None for no norm.
        eps: of that norm.

    Returns:
        [B, N, L, H] without gaps.
    """
    x_BLNH = _heads_normed(x_BLNH, weight, eps)
    batch, length, heads, width = x_BLNH.shape
    out_BNLH = x_BLNH.new_empty(batch, heads, length, width)
    torch.addcmul(x_BLNH * cos, x_BLNH.roll(width // 2, -1), sin, out=out_BNLH.transpose(1, 2))
    return out_BNLH


def turned_fused(x_BLNH: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Do what `turned_eager` does, with nothing between input and output."""
    x_BLNH = _heads_normed(x_BLNH, weight, eps)
    first, second = x_BLNH.chunk(2, dim=-1)
    return (x_BLNH * cos + torch.cat((second, first), dim=-1) * sin).transpose(1, 2).contiguous()


def _heads_normed(x_BLNH: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x_BLNH
    return F.rms_norm(x_BLNH, x_BLNH.shape[-1:], None, eps) * weight


def gated(gate_RI: Tensor, up_RI: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    return F.silu(gate_RI) * up_RI


@cache
def eager() -> Parts:
    """Return the parts as written for torch without a compiler."""
    return Parts(normed, turned_eager, gated, compiled=False)


@cache
def compiled() -> Parts:
    """Return the parts through torch.compile: one kernel of each serves any number of rows."""

    def through(function: Callable[..., Tensor], counted: dict[int, tuple[int, ...]]) -> Callable[..., Tensor]:
        made: Callable[..., Tensor] = torch.compile(function, fullgraph=True)

        def run(*given: Any) -> Tensor:
            for place, dims in counted.items():
                # a single row or batch stays what it is: kernels for it leave a loop out
                torch._dynamo.maybe_mark_dynamic(given[place], dims)
            return made(*given)

        return run

    return Parts(
        through(normed, {0: (0,)}),
        through(turned_fused, {0: (0, 1), 1: (0, 1), 2: (0, 1)}),
        through(gated, {0: (0,), 1: (0,)}),
        compiled=True,
    )
