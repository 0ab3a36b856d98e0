"""Filling the anchor store: a frozen model reads clean tokens causally, its states are kept. B batch, L length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.data.anchor_codec import standardised_error
from dllm_core.data.anchor_files import Ranges, covers
from dllm_core.data.anchors import AnchorStore, Positions, kept_rows, needed_rows
from dllm_core.data.batch import Batch

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Extraction:
    """What an extraction did.

    Attributes:
        num_computed: sequences that went through the teacher.
        num_found: sequences whose chunk held everything already.
        seconds: wall time of the computed ones, writing included.
        flops: floating-point operations of the teacher.
    """

    num_computed: int
    num_found: int
    seconds: float
    flops: float


def extract(
    backbone: Backbone,
    batches: Iterable[Batch],
    store: AnchorStore,
    layers: Sequence[str],
    on_progress: OnProgress | None = None,
    *,
    positions: Positions = "all",
    overwrite: bool = False,
) -> Extraction:
    """Bring the layers of every sequence into the store; what is there already is skipped.

    Cost: one forward pass without the head per missing sequence; one batch of states in memory.

    Args:
        backbone: the teacher; runs with causal attention, without gradients, in its own dtype and on its own device.
        batches: clean sequences.
        store: where the states go.
        layers: "embed", "1".."N-1", "final".
        on_progress: called after each batch with (sequences computed, sequences found).
        positions: which rows of a sequence will be read; `kept_rows` says which are stored for that.
        overwrite: compute also what is there.

    Raises:
        StoreError: the store belongs to another teacher, attention mode or precision.
        DllmError: an unknown layer.
    """
    computed = found = 0
    seconds = flops = write_s = 0.0
    training = backbone.training
    backbone.eval()
    try:
        for batch in batches:
            started = time.perf_counter()
            needed, rows = needed_rows(batch, positions), kept_rows(batch, positions)
            absent = set(needed if overwrite else store.missing(list(needed), layers, needed))
            picked = [i for i, key in enumerate(batch.sequence_keys) if key in absent]
            if picked:
                todo = batch.select(picked)
                wanted = _wanted_layers(store, todo.sequence_keys, layers, rows)
                states = _teacher_states(backbone, todo, wanted)
                share = (time.perf_counter() - started) / len(todo)
                for i, key in enumerate(todo.sequence_keys):
                    of_row = {layer: states_BLD[i] for layer, states_BLD in states.items()}
                    before = time.perf_counter()
                    store.write(key, of_row, rows[key], seconds=share + write_s)
                    write_s = time.perf_counter() - before  # charged to the next chunk: this one's header is written
                flops += backbone.flops_forward(todo.input_ids_BL.numel(), todo.length, 0)
                seconds += time.perf_counter() - started
            computed += len(picked)
            found += len(batch) - len(picked)
            if on_progress:
                on_progress(computed, found)
    finally:
        backbone.train(training)
    return Extraction(computed, found, seconds, flops)


def _wanted_layers(
    store: AnchorStore, keys: Sequence[str], layers: Sequence[str], rows: dict[str, Ranges]
) -> list[str]:
    """Return the layers to compute: those asked for, and those that chunks would lose when they grow by rows."""
    wanted = dict.fromkeys(layers)
    for key in keys:
        header = store.files.header(key)
        if header is not None and not covers(header.rows, rows[key]):
            wanted |= dict.fromkeys(header.layers)
    return list(wanted)


@torch.no_grad()
def _teacher_states(backbone: Backbone, batch: Batch, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return layer -> states [B, L, D] on CPU, in the precision that the teacher ran in."""
    on_device = batch.to(backbone.device)
    with backbone.capture(layers) as states:
        backbone.hidden(
            on_device.input_ids_BL,
            causal=True,
            document_BL=on_device.document_BL,
            position_BL=on_device.position_BL,
        )
    return {layer: states[layer].detach().to("cpu") for layer in layers}


def worst_error(backbone: Backbone, batch: Batch, store: AnchorStore, layers: Sequence[str]) -> float:
    """Compare stored states with live ones, in units of each dimension's standard deviation over the batch.

    Position 0 of every document is left out: an AR model keeps states of a hundred times the usual norm there.

    Args:
        backbone: the teacher.
        batch: sequences that are in the store.
        store: the store.
        layers: layers to compare.

    Returns:
        The median over dimensions of `standardised_error`, of the worst layer.

    Raises:
        StoreError: a sequence or layer is not stored.
    """
    wanted = needed_rows(batch, "response_predictors")
    rows = [_inner_rows(wanted[key], batch.position_BL[b]) for b, key in enumerate(batch.sequence_keys)]
    cached = store.gather(batch.sequence_keys, layers, rows)
    live = _teacher_states(backbone, batch, layers)
    found = []
    for layer in layers:
        live_MD = torch.cat([live[layer][b, index] for b, index in enumerate(rows)])
        found.append(float(standardised_error(cached[layer], live_MD).median()) if len(live_MD) > 1 else 0.0)
    return max(found)


def _inner_rows(ranges: Ranges, position_L: Tensor) -> Tensor:
    rows_M = torch.cat([torch.arange(start, stop) for start, stop in ranges] or [torch.arange(0)])
    return rows_M[position_L[rows_M] > 0]
