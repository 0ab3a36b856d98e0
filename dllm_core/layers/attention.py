"""Multi-head attention with per-head RMS normalisation of queries and keys and rotary positions (arXiv:2104.09864).

B batch, L queries, M keys, W width, N heads, H head width. Keys and values are made apart from the queries, so that
those of a conditioning that does not change can be made once and kept.

bf16 on CPU is a case of its own. torch's flash kernel there is made for long sequences; at the lengths trained on here
it spends several times longer than two batched products and a softmax, most of all in the backward pass
(benchmarks/attention.py measures both), while the scores it avoids storing are small.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_THETA = 10_000.0
LONGEST_PLAIN = 512
"""Queries and keys up to which plain products beat torch's flash kernel for bf16 on CPU."""
NORM_EPS = 1e-6
"""Named, since torch's default differs between dtypes."""

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
    """Return `x_BNMH` with the pairs (i, i + H/2) of each head turned by their angles.

    Angles are fp32 whatever the dtype of `x_BNMH`, since positions need its precision; their cosines and sines do not.
    """
    cos, sin = (part.to(x_BNMH.dtype) for part in by)
    first, second = x_BNMH.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def is_plain(query_BNLH: Tensor, key_BNMH: Tensor) -> bool:
    """Say whether plain products are the faster way: bf16 on CPU, several queries, nothing longer than the limit."""
    return (
        query_BNLH.device.type == "cpu"
        and query_BNLH.dtype == torch.bfloat16
        and 1 < query_BNLH.shape[2] <= LONGEST_PLAIN
        and key_BNMH.shape[2] <= LONGEST_PLAIN
    )


def plain_attend(
    query_BNLH: Tensor, key_BNMH: Tensor, value_BNMH: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return softmax(scale q k) v by two products, [B, N, L, H]; O(L M) memory.

    Args:
        query_BNLH: queries.
        key_BNMH: keys, of as many heads.
        value_BNMH: values.
        mask: as in `attend`; a query that sees nothing gives the mean of the values.
        scale: None for 1 / sqrt(H).
    """
    scale = query_BNLH.shape[-1] ** -0.5 if scale is None else scale
    scores_BNLM = torch.matmul(query_BNLH * scale, key_BNMH.transpose(2, 3))
    if mask is not None:
        # not -inf: its softmax is NaN where nothing is seen, and NaN survives a loss that leaves the row out
        scores_BNLM = scores_BNLM.masked_fill(~mask, torch.finfo(scores_BNLM.dtype).min)
    return torch.matmul(torch.softmax(scores_BNLM, -1), value_BNMH)


def attend(query_BNLH: Tensor, key_BNMH: Tensor, value_BNMH: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k / sqrt(H)) v, [B, N, L, H].

    Args:
        query_BNLH: queries.
        key_BNMH: keys.
        value_BNMH: values.
        mask: bool, True where a query sees a key; [B or 1, 1, L or 1, M]. What a query gets that sees nothing depends
            on the kernel (zeros, a mean, NaN): masks from `key_mask` hold no such query.
    """
    if is_plain(query_BNLH, key_BNMH):
        return plain_attend(query_BNLH, key_BNMH, value_BNMH, mask)
    return F.scaled_dot_product_attention(query_BNLH, key_BNMH, value_BNMH, attn_mask=mask)


def key_mask(visible_BM: Tensor | None) -> Tensor | None:
    """Return a mask over keys as `attend` takes it.

    A row with nothing visible (padding of a batch) sees everything instead, so that states nobody reads stay finite.
    """
    if visible_BM is None:
        return None
    return (visible_BM | ~visible_BM.any(dim=1, keepdim=True))[:, None, None, :]


def joined_key_mask(*sources: tuple[Tensor | None, Tensor]) -> Tensor | None:
    """Return `key_mask` over the keys of several sources one after the other, None when everything is visible.

    Args:
        sources: of each, what is visible (bool [B, M]; None: all) and a tensor [B, M, ...] of its size.
    """
    if all(visible_BM is None for visible_BM, _ in sources):
        return None
    visible = [
        torch.ones(like.shape[:2], dtype=torch.bool, device=like.device) if visible_BM is None else visible_BM
        for visible_BM, like in sources
    ]
    return key_mask(torch.cat(visible, dim=1))


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
        self.query_norm = nn.RMSNorm(self.head_width, eps=NORM_EPS)
        self.key_norm = nn.RMSNorm(self.head_width, eps=NORM_EPS)

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
