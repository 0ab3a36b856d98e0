"""What a grid costs on a machine: its rows, what they share, memory and disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from params.schema import GridSpec
from steps.check_data import DataFacts
from steps.estimates import MemoryEstimate, ModelShape, RowCost
from steps.machine import Machine
from steps.plan_rows import PlannedRow, SharedWork
from steps.row_costs import row_cost, row_memory, writing_copy
from steps.shared_costs import BYTES_PER_TOKEN, AnchorCost, anchor_costs, disk_bytes, read_bytes, shared_seconds


@dataclass(frozen=True, kw_only=True)
class GridCost:
    """Estimates for the whole grid. Seconds are estimates; parameters and disk are counted.

    Attributes:
        train_sequences: training sequences there will be, None when unknown.
        rows: row id -> its cost.
        shared_s: name of a shared piece of work -> seconds.
        memories: row id -> bytes at the peak of its training.
        copies: timed row -> bytes of weights that it keeps a second time to decode on a CPU; rows without are left out.
        anchors: the distinct needs of teacher states.
        disk: name -> bytes.
    """

    train_sequences: int | None
    rows: Mapping[str, RowCost]
    shared_s: Mapping[str, float]
    memories: Mapping[str, MemoryEstimate]
    copies: Mapping[str, float]
    anchors: tuple[AnchorCost, ...]
    disk: Mapping[str, float]

    @property
    def memory_row(self) -> str:
        """The hungriest row."""
        return max(self.memories, key=lambda name: self.memories[name].total)

    @property
    def memory(self) -> MemoryEstimate:
        """At the peak of training, of the hungriest row."""
        return self.memories[self.memory_row]

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
    trained = (*rows, *shared.built_upon)
    costs = {row.row_id: row_cost(spec, row, factors, shape, sequences, machine) for row in trained}
    anchors = anchor_costs(spec, trained, costs, shape, sequences)
    return GridCost(
        train_sequences=sequences,
        rows={row.row_id: costs[row.row_id] for row in rows},
        shared_s=shared_seconds(spec, rows, donors, shared, shape, data, machine, anchors, costs),
        memories={row.row_id: row_memory(spec, row, shape, machine) for row in trained},
        copies=_copies(spec, rows, shape, machine),
        anchors=anchors,
        disk=disk_bytes(spec, (*rows, *shared.built_upon * len(spec.seeds)), shared, anchors, shape),
    )


def _copies(spec: GridSpec, rows: tuple[PlannedRow, ...], shape: ModelShape, machine: Machine) -> Mapping[str, float]:
    found = {
        row.row_id: writing_copy(row, shape, machine, machine.dtype(row.train.dtype))
        for row in rows
        if row.seed == spec.seeds[0]
    }
    return {row_id: size for row_id, size in found.items() if size}


def _train_sequences(spec: GridSpec, data: DataFacts) -> int | None:
    limit = spec.data.train_sequences
    if data.num_bytes is None and spec.data.max_documents is None:
        return limit
    found = read_bytes(spec, data) / BYTES_PER_TOKEN / spec.data.length
    found *= 1 - spec.data.heldout_fraction
    return max(1, math.floor(min(found, limit or found)))
