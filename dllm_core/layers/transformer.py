"""A pre-norm transformer. B batch, L positions, W width."""

from __future__ import annotations

from torch import Tensor, nn

from dllm_core.layers.attention import Attention, Rotation, rotation
from dllm_core.layers.feedforward import FeedForward


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        width: W.
        num_heads: attention heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width)

    def forward(self, x_BLW: Tensor, by: Rotation, mask: Tensor | None = None) -> Tensor:
        """Return [B, L, W]; `mask` as in `dllm_core.layers.attention.attend`."""
        normed = self.attention_norm(x_BLW)
        x_BLW = x_BLW + self.attention(normed, self.attention.keys_values(normed, by), by, mask)
        return x_BLW + self.feedforward(self.feedforward_norm(x_BLW))


class Transformer(nn.Module):
    """A stack of blocks and a final norm.

    Args:
        width: W.
        depth: number of blocks; 0 leaves the norm.
        num_heads: attention heads.
    """

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.head_width = width // num_heads
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BLW: Tensor, position_BL: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return normalised states [B, L, W].

        Args:
            x_BLW: states.
            position_BL: integer positions, [L] or [B, L].
            mask: bool [B or 1, 1, L or 1, L], True where a query sees a key.
        """
        by = rotation(position_BL, self.head_width)
        for block in self.blocks:
            x_BLW = block(x_BLW, by, mask)
        return self.norm(x_BLW)
