"""The [clean | noisy] layout: every block denoised behind its clean prefix in one pass (arXiv:2503.09573).

```
            clean c0 c1 c2   noisy n1 n2 n3
clean c1          x  x
noisy n2          x  x             x          c: clean blocks, n: noisy ones; a row sees the blocks marked x
```

B batch, L length, C columns of the clean part, N columns of a noisy part, W = C + views * N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.layers.block_mask import attention_mask, sees
from dllm_core.methods.block_causal.draws import block_starts


@dataclass(frozen=True)
class Layout:
    """Which columns of a batch stand in the clean part and in each noisy part.

    Left out is what no prediction needs: clean columns that no noisy block looks at (the last block of a document), and
    noisy blocks without a response.

    Attributes:
        block_size: tokens of a block.
        num_clean: C; the clean part holds columns 0..C-1.
        first: first column of the noisy parts.
        stop: column at which they end.
        views: noisy parts.
    """

    block_size: int
    num_clean: int
    first: int
    stop: int
    views: int

    @classmethod
    def of(cls, batch: Batch, block_size: int, views: int) -> Layout:
        """Return the smallest layout in which all response tokens can be predicted."""
        start_BL = block_starts(batch.position_BL, block_size)
        of_response = start_BL[batch.response_BL]
        has_prefix = of_response[batch.position_BL[batch.response_BL] >= block_size]
        ends = [
            of_response.amin(),
            of_response.amax() + block_size,
            (has_prefix.amax() if len(has_prefix) else of_response.new_zeros(())),
        ]
        first, stop, num_clean = torch.stack(ends).tolist()
        return cls(block_size, num_clean, first, min(batch.length, stop), views)

    @property
    def width(self) -> int:
        """W."""
        return self.num_clean + self.views * (self.stop - self.first)

    def joined(self, clean_BL: Tensor, noisy: Sequence[Tensor]) -> Tensor:
        """Return values [B, W]: of the clean part, and of the noisy ones."""
        return torch.cat([clean_BL[:, : self.num_clean], *(n_BL[:, self.first : self.stop] for n_BL in noisy)], dim=1)

    def attention_mask(self, document_BL: Tensor, position_BL: Tensor) -> Tensor:
        """Return bool [B, 1, W, W], True where a query sees a key.

        A clean row sees clean rows of its own and of earlier blocks; a noisy row sees its own block in its own noisy
        part and clean rows of earlier blocks; nobody sees another document.
        """
        noisy = [position_BL] * self.views
        block_BW = self.joined(position_BL, noisy) // self.block_size
        document_BW = self.joined(document_BL, [document_BL] * self.views)
        part_W = torch.arange(self.views + 1, device=block_BW.device).repeat_interleave(
            torch.tensor([self.num_clean] + [self.stop - self.first] * self.views, device=block_BW.device)
        )
        clean = slice(self.num_clean)
        noisy_keys = slice(self.num_clean, None)
        own_document_BWW = sees(document_BW, document_BW, "same")
        is_clean_W1 = (part_W == 0)[:, None]
        to_clean = torch.where(
            is_clean_W1, sees(block_BW, block_BW[:, clean], "up_to"), sees(block_BW, block_BW[:, clean], "earlier")
        )
        to_noisy = sees(block_BW, block_BW[:, noisy_keys], "same") & sees(part_W, part_W[noisy_keys], "same")
        return attention_mask(to_clean & own_document_BWW[:, :, clean], to_noisy & own_document_BWW[:, :, noisy_keys])

    def predictors(self, position_BL: Tensor, view: int, *, shifted: bool) -> Tensor:
        """Return [B, L]: the column of the layout whose state stands for position i of a view.

        Shifted, the state at i predicts the token at i + 1: where that one begins a block, the state is that of the
        clean row i, which is what decoding has at hand; elsewhere it is that of the noisy row. Positions whose state
        nobody reads get column 0.
        """
        place_L = torch.arange(position_BL.shape[1], device=position_BL.device)
        noisy_L = self.num_clean + view * (self.stop - self.first) + place_L - self.first
        noisy_L = noisy_L.masked_fill((place_L < self.first) | (place_L >= self.stop), 0)
        if not shifted:
            return noisy_L.expand_as(position_BL)
        clean_L = place_L.masked_fill(place_L >= self.num_clean, 0)
        ends_block_BL = (position_BL + 1) % self.block_size == 0
        return torch.where(ends_block_BL, clean_L, noisy_L)
