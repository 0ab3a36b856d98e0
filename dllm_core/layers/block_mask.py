"""Who sees whom when a sequence is cut into blocks: masks from block numbers, for halves, caches and padding alike.

B batch, L queries, M keys. Block numbers are integers, [L] or [B, L]; a mask is bool, True where a query sees a key.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["earlier", "same", "up_to"]
"""earlier: keys of earlier blocks. same: keys of the query's own block. up_to: both (of positions in place
of blocks: the causal mask)."""


def sees(query_BL: Tensor, key_BM: Tensor, rule: Rule, visible_BM: Tensor | None = None) -> Tensor:
    """Return bool [B or 1, L, M].

    Args:
        query_BL: block of each query.
        key_BM: block of each key.
        rule: see `Rule`.
        visible_BM: bool; keys that may be looked at (None: all).
    """
    query, key = torch.atleast_2d(query_BL)[:, :, None], torch.atleast_2d(key_BM)[:, None, :]
    mask = key < query if rule == "earlier" else key == query if rule == "same" else key <= query
    return mask if visible_BM is None else mask & visible_BM[:, None, :]


def attention_mask(*parts_BLM: Tensor) -> Tensor:
    """Return the mask over the keys of all parts one after the other, as `attend` takes it: [B, 1, L, M].

    A query that sees nothing (padding) sees everything instead, so that states nobody reads stay finite.
    """
    batch = max(len(part) for part in parts_BLM)
    mask = torch.cat([part.expand(batch, -1, -1) for part in parts_BLM], dim=-1)
    return (mask | ~mask.any(-1, keepdim=True))[:, None]
