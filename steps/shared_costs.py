"""What the work costs that rows share: model, text, teacher states, first parts, commit orders; and the disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dllm_core.methods.requirements import AnchorNeed
from params.schema import GridSpec
from steps.check_data import DataFacts
from steps.estimates import ModelShape, RowCost, anchor_bytes
from steps.machine import Machine
from steps.plan_rows import PlannedRow, SharedWork
from steps.row_costs import own_network, response_tokens, step_flops

BYTES_PER_TOKEN = 4.2
"""Text bytes a token, for documents not yet tokenised."""
TOKENS_PER_S = 4e5
"""Tokenising, one core."""
MODEL_S = 25.0
"""Reading, converting, probing and saving a model of the embedded one's size for the first time."""


@dataclass(frozen=True, kw_only=True)
class AnchorCost:
    """One distinct need of teacher states.

    Attributes:
        need: layers and rows.
        rows: ids of the table rows that have it.
        sequences: distinct training sequences.
        heldout: held-out sequences.
        num_bytes: on disk, if nobody else read anything of them.
    """

    need: AnchorNeed
    rows: tuple[str, ...]
    sequences: int
    heldout: int
    num_bytes: float


def anchor_costs(
    spec: GridSpec,
    rows: Iterable[PlannedRow],
    costs: Mapping[str, RowCost],
    shape: ModelShape,
    sequences: int | None,
) -> tuple[AnchorCost, ...]:
    """Return one entry for each distinct need, in the order of the table; each seed has its own order of samples."""
    found: dict[tuple[object, ...], list[PlannedRow]] = {}
    for row in rows:
        need = row.requirements.anchors
        if need is not None:
            found.setdefault((need.layers, need.positions, need.heldout, need.cell), []).append(row)
    made = []
    for readers in found.values():
        need = readers[0].requirements.anchors
        assert need is not None
        count = max(costs[row.row_id].distinct for row in readers) * len(spec.seeds)
        heldout = spec.data.heldout_sequences if need.heldout else 0
        if need.cell is not None:  # every seed has a trained cell of its own, and that has a store of its own
            heldout *= len(spec.seeds)
        elif sequences is not None:
            count = min(count, sequences)
        rows_of_sequence = _stored_rows(spec, [need])
        size = anchor_bytes(shape, count + heldout, rows_of_sequence, len(need.layers), spec.anchors.dtype)
        names = tuple(row.row_id for row in readers)
        made.append(AnchorCost(need=need, rows=names, sequences=count, heldout=heldout, num_bytes=size))
    return tuple(made)


def anchor_disk(spec: GridSpec, anchors: Sequence[AnchorCost], shape: ModelShape) -> float:
    """Return bytes of all stores: what several needs read of a sequence is there once for each model."""
    return sum(
        _store_bytes(spec, [a for a in anchors if a.need.cell == cell], shape)
        for cell in dict.fromkeys(a.need.cell for a in anchors)
    )


def _store_bytes(spec: GridSpec, anchors: Sequence[AnchorCost], shape: ModelShape) -> float:
    """Return bytes of one model's store.

    All rows follow the common order, so that the sequences of a need are among those of any larger one.
    """
    total, before = 0.0, 0
    for count in sorted({a.sequences for a in anchors}):
        total += _union_bytes(spec, [a.need for a in anchors if a.sequences >= count], shape, count - before)
        before = count
    readers = [a for a in anchors if a.heldout]
    return total + (_union_bytes(spec, [a.need for a in readers], shape, readers[0].heldout) if readers else 0.0)


def _union_bytes(spec: GridSpec, needs: Sequence[AnchorNeed], shape: ModelShape, sequences: int) -> float:
    layers = {layer for need in needs for layer in need.layers}
    return anchor_bytes(shape, sequences, _stored_rows(spec, needs), len(layers), spec.anchors.dtype)


def _stored_rows(spec: GridSpec, needs: Sequence[AnchorNeed]) -> int:
    """Return stored rows of a sequence: response tokens, and the row before the first of them."""
    if spec.data.layout != "windows" or any(need.positions == "all" for need in needs):
        return spec.data.length
    return spec.data.response_tokens + 1


def read_bytes(spec: GridSpec, data: DataFacts) -> float:
    """Return the size of the text that is read."""
    return data.num_bytes if data.num_bytes is not None else 4e3 * (spec.data.max_documents or 500)  # web pages


def shared_seconds(
    spec: GridSpec,
    rows: tuple[PlannedRow, ...],
    donors: Mapping[str, PlannedRow],
    shared: SharedWork,
    shape: ModelShape,
    data: DataFacts,
    machine: Machine,
    anchors: Sequence[AnchorCost],
    costs: Mapping[str, RowCost],
) -> dict[str, float]:
    """Return name -> seconds of each piece of work that no row owns."""
    length = spec.data.length
    forward = shape.teacher_flops(length)
    dtype = machine.dtype("auto")
    pieces = {
        "prepare model": MODEL_S * shape.parameters / 134.5e6 + 2.0,
        "prepare data": read_bytes(spec, data) / BYTES_PER_TOKEN / TOKENS_PER_S + 2.0,
    }
    scratch = spec.model.scratch
    if scratch is not None:
        tokens = scratch.batch_size * scratch.length
        flops = scratch.steps * 3.0 * shape.forward_flops(tokens, scratch.length, tokens)
        pieces["prepare model"] += machine.seconds(flops, scratch.steps, "fp32")
    for name, cells in (("cache anchors", {None}), ("cache trained states", {a.need.cell for a in anchors} - {None})):
        for cell in cells:
            read = [a for a in anchors if a.need.cell == cell]
            if read:
                covered = max(a.sequences for a in read) + max(a.heldout for a in read)
                pieces[name] = pieces.get(name, 0.0) + machine.seconds(covered * forward, covered / 8, dtype)
    if shared.built_upon:
        seconds = sum(costs[row.row_id].train_s for row in shared.built_upon)
        pieces["train cells to build on"] = seconds * len(spec.seeds)
    prefix_s = 0.0
    for row_id, need in shared.prefixes:
        if need.cell in donors:  # no row trains it anyway
            row = next(r for r in (*rows, *shared.built_upon) if r.row_id == row_id)
            donor = donors[need.cell]
            steps = need.share * costs[row_id].steps
            prefix_s += machine.seconds(steps * step_flops(spec, donor, shape), steps, machine.dtype(row.train.dtype))
    if prefix_s:
        pieces["train shared prefixes"] = prefix_s
    orders_s = 0.0
    for _, order in shared.trajectories:
        passes = {"student": order.commit_steps or response_tokens(spec), "ar_difficulty": 1}.get(order.mode, 0)
        orders_s += machine.seconds(order.responses * passes * forward, order.responses * passes / 8, dtype)
    if shared.trajectories:
        pieces["extract trajectories"] = orders_s
    return pieces


def disk_bytes(
    spec: GridSpec,
    rows: Sequence[PlannedRow],
    shared: SharedWork,
    anchors: Sequence[AnchorCost],
    shape: ModelShape,
) -> dict[str, float]:
    """Return name -> bytes of what a run leaves on disk."""
    kept, trained = [], []
    for row in rows:
        if row.trains:
            network = own_network(spec, row, shape)
            kept.append(shape.parameters if network is None else network.num_trainable + network.frozen)
            trained.append(shape.parameters if network is None else network.num_trainable)
    disk = {
        "converted model": 4.0 * shape.parameters,
        "trained cells": 4.0 * sum(kept),
        # master weights and two moments; the newest two and the one being written
        "checkpoints": 12.0 * (3 * max(trained, default=0) + shape.parameters * len(shared.prefixes)),
    }
    if anchors:
        disk["anchors"] = anchor_disk(spec, anchors, shape)
    return disk
