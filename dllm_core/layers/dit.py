"""Diffusion transformer with adaptive layer norm, zero at the start (AdaLN-zero, arXiv:2212.09748).

B batch, L noisy positions, P conditioning positions, W width. Three parts of a pass do not depend on the noisy input
and can be made before a sampling loop: the modulations of all its times, the keys and values of the conditioning, the
rotary tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_core.layers.attention import Attention, KeysValues, Rotation, joined, joined_key_mask, rotation
from dllm_core.layers.feedforward import FeedForward
from dllm_core.layers.time_embedding import TimeEmbedding


def modulated(x_BLW: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift, the norm without parameters of its own."""
    return torch.addcmul(shift, F.layer_norm(x_BLW, x_BLW.shape[-1:]), 1.0 + scale)


class DiTBlock(nn.Module):
    """A transformer block whose norms and branches are scaled, shifted and gated by the time.

    Args:
        width: W.
        num_heads: attention heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.feedforward = FeedForward(width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def prefix(self, context_BPW: Tensor, clean_W: Tensor, by: Rotation) -> KeysValues:
        """Return keys and values of clean conditioning states, modulated as at t = 0."""
        shift, scale, *_ = clean_W.chunk(6, dim=-1)
        return self.attention.keys_values(modulated(context_BPW, shift, scale), by)

    def forward(
        self, x_BLW: Tensor, modulation: Tensor, by: Rotation, prefix: KeysValues | None, mask: Tensor | None
    ) -> Tensor:
        """Return [B, L, W]; see `extend`."""
        return self.extend(x_BLW, modulation, by, prefix, mask)[0]

    def extend(
        self, x_BLW: Tensor, modulation: Tensor, by: Rotation, prefix: KeysValues | None, mask: Tensor | None
    ) -> tuple[Tensor, KeysValues]:
        """Return ([B, L, W], the states' own keys and values, which a later call may look at as part of its prefix).

        Args:
            x_BLW: states.
            modulation: [B or 1, 1 or L, 6 W]: shift, scale, gate of attention, then of the feed-forward.
            by: rotation of the L positions.
            prefix: keys and values looked at besides the states' own.
            mask: see `attend`; over the P + L keys.
        """
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, dim=-1)
        normed = modulated(x_BLW, shift_a, scale_a)
        own = self.attention.keys_values(normed, by)
        x_BLW = torch.addcmul(x_BLW, gate_a, self.attention(normed, joined(prefix, own), by, mask))
        return torch.addcmul(x_BLW, gate_f, self.feedforward(modulated(x_BLW, shift_f, scale_f))), own


@dataclass(frozen=True)
class Modulations:
    """What the time does to each block, and to the final norm (shift, scale)."""

    blocks: tuple[Tensor, ...]
    final: Tensor

    def at(self, index: int) -> Modulations:
        """Return those of one of several times, [1, 1, ...] each."""
        return Modulations(tuple(m[index, None, None] for m in self.blocks), self.final[index, None, None])


@dataclass(frozen=True)
class Prefix:
    """Conditioning as the blocks see it.

    Attributes:
        keys_values: of each block.
        visible_BP: bool; None where all of it is visible to all rows.
    """

    keys_values: tuple[KeysValues, ...]
    visible_BP: Tensor | None = None

    def select(self, rows: Tensor) -> Prefix:
        """Return the named rows, int64 [R]."""
        picked = tuple((key[rows], value[rows]) for key, value in self.keys_values)
        return Prefix(picked, None if self.visible_BP is None else self.visible_BP[rows])


class DiT(nn.Module):
    """A stack of blocks between an input and an output that its user provides.

    Args:
        width: W.
        depth: number of blocks.
        num_heads: attention heads.
    """

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.head_width = width // num_heads
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads) for _ in range(depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.final_modulation.bias)

    def modulations(self, t: Tensor) -> Modulations:
        """Return the modulations of times of any shape [...]: [..., 6 W] a block and [..., 2 W] for the end."""
        embedded = F.silu(self.time(t))
        return Modulations(
            tuple(block.modulation(embedded) for block in self.blocks),  # type: ignore[operator]
            self.final_modulation(embedded),
        )

    def prefix(self, context_BPW: Tensor, position_BP: Tensor, visible_BP: Tensor | None = None) -> Prefix:
        """Return what the blocks see of clean conditioning states.

        Args:
            context_BPW: states.
            position_BP: their positions, [P] or [B, P].
            visible_BP: bool; conditioning that may be looked at (None: all).
        """
        clean = self.modulations(torch.zeros((), device=context_BPW.device))
        by = rotation(position_BP, self.head_width)
        found = tuple(
            block.prefix(context_BPW, modulation, by)  # type: ignore[operator]
            for block, modulation in zip(self.blocks, clean.blocks, strict=True)
        )
        return Prefix(found, visible_BP)

    def forward(
        self,
        x_BLW: Tensor,
        modulations: Modulations,
        by: Rotation,
        prefix: Prefix | None = None,
        visible_BL: Tensor | None = None,
    ) -> Tensor:
        """Return normalised, modulated states [B, L, W].

        Args:
            x_BLW: embedded noisy input.
            modulations: [B or 1, 1 or L, ...] of each row (or position).
            by: rotation of the L positions, with this network's `head_width`.
            prefix: conditioning; None for none.
            visible_BL: bool; positions that are no padding (None: all).
        """
        sources: list[tuple[Tensor | None, Tensor]] = [(visible_BL, x_BLW)]
        if prefix is not None:
            key_BNPH, _ = prefix.keys_values[0]
            sources.insert(0, (prefix.visible_BP, key_BNPH[:, 0]))
        mask = joined_key_mask(*sources)
        kept = prefix.keys_values if prefix is not None else (None,) * len(self.blocks)
        for block, modulation, keys_values in zip(self.blocks, modulations.blocks, kept, strict=True):
            x_BLW = block(x_BLW, modulation, by, keys_values, mask)
        shift, scale = modulations.final.chunk(2, dim=-1)
        return modulated(x_BLW, shift, scale)
