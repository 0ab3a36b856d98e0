"""Keys and values of a canvas in preallocated buffers, written wherever the caller says.

One class serves every way of caching: append (a prefix, committed blocks), replace in the middle (the active block of
a dual cache), and scattered rows (a refresh of some positions). `at` says where the next pass writes and what it sees:

    cache = SlotCache(backbone.num_layers, capacity=48)
    backbone.hidden(prompt_BL, causal=False, cache=cache.at(0))                 # slots 0..L-1, sees those
    backbone.hidden(block_BL, causal=False, cache=cache.at(16))                 # slots 16.., sees 0..16+L-1
    backbone.hidden(block_BL, causal=False, cache=cache.at(16, visible=48))     # the same slots, sees all 48
    backbone.hidden(rows_BL, causal=False, cache=cache.at(slot_BL))             # any slots, per row; sees all

Nothing is remembered between passes but the buffers: writing the same slots again replaces what they held, so a block
may be tried many times before its final tokens are written. Without gradients only.

B batch, H key heads, C capacity, M visible slots, L new tokens, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dllm_core.errors import DllmError


@dataclass
class Window:
    """Where the next pass writes and what it sees, shared by all layers.

    Attributes:
        slots: first slot of a contiguous stretch, or int64 slots [L] or [B, L].
        visible: slots from 0 that queries may see; None is up to the end of the stretch, or all for given slots.
    """

    slots: int | Tensor = 0
    visible: int | None = None

    def num_visible(self, num_new: int, capacity: int) -> int:
        """Return M for a pass over `num_new` tokens."""
        if self.visible is not None:
            return self.visible
        return self.slots + num_new if isinstance(self.slots, int) else capacity

    def position_BL(self, num_new: int, device: torch.device) -> Tensor:
        """Return the slots of the new tokens, [1 or B, L]: their positions where nothing else is said."""
        if isinstance(self.slots, int):
            return torch.arange(self.slots, self.slots + num_new, device=device)[None]
        return self.slots.expand(1, -1) if self.slots.dim() == 1 else self.slots


class SlotLayer(CacheLayerMixin):
    """One layer's buffers.

    Args:
        capacity: C.
        window: of the cache that the layer belongs to.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, capacity: int, window: Window) -> None:
        super().__init__()
        self.capacity, self.window = capacity, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers in the shape, dtype and device of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # zeros: a slot that was never written must not bring a NaN into a sum whose weight for it is 0
        self.keys = key_states.new_zeros(*key_states.shape[:2], self.capacity, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, H, L, D] at the window's slots and return the visible keys and values, [B, H, M, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        num_new = key_states.shape[2]
        _write(self.keys, key_states, self.window.slots)
        _write(self.values, value_states, self.window.slots)
        visible = self.window.num_visible(num_new, self.capacity)
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def get_seq_length(self) -> int:
        """Return the first slot of the next stretch; 0 for given slots, whose positions are always given too."""
        return self.window.slots if isinstance(self.window.slots, int) else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (M, offset of the first key)."""
        return self.window.num_visible(query_length, self.capacity), 0

    def get_max_length(self) -> int:
        """Return C."""
        return self.capacity


def _write(buffer_BHCD: Tensor, new_BHLD: Tensor, slots: int | Tensor) -> None:
    if isinstance(slots, int):
        buffer_BHCD[:, :, slots : slots + new_BHLD.shape[2]] = new_BHLD
    elif slots.dim() == 1:
        buffer_BHCD.index_copy_(2, slots, new_BHLD)
    else:
        buffer_BHCD.scatter_(2, slots[:, None, :, None].expand_as(new_BHLD), new_BHLD)


class SlotCache(Cache):
    """transformers' cache protocol over slots; see the module's text.

    Args:
        num_layers: blocks of the decoder.
        capacity: C; slots of each row. Positions beyond the model's context are for the caller to refuse.

    Attributes:
        capacity: C.
        window: what `at` set last.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.window = Window()
        super().__init__(layers=[SlotLayer(capacity, self.window) for _ in range(num_layers)])

    def at(self, slots: int | Tensor, visible: int | None = None) -> Self:
        """Say where the next pass writes, and return the cache.

        Args:
            slots: first slot of the new tokens; or the slot of each of them, int64 [L] or [B, L], no slot twice in a
                row. Where only the end of a ragged row is padding, send it to slots that are masked.
            visible: slots from 0 that the queries see (before any mask), written earlier or in this pass. None: up to
                the last new one when `slots` is a number, else all.

        Raises:
            DllmError: more visible slots than there are.
        """
        if visible is not None and not 1 <= visible <= self.capacity:
            raise DllmError(
                f"{visible} visible slots do not fit a cache of {self.capacity}.",
                f"Give 1 to {self.capacity}, or make the cache larger.",
            )
        self.window.slots, self.window.visible = slots, visible
        return self

    def require_room(self, num_new: int) -> None:
        """Check that a stretch of `num_new` tokens fits; given slots are not looked at, they may be on a device.

        Raises:
            DllmError: it ends behind the last slot, or not all of it would be visible.
        """
        if not isinstance(self.window.slots, int):
            return
        end = self.window.slots + num_new
        if self.window.slots < 0 or end > self.capacity:
            raise DllmError(
                f"Slots {self.window.slots}..{end - 1} do not fit a cache of {self.capacity}.",
                "Make the cache as large as the canvas.",
            )

    def keep_rows(self, row_K: Tensor) -> None:
        """Keep the given rows of the batch, in that order.

        Args:
            row_K: int64 row numbers.
        """
        for layer in self.layers:
            if isinstance(layer, SlotLayer) and layer.is_initialized:
                assert layer.keys is not None
                assert layer.values is not None
                layer.keys, layer.values = layer.keys[row_K], layer.values[row_K]
