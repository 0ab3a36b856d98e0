"""What the rows of a grid cost on a machine: steps from the budget, seconds from rates, bytes from counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from params.schema import GridSpec
from steps.check_data import DataFacts
from steps.estimates import (
    DTYPE_BYTES,
    MemoryEstimate,
    ModelShape,
    RowCost,
    anchor_bytes,
    ar_seconds,
    decode_seconds,
    training_memory,
)
from steps.machine import Machine
from steps.plan_rows import PlannedRow, SharedWork

BYTES_PER_TOKEN = 4.2
"""Text bytes a token, for documents not yet tokenised."""
TOKENS_PER_S = 4e5
"""Tokenising, one core."""
MODEL_S = 25.0
"""Reading, converting, probing and saving a model of the embedded one's size for the first time."""


@dataclass(frozen=True, kw_only=True)
class GridCost:
    """Estimates for the whole grid. Seconds are estimates; parameters and disk are counted.

    Attributes:
        train_sequences: training sequences there will be, None when unknown.
        rows: row id -> its cost.
        shared_s: name of a shared piece of work -> seconds.
        memory: at the peak of training, of the hungriest row.
        memory_row: that row.
        anchor_sequences: distinct training sequences that the anchor store covers.
        disk: name -> bytes.
    """

    train_sequences: int | None
    rows: Mapping[str, RowCost]
    shared_s: Mapping[str, float]
    memory: MemoryEstimate
    memory_row: str
    anchor_sequences: int
    disk: Mapping[str, float]

    @property
    def total_s(self) -> float:
        """Wall time, one row after another."""
        return sum(self.shared_s.values()) + sum(r.total_s for r in self.rows.values())

    @property
    def total_disk(self) -> float:
        """Bytes."""
        return sum(self.disk.values())


def grid_cost(
    spec: GridSpec,
    rows: tuple[PlannedRow, ...],
    donors: Mapping[str, PlannedRow],
    shared: SharedWork,
    shape: ModelShape,
    data: DataFacts,
    machine: Machine,
) -> GridCost:
    """Estimate everything."""
    sequences = _train_sequences(spec, data)
    factors = {row.cell: row.cost_factor for row in (*rows, *donors.values())}
    costs = {row.row_id: _row_cost(spec, row, factors, shape, sequences, machine) for row in rows}
    most = max((c.steps * r.train.batch_size for r in rows if (c := costs[r.row_id]).steps), default=0)
    most *= len(spec.seeds)  # each seed has its own order
    covered = min(most, sequences) if sequences is not None else most
    memories = {r.row_id: _memory(spec, r, shape, machine) for r in rows}
    hungriest = max(memories, key=lambda name: memories[name].total)
    return GridCost(
        train_sequences=sequences,
        rows=costs,
        shared_s=_shared_seconds(spec, rows, donors, shared, shape, data, machine, covered, costs),
        memory=memories[hungriest],
        memory_row=hungriest,
        anchor_sequences=covered if shared.anchors else 0,
        disk=_disk(spec, rows, shared, shape, covered),
    )


def _response(spec: GridSpec) -> int:
    return spec.data.response_tokens if spec.data.layout == "windows" else spec.data.length


def _read_bytes(spec: GridSpec, data: DataFacts) -> float:
    """Size of the text that is read."""
    return data.num_bytes if data.num_bytes is not None else 4e3 * (spec.data.max_documents or 500)  # web pages


def _train_sequences(spec: GridSpec, data: DataFacts) -> int | None:
    limit = spec.data.train_sequences
    if data.num_bytes is None and spec.data.max_documents is None:
        return limit
    found = _read_bytes(spec, data) / BYTES_PER_TOKEN / spec.data.length
    found *= 1 - spec.data.heldout_fraction
    return max(1, math.floor(min(found, limit or found)))


def step_flops(spec: GridSpec, row: PlannedRow, shape: ModelShape) -> float:
    """FLOPs of one optimiser step: a backward pass costs two forwards; half of the response rows reach the head."""
    positions = row.train.batch_size * spec.data.length
    head_rows = row.train.batch_size * _response(spec) * (1.0 if row.capabilities.causal else 0.5)
    return 3.0 * shape.forward_flops(positions, spec.data.length, head_rows) * row.cost_factor


def planned_steps(spec: GridSpec, row: PlannedRow, shape: ModelShape, sequences: int | None, machine: Machine) -> int:
    """Convert the budget into optimiser steps; those of `seconds` and `flops` are estimates until the run."""
    if not row.trains:
        return 0
    if spec.budget is None:
        return row.train.steps or 0
    kind, value = spec.budget.kind, spec.budget.value
    flops = step_flops(spec, row, shape)
    if kind == "tokens":
        steps = value / (row.train.batch_size * _response(spec))
    elif kind == "flops":
        steps = value / flops
    elif kind == "seconds":
        steps = value / machine.seconds(flops, 1, machine.dtype(row.train.dtype))
    else:
        steps = value * (sequences or 0) / row.train.batch_size
    return max(1, math.ceil(steps - 1e-9))


def _row_cost(
    spec: GridSpec,
    row: PlannedRow,
    factors: Mapping[str, float],
    shape: ModelShape,
    sequences: int | None,
    machine: Machine,
) -> RowCost:
    steps = planned_steps(spec, row, shape, sequences, machine)
    flops = steps * step_flops(spec, row, shape)
    seconds = machine.seconds(flops, steps, machine.dtype(row.train.dtype)) if steps else 0.0
    prefix = row.requirements.prefix
    if prefix is not None:  # trained once, by the cell it comes from or as shared work
        first = prefix.share * factors[prefix.cell]
        seconds *= max(0.0, row.cost_factor - first) / row.cost_factor
    return RowCost(
        steps=steps,
        train_flops=flops,
        train_s=seconds,
        evaluate_s=_evaluate_seconds(spec, row, shape, machine),
        benchmark_s=_benchmark_seconds(spec, row, shape, machine),
    )


def _evaluate_seconds(spec: GridSpec, row: PlannedRow, shape: ModelShape, machine: Machine) -> float:
    settings, length = spec.eval, spec.data.length
    dtype = machine.dtype(settings.dtype)

    def forwards(sequences: float, head_rows: float) -> float:
        flops = shape.forward_flops(sequences * length, length, sequences * head_rows)
        return machine.seconds(flops, math.ceil(sequences / settings.batch_size), dtype)

    total = 0.0
    if row.capabilities.exact_likelihood:
        total += forwards(settings.nelbo_sequences, _response(spec))
    if row.capabilities.nelbo:
        total += 2 * forwards(settings.nelbo_sequences * settings.nelbo_samples, _response(spec) / 2)
        total += forwards(settings.mask_ratio_sequences * len(settings.mask_ratios), _response(spec) / 2)
    samples = settings.frontier_samples * len(settings.frontier_temperatures)
    new = _response(spec)
    if row.capabilities.unmasking:
        decodes = math.ceil(samples / settings.batch_size)
        total += decodes * decode_seconds(
            shape,
            machine,
            length=length,
            new=new,
            steps=settings.frontier_steps,
            batch=settings.batch_size,
            dtype=dtype,
        )
    elif row.capabilities.causal:
        total += math.ceil(samples / settings.batch_size) * ar_seconds(
            shape, machine, new=new, batch=settings.batch_size, dtype=dtype
        )
    return total + forwards(samples, new)  # the judge reads them all


def _benchmark_seconds(spec: GridSpec, row: PlannedRow, shape: ModelShape, machine: Machine) -> float:
    bench = spec.bench
    dtype = machine.dtype(row.train.dtype)
    total = 0.0
    for batch in bench.batch_sizes:
        if row.capabilities.unmasking:
            total += sum(
                decode_seconds(
                    shape,
                    machine,
                    length=bench.prompt_tokens + bench.new_tokens,
                    new=bench.new_tokens,
                    steps=steps,
                    batch=batch,
                    dtype=dtype,
                )
                for steps in bench.steps
            )
        elif row.capabilities.causal:
            total += ar_seconds(shape, machine, new=bench.new_tokens, batch=batch, dtype=dtype)
    return total * (bench.rounds + bench.warmup_rounds)


def _memory(spec: GridSpec, row: PlannedRow, shape: ModelShape, machine: Machine) -> MemoryEstimate:
    if not row.trains:
        size = DTYPE_BYTES[machine.dtype(spec.eval.dtype)]
        base = training_memory(shape, 0, spec.data.length, dtype="fp32", checkpointing=True)
        return MemoryEstimate(weights=size * shape.parameters, activations=0.0, rest=base.rest)
    return training_memory(
        shape,
        row.train.micro_batch_size or row.train.batch_size,
        spec.data.length,
        dtype=machine.dtype(row.train.dtype),
        checkpointing=row.train.activation_checkpointing,
    )


def _shared_seconds(
    spec: GridSpec,
    rows: tuple[PlannedRow, ...],
    donors: Mapping[str, PlannedRow],
    shared: SharedWork,
    shape: ModelShape,
    data: DataFacts,
    machine: Machine,
    covered: int,
    costs: Mapping[str, RowCost],
) -> dict[str, float]:
    length = spec.data.length
    forward = shape.forward_flops(length, length, 0)
    dtype = machine.dtype("auto")
    pieces = {
        "prepare model": MODEL_S * shape.parameters / 134.5e6 + 2.0,
        "prepare data": _read_bytes(spec, data) / BYTES_PER_TOKEN / TOKENS_PER_S + 2.0,
    }
    scratch = spec.model.scratch
    if scratch is not None:
        tokens = scratch.batch_size * scratch.length
        flops = scratch.steps * 3.0 * shape.forward_flops(tokens, scratch.length, tokens)
        pieces["prepare model"] += machine.seconds(flops, scratch.steps, "fp32")
    if shared.anchors:
        pieces["cache anchors"] = machine.seconds(covered * forward, covered / 8, dtype)
    prefix_s = 0.0
    for row_id, need in shared.prefixes:
        if need.cell in donors:  # no row trains it anyway
            row = next(r for r in rows if r.row_id == row_id)
            donor = donors[need.cell]
            steps = need.share * costs[row_id].steps
            prefix_s += machine.seconds(steps * step_flops(spec, donor, shape), steps, machine.dtype(row.train.dtype))
    if prefix_s:
        pieces["train shared prefixes"] = prefix_s
    orders_s = 0.0
    for _, order in shared.trajectories:
        passes = {"student": order.commit_steps or _response(spec), "ar_difficulty": 1}.get(order.mode, 0)
        orders_s += machine.seconds(order.responses * passes * forward, order.responses * passes / 8, dtype)
    if shared.trajectories:
        pieces["extract trajectories"] = orders_s
    return pieces


def _disk(
    spec: GridSpec, rows: tuple[PlannedRow, ...], shared: SharedWork, shape: ModelShape, covered: int
) -> dict[str, float]:
    trained = [r for r in rows if r.trains]
    disk = {
        "converted model": 4.0 * shape.parameters,
        "trained cells": 4.0 * shape.parameters * len(trained),
        # master weights and two moments; the newest and the one being written
        "checkpoints": 12.0 * shape.parameters * (2 * bool(trained) + len(shared.prefixes)),
    }
    if shared.anchors:
        everywhere = shared.anchors.positions == "all"
        per_sequence = spec.data.length if everywhere else _response(spec)
        disk["anchors"] = anchor_bytes(shape, covered, per_sequence, len(shared.anchors.layers), spec.anchors.dtype)
    return disk
