"""Cells x seeds -> rows with validated options, and all that has to be prepared before they can train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from dllm_core.errors import DllmError
from dllm_core.methods.registry import room_options
from dllm_core.methods.requirements import (
    AnchorNeed,
    Capabilities,
    PrefixNeed,
    Requirements,
    RoomOptions,
    TrajectoryNeed,
)
from params.errors import ParamsError, did_you_mean
from params.explain import explain
from params.schema import CellSpec, GridSpec, TrainSpec

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """One line of the table, ready to be worked on.

    Attributes:
        row_id: `CELL` or `CELL-seedN`.
        cell, method, seed: what it is.
        options: the room's validated options.
        train: training settings with the cell's overrides.
        capabilities: what can be measured on it.
        requirements: what has to be prepared for it.
        cost_factor: training FLOPs relative to one masked-CE pass.
    """

    row_id: str
    cell: str
    method: str
    seed: int
    options: RoomOptions
    train: TrainSpec
    capabilities: Capabilities
    requirements: Requirements
    cost_factor: float

    @property
    def trains(self) -> bool:
        """False for a reference row that is only measured."""
        return self.capabilities.trains


@dataclass(frozen=True, kw_only=True)
class SharedWork:
    """What several rows read, each prepared once.

    Attributes:
        anchors: (row id, need) of the rows that read the teacher's states.
        trajectories: (row id, need) of the rows that train on commit orders.
        prefixes: (row id, need) of the rows that continue from another cell's first part.
        built_upon: cells that rows are built on without being rows: trained to the end, not measured.
    """

    anchors: tuple[tuple[str, AnchorNeed], ...]
    trajectories: tuple[tuple[str, TrajectoryNeed], ...]
    prefixes: tuple[tuple[str, PrefixNeed], ...]
    built_upon: tuple[PlannedRow, ...] = ()


def validate_options(cell: CellSpec) -> RoomOptions:
    """Return the room's options for a cell.

    Raises:
        DllmError: no such room.
        ParamsError: unknown option or value out of range, named as `cells.NAME.options.KEY`.
    """
    model = _naming(cell.name, lambda: room_options(cell.method))
    try:
        return model(**cell.options)
    except ValidationError as error:
        raise explain(error, model, prefix=f"cells.{cell.name}.options.") from None


def plan_rows(spec: GridSpec, num_layers: int) -> tuple[tuple[PlannedRow, ...], dict[str, PlannedRow]]:
    """Return the rows of the grid, and by name the donors: cells that a row continues from without being rows.

    Raises:
        DllmError, ParamsError: an unknown room, bad options, layers the model does not have, or a cell that
            continues from one that differs in what both share.
    """
    rows = tuple(_row(spec, cell, seed, num_layers) for cell in spec.cells for seed in spec.seeds)
    donors = {cell.name: _row(spec, cell, spec.seeds[0], num_layers) for cell in spec.donors}
    by_cell = {row.cell: row for row in reversed(rows)} | donors
    for row in by_cell.values():
        _check_prefix(spec, row, by_cell)
        _check_built_on(row, by_cell)
        _check_trajectories(spec, row)
    return rows, donors


def shared_work(rows: tuple[PlannedRow, ...], donors: Mapping[str, PlannedRow]) -> SharedWork:
    """Return what rows need that is prepared before they train."""
    hidden = built_upon(rows, donors)
    trained = (*rows, *hidden)
    return SharedWork(
        anchors=tuple((r.row_id, a) for r in trained if (a := r.requirements.anchors)),
        trajectories=tuple((r.row_id, t) for r in trained if (t := r.requirements.trajectories)),
        prefixes=tuple((r.row_id, p) for r in trained if (p := r.requirements.prefix)),
        built_upon=hidden,
    )


def built_upon(rows: Sequence[PlannedRow], donors: Mapping[str, PlannedRow]) -> tuple[PlannedRow, ...]:
    """Return the donors that rows are built on: trained to the end, though they are no rows."""
    names = dict.fromkeys(a.cell for row in rows if (a := row.requirements.anchors) and a.cell in donors)
    return tuple(donors[name] for name in names if name is not None)


def _row(spec: GridSpec, cell: CellSpec, seed: int, num_layers: int) -> PlannedRow:
    options = validate_options(cell)
    row = spec.row_spec(cell.name, seed)
    return PlannedRow(
        row_id=row.row_id,
        cell=cell.name,
        method=cell.method,
        seed=seed,
        options=options,
        train=row.train,
        capabilities=options.capabilities(),
        requirements=_naming(cell.name, lambda: options.requirements(num_layers)),
        cost_factor=options.cost_factor(),
    )


def _naming(cell: str, call: Callable[[], T]) -> T:
    """Run `call`; put the cell's name before the error of a user."""
    try:
        return call()
    except DllmError as error:
        raise type(error)(f"Cell '{cell}': {error.problem}", error.remedy) from None


def _check_prefix(spec: GridSpec, row: PlannedRow, by_cell: dict[str, PlannedRow]) -> None:
    need = row.requirements.prefix
    if need is None:
        return
    donor = by_cell.get(need.cell)
    if donor is None or not donor.trains or need.cell == row.cell:
        raise ParamsError(
            f"cells.{row.cell} continues from '{need.cell}', which is no trained cell of params/cells.",
            "Name a cell that trains on its own, e.g. repr_align_all.",
        )
    if donor.requirements.prefix is not None:
        raise ParamsError(
            f"cells.{row.cell} continues from '{need.cell}', which itself continues from another cell.",
            "Name a cell that trains on its own, e.g. repr_align_all.",
        )
    for section, ours, theirs in (
        ("options", row.options.model_dump(), donor.options.model_dump()),
        ("train", row.train.model_dump(), donor.train.model_dump()),
    ):
        for key, value in theirs.items():
            if ours.get(key, value) != value:
                raise ParamsError(
                    f"cells.{row.cell}.{section}.{key} = {ours[key]}, but cells.{need.cell}.{section}.{key} = {value}, "
                    "and the one continues from the other.",
                    f"Set both to the same value, or --set cells.{row.cell}.options.prefix_cell to another cell.",
                )


def _check_built_on(row: PlannedRow, by_cell: Mapping[str, PlannedRow]) -> None:
    """Refuse a row whose states are those of no cell that trains the model itself."""
    need = row.requirements.anchors
    if need is None or need.cell is None:
        return
    able = [name for name, other in by_cell.items() if other.trains and not other.capabilities.latent]
    if need.cell == row.cell:
        raise ParamsError(f"cells.{row.cell} is built on itself.", did_you_mean(need.cell, able))
    source = by_cell.get(need.cell)
    if source is None:
        raise ParamsError(
            f"cells.{row.cell} is built on '{need.cell}', which is no cell of this grid nor of params/cells.",
            did_you_mean(need.cell, able) if able else "Name a cell that trains the model, e.g. repr_align_all.",
        )
    chain = [row.cell, source.cell]
    while (further := by_cell[chain[-1]].requirements.anchors) is not None and further.cell in by_cell:
        chain.append(further.cell)
        if further.cell in chain[:-1]:
            raise ParamsError(
                f"cells.{row.cell} is built on cells that are built on each other: {' on '.join(chain)}.",
                "Build one of them on another cell.",
            )
    if not source.trains or source.capabilities.latent:
        what = "trains networks of its own and holds no" if source.trains else "is only measured: it trains no"
        raise ParamsError(
            f"cells.{row.cell} is built on '{need.cell}', which {what} language model.",
            "Name a cell that trains the model, e.g. repr_align_all.",
        )


def _check_trajectories(spec: GridSpec, row: PlannedRow) -> None:
    need = row.requirements.trajectories
    if need is None or spec.data.layout != "windows":
        return
    for name, value in (("commit_steps", need.commit_steps), ("extraction_block", need.block_size)):
        if value > spec.data.response_tokens:
            raise ParamsError(
                f"cells.{row.cell}.options.{name} = {value} is more than "
                f"data.response_tokens = {spec.data.response_tokens}.",
                f"Allowed: at most {spec.data.response_tokens}.",
            )
    limit = spec.data.train_sequences
    if limit is not None and need.responses > limit:
        raise ParamsError(
            f"cells.{row.cell}.options.responses = {need.responses} is more than data.train_sequences = {limit}.",
            f"Allowed: at most {limit}.",
        )
