"""One shape of a decoder's pass with inputs of its own, so that it can be recorded as a graph.

B batch, L tokens run, M rows asked for (of a mask: keys), C slots, D hidden.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_core.backbone.passes.joined import decoded
from dllm_core.backbone.passes.joined_weights import Joined
from dllm_core.backbone.slot_cache import SlotCache, SlotLayer
from dllm_core.layers.gated_parts import Parts
from dllm_core.layers.graphs import Graph, Recorder


class Shape(NamedTuple):
    """What a graph is recorded for.

    Attributes:
        batch: B.
        length: L.
        rows: M; None for all.
        masks: masks of the batch, 1 for one that all rows share; None for none.
        slots: C; None without a cache.
        compiled: through compiled parts.
        precision: of fp32 products.
    """

    batch: int
    length: int
    rows: int | None
    masks: int | None
    slots: int | None
    compiled: bool
    precision: str

    def serves(self, other: Shape) -> bool:
        """Whether a pass of another shape can run in this one: the same, of no more rows."""
        if self._replace(rows=None) != other._replace(rows=None):
            return False
        if self.rows is None or other.rows is None:
            return self.rows == other.rows
        return self.rows >= other.rows


class Store:
    """Keys and values that graphs read and write, lent to one cache at a time.

    Args:
        weights: of the decoder.
        batch: B.
        slots: C.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, weights: Joined, batch: int, slots: int) -> None:
        self.cache = SlotCache(len(weights.blocks), slots)
        like = torch.zeros(batch, weights.num_key_heads, 1, weights.width, dtype=weights.dtype, device=weights.device)
        for layer in slot_layers(self.cache):
            layer.lazy_initialization(like, like)
        self._holder: weakref.ref[SlotCache] | None = None
        self._lent: list[tuple[Tensor, Tensor]] = []

    def lend(self, cache: SlotCache) -> bool:
        """Let a cache live here, empty at first; False where another one does, or where it already lives elsewhere."""
        holder = None if self._holder is None else self._holder()
        theirs = slot_layers(cache)
        if holder is cache:
            return all(
                layer.keys is keys and layer.values is values
                for layer, (keys, values) in zip(theirs, self._lent, strict=True)
            )
        if holder is not None or any(layer.is_initialized for layer in theirs):
            return False
        self._holder, self._lent = weakref.ref(cache), []
        for mine, other in zip(slot_layers(self.cache), theirs, strict=True):
            assert mine.keys is not None
            assert mine.values is not None
            keys, values = mine.keys.zero_()[:, :, : cache.capacity], mine.values.zero_()[:, :, : cache.capacity]
            other.keys, other.values, other.is_initialized = keys, values, True
            other.dtype, other.device = keys.dtype, keys.device
            self._lent.append((keys, values))
        return True


def slot_layers(cache: SlotCache) -> list[SlotLayer]:
    """Return a cache's layers as what they are."""
    return [layer for layer in cache.layers if isinstance(layer, SlotLayer)]


class Recording:
    """One shape's inputs, and its run.

    Args:
        weights: of the decoder.
        parts: implementations of the element-wise parts.
        shape: of the pass.
        store: of keys and values, where there is a cache.
    """

    _out: Tensor

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, weights: Joined, parts: Parts, shape: Shape, store: Store | None) -> None:
        self.weights, self.parts, self.shape, self.store = weights, parts, shape, store
        batch, length, device = shape.batch, shape.length, weights.device
        self.ids_BL = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.row_M = None if shape.rows is None else torch.zeros(shape.rows, dtype=torch.long, device=device)
        self.position_BL = self.slot_BL = self.rotation = None
        self.mask_B1LM = self._start_1LM = None
        if store is not None:
            self.position_BL, self.slot_BL = torch.zeros_like(self.ids_BL), torch.zeros_like(self.ids_BL)
        else:
            self.rotation = weights.rotations.at(torch.arange(length, device=device)[None])
        if shape.masks is not None:
            # tokens beyond a pass see themselves: a query that sees nothing is no number
            keys = length if shape.slots is None else shape.slots
            self._start_1LM = torch.eye(length, keys, dtype=torch.bool, device=device)[None]
            if shape.slots is not None:
                self._start_1LM = torch.zeros_like(self._start_1LM)
            self.mask_B1LM = self._start_1LM.repeat(shape.masks, 1, 1, 1)
        self._seen: tuple[int, int] | None = None
        self._is_open = False
        self._graph: Graph | None = None
        self.runs = 0

    # -- inputs -------------------------------------------------------------------------------------------------------

    def put(self, input_ids_BL: Tensor, row_M: Tensor | None, mask_B1LM: Tensor | None) -> None:
        """Copy ids, rows and mask to where the run reads them."""
        length = input_ids_BL.shape[1]
        self.ids_BL[:, :length].copy_(input_ids_BL)
        if row_M is not None:
            assert self.row_M is not None
            if length != self.shape.length and self.shape.batch > 1:
                row_M = row_M + row_M // length * (self.shape.length - length)
            # what is left of earlier rows behind them is valid, and cut off
            self.row_M[: len(row_M)].copy_(row_M)
        if self.store is None and mask_B1LM is not None:
            self._put_mask(mask_B1LM, length, length)

    def put_window(self, cache: SlotCache, position_BL: Tensor | None, mask_B1LM: Tensor | None) -> None:
        """Copy what a cache's window says: slots to be written, positions, and what is visible."""
        assert self.position_BL is not None
        assert self.slot_BL is not None
        window, length = cache.window, self.shape.length
        slot_BL = window.position_BL(length, self.weights.device)
        self.slot_BL.copy_(slot_BL)
        self.position_BL.copy_(slot_BL if position_BL is None else position_BL)
        self._put_mask(mask_B1LM, length, window.num_visible(length, cache.capacity))

    def _put_mask(self, mask_B1LM: Tensor | None, length: int, visible: int) -> None:
        assert self.mask_B1LM is not None
        assert self._start_1LM is not None
        part = self.mask_B1LM[:, :, :length, :visible]
        if self._seen != (length, visible):
            self.mask_B1LM.copy_(self._start_1LM)
        elif mask_B1LM is None and self._is_open:
            return
        self._seen, self._is_open = (length, visible), mask_B1LM is None
        if mask_B1LM is None:
            part.fill_(True)
        else:
            part.copy_(mask_B1LM)

    # -- the run ------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self) -> None:
        rotation, keep = self.rotation, None
        if self.store is not None:
            assert self.position_BL is not None
            assert self.slot_BL is not None
            rotation, keep = self.weights.rotations.at(self.position_BL), self.store.cache.at(self.slot_BL).update
        assert rotation is not None
        self._out = decoded(
            self.weights, self.parts, self.ids_BL, rotation, row_M=self.row_M, mask_B1LM=self.mask_B1LM, keep=keep
        )

    def run(self) -> Tensor:
        """Run and return the graph's own result, which the next run of any graph overwrites; [M, D] or [B L, D]."""
        self.runs += 1
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        return self._out

    @property
    def is_due(self) -> bool:
        """Whether the shape has come back and is not recorded yet."""
        return self.runs > 0 and self._graph is None

    def record(self, recorder: Recorder) -> None:
        """Record the run; its inputs may be any valid ones."""
        self._graph = recorder.record(self._run)
