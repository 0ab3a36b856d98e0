"""A pre-norm transformer. B batch, L positions, W width."""

from __future__ import annotations

from torch import Tensor, nn

from dllm_core.layers.attention import Attention, KeysValues, Rotation, joined, rotation
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
        return self.extend(x_BLW, by, None, mask)[0]

    def extend(
        self, x_BLW: Tensor, by: Rotation, before: KeysValues | None, mask: Tensor | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Return ([B, L, W], keys and values of the M + L states so far).

        Args:
            x_BLW: states that follow.
            by: rotation of their positions.
            before: keys and values of M states that came before; None for none.
            mask: as in `dllm_core.layers.attention.attend`, over the M + L keys.
        """
        normed = self.attention_norm(x_BLW)
        keys_values = joined(before, self.attention.keys_values(normed, by))
        x_BLW = x_BLW + self.attention(normed, keys_values, by, mask)
        return x_BLW + self.feedforward(self.feedforward_norm(x_BLW)), keys_values


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
        return self.extend(x_BLW, position_BL, None, mask)[0]

    def extend(
        self,
        x_BLW: Tensor,
        position_BL: Tensor,
        before: tuple[KeysValues, ...] | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[KeysValues, ...]]:
        """Return (normalised states [B, L, W], keys and values of the M + L positions so far, for the next call).

        With a causal mask, going through a sequence piece by piece gives what one pass over all of it gives.

        Args:
            x_BLW: states of the positions that follow.
            position_BL: integer positions, [L] or [B, L].
            before: what the call before returned; None at the start.
            mask: bool [B or 1, 1, L or 1, M + L].
        """
        by = rotation(position_BL, self.head_width)
        kept = []
        for block, earlier in zip(self.blocks, before or (None,) * len(self.blocks), strict=True):
            x_BLW, keys_values = block.extend(x_BLW, by, earlier, mask)  # type: ignore[operator]
            kept.append(keys_values)
        return self.norm(x_BLW), tuple(kept)
