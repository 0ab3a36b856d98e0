"""Passes of a gated decoder as CUDA graphs: recorded when a shape comes back, replayed from then on.

A graph is a fixed list of launches on fixed addresses, so every input is copied to a buffer of its own and every result
out of one before anything else is replayed. What makes few graphs serve:

- rows asked for are filled up to a power of two, and a graph that reads more rows serves fewer: one for a whole
  decode, though each of its steps asks for fewer;
- where there is a mask anyway (rows of different length, blocks), lengths are rounded up, and what is added is masked;
  without one a length is what it is, since a mask costs the faster attention kernels;
- behind a cache the slots to be written are an input, and all slots are attended to under a mask that says which are
  visible: one graph serves every place of a canvas. Keys and values live in buffers of the graphs, which one decode at
  a time holds; another one that is under way at the same time runs without graphs.

The first pass of a shape is launched as it comes, so that lone passes (a prompt before its blocks) record nothing.

B batch, L tokens run (a graph's own), M rows asked for (of a mask: keys), C slots, K key heads, H head width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.backbone.passes.joined import JoinedPass
from dllm_core.backbone.passes.joined_weights import Joined
from dllm_core.backbone.passes.protocol import Asked, DecoderPass
from dllm_core.backbone.passes.recording import Recording, Shape, Store, slot_layers
from dllm_core.kernels import dispatch
from dllm_core.layers.compiling import complaint, metered
from dllm_core.layers.gated_parts import Parts
from dllm_core.layers.graphs import Recorder

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.backbone.slot_cache import SlotCache

KEPT_SHAPES = 8
"""Shapes whose buffers and graphs are kept; the one used longest ago goes first."""
KEPT_STORES = 2
"""Likewise for keys and values. Of Qwen3-1.7B in bf16 a slot is 0.11 MB: 176 MB for 1,536."""
MOST_TOKENS = 2**13
"""Tokens of a pass beyond which the device is busy for longer than launches take, and graphs only hold memory."""
FEWEST_ROWS = 16
LENGTH_STEP, SLOT_STEP = 32, 64


class Captures:
    """The graphs of one decoder and what they share. Not for a copy of the model, nor for weights that have changed.

    Args:
        weights: of the decoder.
        recorder: makes the graphs; None where there are none to be had.

    Attributes:
        passes: made so far.
        compiles: compiled parts have run on these weights.
    """

    def __init__(self, weights: Joined, recorder: Recorder | None) -> None:
        self.weights, self.recorder = weights, recorder
        self.passes, self.lock = 0, threading.Lock()
        self.compiles = False
        self._fault: str | None = None
        self._recordings: OrderedDict[Shape, Recording] = OrderedDict()
        self._stores: OrderedDict[tuple[int, int], Store] = OrderedDict()

    def recording(self, shape: Shape, store: Store | None, parts: Parts) -> Recording:
        """Return what serves a shape, made if need be."""
        key = next((kept for kept in self._recordings if kept.serves(shape)), shape)
        if key not in self._recordings:
            while len(self._recordings) >= KEPT_SHAPES:
                self._forget(next(iter(self._recordings)))
            self._recordings[key] = Recording(self.weights, parts, key, store)
        self._recordings.move_to_end(key)
        return self._recordings[key]

    def store(self, cache: SlotCache, batch: int) -> Store | None:
        """Return the buffers that a cache lives in, None where it cannot live in any of these."""
        key = (batch, rounded(cache.capacity, SLOT_STEP))
        if key not in self._stores:
            if any(layer.is_initialized for layer in slot_layers(cache)):
                return None
            while len(self._stores) >= KEPT_STORES:
                gone = self._stores.popitem(last=False)[1]
                for shape in [s for s, kept in self._recordings.items() if kept.store is gone]:
                    self._forget(shape)
            self._stores[key] = Store(self.weights, *key)
        self._stores.move_to_end(key)
        return self._stores[key] if self._stores[key].lend(cache) else None

    def _forget(self, shape: Shape) -> None:
        if self.recorder is not None:
            self.recorder.wait()
        del self._recordings[shape]

    def run(self, recording: Recording) -> Tensor:
        """Run what has its inputs; what cannot be recorded is launched as it comes from then on."""
        self.passes += 1
        if self.recorder is not None and recording.is_due and self._fault is None:
            try:
                recording.record(self.recorder)
            except RuntimeError as error:  # no memory left, or a kernel that waits: either is said at run time
                self._fault = complaint(error)
                dispatch.announce("decoder graph", "launched", self._fault)
        with metered() if recording.runs == 0 and recording.parts.compiled else nullcontext():
            return recording.run()


class CapturedPass(DecoderPass):
    """The pass of a decoder that neither `choice.obstacle` nor `joined_weights.obstacle` has anything against.

    Args:
        backbone: the model.
        captures: its graphs.
        parts: implementations of the element-wise parts.
    """

    def __init__(self, backbone: Backbone, captures: Captures, parts: Parts) -> None:
        self._launched = JoinedPass(backbone, captures.weights, parts)
        super().__init__(backbone, self._launched.head_WD)
        self.captures, self.parts = captures, parts

    def states(self, asked: Asked) -> Tensor:
        """Return states of the caller's own; see `DecoderPass`."""
        input_ids_BL, row_M, position_BL, mask_B1LM, cache = asked
        batch, length = input_ids_BL.shape
        captures = self.captures
        with captures.lock:
            if captures.recorder is not None:
                captures.recorder.take_turn()  # before inputs are overwritten that another stream may still read
            store = None if cache is None else captures.store(cache, batch)
            lone = cache is not None and store is None
            if lone or batch * length > MOST_TOKENS or (cache is None and position_BL is not None):
                captures.passes += 1
                return self._launched.states(asked)
            shape = self._shape(input_ids_BL, row_M, mask_B1LM, store)
            recording = captures.recording(shape, store, self.parts)
            recording.put(input_ids_BL, row_M, mask_B1LM)
            if cache is not None:
                recording.put_window(cache, position_BL, mask_B1LM)
            out = captures.run(recording)
            if row_M is not None:
                return out[: len(row_M)].clone()
            return out.view(batch, recording.shape.length, -1)[:, :length].clone()

    def _shape(
        self, input_ids_BL: Tensor, row_M: Tensor | None, mask_B1LM: Tensor | None, store: Store | None
    ) -> Shape:
        weights = self.captures.weights
        batch, length = input_ids_BL.shape
        masked = None if mask_B1LM is None else mask_B1LM.shape[0]
        return Shape(
            batch,
            length if masked is None or store is not None else rounded(length, LENGTH_STEP),
            None if row_M is None else max(FEWEST_ROWS, 1 << (len(row_M) - 1).bit_length()),
            masked if store is None else batch,
            None if store is None else store.cache.capacity,
            self.parts.compiled,
            torch.backends.cuda.matmul.fp32_precision if weights.dtype == torch.float32 else "",
        )


def rounded(number: int, step: int) -> int:
    """Return the next multiple of a step."""
    return -(-number // step) * step
