"""A Perceiver whose latents look at the input and at each other (arXiv:2103.03206; one latent per position here).

B batch, L input positions, K latents, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dllm_core.layers.attention import Attention, Rotation, joined_key_mask, rotation
from dllm_core.layers.feedforward import FeedForward


class PerceiverLayer(nn.Module):
    """Latents ask; keys and values come from the input and the latents together.

    Args:
        width: W.
        num_heads: attention heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width)

    def forward(self, x_BLW: Tensor, latents_BKW: Tensor, both: Rotation, own: Rotation, mask: Tensor | None) -> Tensor:
        """Return the new latents [B, K, W].

        Args:
            x_BLW: the input.
            latents_BKW: the latents.
            both: rotation of the L + K keys.
            own: rotation of the K queries.
            mask: see `attend`; over L + K keys.
        """
        asking = self.latent_norm(latents_BKW)
        looked_at = torch.cat((self.input_norm(x_BLW), asking), dim=1)
        keys_values = self.attention.keys_values(looked_at, both)
        latents_BKW = latents_BKW + self.attention(asking, keys_values, own, mask)
        return latents_BKW + self.feedforward(self.feedforward_norm(latents_BKW))


class Perceiver(nn.Module):
    """A stack of layers and a final norm.

    Args:
        width: W.
        depth: number of layers.
        num_heads: attention heads.
    """

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.head_width = width // num_heads
        self.layers = nn.ModuleList(PerceiverLayer(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x_BLW: Tensor,
        latents_BKW: Tensor,
        position_BL: Tensor,
        latent_position_BK: Tensor,
        visible_BL: Tensor | None = None,
        visible_BK: Tensor | None = None,
    ) -> Tensor:
        """Return normalised latents [B, K, W].

        Args:
            x_BLW: the input.
            latents_BKW: where the latents start.
            position_BL: positions of the input, [L] or [B, L].
            latent_position_BK: positions of the latents, likewise.
            visible_BL: bool; input that may be looked at (None: all).
            visible_BK: bool; latents that may be looked at (None: all).
        """
        own = rotation(latent_position_BK, self.head_width)
        both = rotation(torch.cat((position_BL, latent_position_BK), dim=-1), self.head_width)
        mask = joined_key_mask((visible_BL, x_BLW), (visible_BK, latents_BKW))
        for layer in self.layers:
            latents_BKW = layer(x_BLW, latents_BKW, both, own, mask)
        return self.norm(latents_BKW)
