"""Multi-head attention with per-head RMS normalisation of queries and keys and rotary positions (arXiv:2104.09864).

B batch, L queries, M keys, W width, N heads, H head width. Keys and values are made apart from the queries, so that
those of a conditioning that does not change can be made once and kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_THETA = 10_000.0
LONGEST_PLAIN = 512
"""Keys up to which plain products beat torch's flash kernel for bf16 on CPU (see `dllm_core.backbone.attention`)."""

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, [B, N, M, H] each."""
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary angles, fp32, [1 or B, 1, M, H / 2] each."""


def rotation(position_BM: Tensor, head_width: int, theta: float = ROPE_THETA) -> Rotation:
    """Return the rotary angles' cosines and sines.

    Args:
        position_BM: integer positions, [M] or [B, M].
        head_width: even.
        theta: base of the geometric series of frequencies.
    """
    half = head_width // 2
    frequency_H = theta ** (-torch.arange(half, device=position_BM.device, dtype=torch.float32) / half)
    angle = position_BM[..., None].float() * frequency_H
    if angle.ndim == 2:
        angle = angle[None]
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x_BNMH: Tensor, by: Rotation) -> Tensor:
    """Return `x_BNMH` with the pairs (i, i + H/2) of each head turned by their angles."""
    cos, sin = (part.to(x_BNMH.dtype) for part in by)
    first, second = x_BNMH.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(query_BNLH: Tensor, key_BNMH: Tensor, value_BNMH: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k / sqrt(H)) v, [B, N, L, H].

    Args:
        query_BNLH: queries.
        key_BNMH: keys.
        value_BNMH: values.
        mask: bool, True where a query sees a key; [B or 1, 1, L or 1, M]. A query that sees nothing gives NaN.
    """
    plain = query_BNLH.device.type == "cpu" and query_BNLH.dtype == torch.bfloat16
    if not plain or key_BNMH.shape[2] > LONGEST_PLAIN:
        return F.scaled_dot_product_attention(query_BNLH, key_BNMH, value_BNMH, attn_mask=mask)
    scores_BNLM = torch.matmul(query_BNLH * query_BNLH.shape[-1] ** -0.5, key_BNMH.transpose(2, 3))
    if mask is not None:
        scores_BNLM = scores_BNLM.masked_fill(~mask, -torch.inf)
    return torch.matmul(torch.softmax(scores_BNLM, -1), value_BNMH)


def key_mask(visible_BM: Tensor | None) -> Tensor | None:
    """Return a mask over keys as `attend` takes it."""
    return None if visible_BM is None else visible_BM[:, None, None, :]


class Attention(nn.Module):
    """Attention without biases.

    Args:
        width: W.
        num_heads: N; divides W, and W / N is even.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        assert width % (2 * num_heads) == 0, (width, num_heads)
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key_value = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.query_norm = nn.RMSNorm(self.head_width)
        self.key_norm = nn.RMSNorm(self.head_width)

    def _heads(self, x_BMW: Tensor) -> Tensor:
        return x_BMW.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def keys_values(self, x_BMW: Tensor, by: Rotation) -> KeysValues:
        """Return keys (normalised, rotated) and values of normalised states."""
        key, value = self.to_key_value(x_BMW).chunk(2, dim=-1)
        return rotate(self.key_norm(self._heads(key)), by), self._heads(value)

    def forward(self, x_BLW: Tensor, keys_values: KeysValues, by: Rotation, mask: Tensor | None = None) -> Tensor:
        """Return [B, L, W].

        Args:
            x_BLW: normalised states that ask.
            keys_values: what they look at.
            by: rotation of the queries.
            mask: see `attend`.
        """
        query = rotate(self.query_norm(self._heads(self.to_query(x_BLW))), by)
        out_BNLH = attend(query, *keys_values, mask)
        return self.to_out(out_BNLH.transpose(1, 2).flatten(2))


def joined(first: KeysValues | None, second: KeysValues) -> KeysValues:
    """Return keys and values one after the other."""
    if first is None:
        return second
    return torch.cat((first[0], second[0]), dim=2), torch.cat((first[1], second[1]), dim=2)
