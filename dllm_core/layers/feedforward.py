"""The position-wise network of a block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear; no biases.

    Args:
        width: W.
        multiple: inner width relative to W.
    """

    def __init__(self, width: int, multiple: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(width, multiple * width, bias=False)
        self.out = nn.Linear(multiple * width, width, bias=False)

    def forward(self, x_BLW: Tensor) -> Tensor:
        """Return [B, L, W]."""
        return self.out(F.gelu(self.inner(x_BLW), approximate="tanh"))
