"""A grid: its cells, its rows and all sections of its settings. Reading it imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from params.base import Seed, Settings
from params.errors import ParamsError, did_you_mean
from params.explain import explain
from params.sections import (
    AnchorSpec,
    BenchSpec,
    BudgetSpec,
    DataSpec,
    EvalSpec,
    ModelSpec,
    RuntimeSpec,
    ScratchSpec,
    TrainSpec,
)
from params.sweeps import ParallelismSpec, StepSweepSpec

__all__ = [
    "AnchorSpec",
    "BenchSpec",
    "BudgetSpec",
    "CellSpec",
    "DataSpec",
    "EvalSpec",
    "GridSpec",
    "ModelSpec",
    "ParallelismSpec",
    "RowSpec",
    "RuntimeSpec",
    "ScratchSpec",
    "Settings",
    "StepSweepSpec",
    "TrainSpec",
]


class CellSpec(Settings):
    """One way to make a diffusion model, or a reference row: a method with its options."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name of the row."""
    method: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Room in dllm_core.methods."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The room's options as written; the room validates them."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Overrides of `train:` for this cell, e.g. its own learning rate. Not `steps`: a grid has one budget."""
    description: str = ""
    """One sentence."""

    @field_validator("train")
    @classmethod
    def _known_overrides(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        below = f"cells.{info.data.get('name', '?')}.train."
        allowed = set(TrainSpec.model_fields) - {"steps"}
        for key in value:
            if key == "steps":
                raise ParamsError(
                    f"{below}steps cannot be set.", "A grid has one budget for all rows: set train.steps."
                )
            if key not in allowed:
                raise ParamsError(f"Unknown key '{below}{key}'.", did_you_mean(key, allowed))
        return value


class RowSpec(Settings):
    """One line of the table: a cell trained with one seed."""

    row_id: str
    """`CELL`, or `CELL-seedN` in a grid of several seeds."""
    cell: CellSpec
    """The cell."""
    seed: Seed
    """Keys data order, corruption and initialisation."""
    train: TrainSpec
    """The grid's training settings with the cell's own overrides."""


class GridSpec(Settings):
    """Everything a run is made of."""

    preset: str
    """Name of the preset it started from."""
    description: str = ""
    """One sentence."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Every cell is trained once a seed; three or more are needed to rank quality."""
    cells: Annotated[tuple[CellSpec, ...], Field(min_length=1)]
    """The rows of the table, in this order."""
    donors: tuple[CellSpec, ...] = ()
    """Cells that are no rows, but whose first part a row continues from."""
    model: ModelSpec = Field(default_factory=ModelSpec)
    """The autoregressive model."""
    data: DataSpec = Field(default_factory=DataSpec)
    """The text."""
    budget: BudgetSpec | None = None
    """One budget for all rows; excludes `train.steps`."""
    train: TrainSpec = Field(default_factory=TrainSpec)
    """Optimisation."""
    anchors: AnchorSpec = Field(default_factory=AnchorSpec)
    """Teacher cache."""
    eval: EvalSpec = Field(default_factory=EvalSpec)
    """Quality."""
    bench: BenchSpec = Field(default_factory=BenchSpec)
    """Speed."""
    runtime: RuntimeSpec = Field(default_factory=RuntimeSpec)
    """Machine."""

    @model_validator(mode="after")
    def _relations(self) -> GridSpec:
        if (self.budget is None) == (self.train.steps is None):
            state = "neither is set" if self.budget is None else "both are set"
            raise ParamsError(
                f"budget and train.steps exclude each other, but {state}.",
                "Set budget: {kind: tokens|flops|seconds|epochs, value: ...} or train.steps, one of the two.",
            )
        _unique("seeds", [str(s) for s in self.seeds])
        _unique("cells", [c.name for c in (*self.cells, *self.donors)])
        if self.data.layout == "windows" and self.eval.block_size > self.data.response_tokens:
            raise ParamsError(
                f"eval.block_size = {self.eval.block_size} is larger than "
                f"data.response_tokens = {self.data.response_tokens}.",
                f"Allowed: 1 to {self.data.response_tokens}.",
            )
        if self.bench.prompt_tokens > self.data.length:
            raise ParamsError(
                f"bench.prompt_tokens = {self.bench.prompt_tokens} is more than the {self.data.length} tokens "
                "of a held-out sequence, from which prompts are cut.",
                f"Allowed: at most {self.data.length}.",
            )
        for name in ("nelbo_sequences", "mask_ratio_sequences"):
            if getattr(self.eval, name) > self.data.heldout_sequences:
                raise ParamsError(
                    f"eval.{name} = {getattr(self.eval, name)} is more than "
                    f"data.heldout_sequences = {self.data.heldout_sequences}.",
                    f"Allowed: at most {self.data.heldout_sequences}; or raise data.heldout_sequences.",
                )
        for cell in self.cells:
            self._train_for(cell)
        return self

    def cell(self, name: str) -> CellSpec:
        """Return a cell by name, row or donor.

        Raises:
            ParamsError: no such cell in this grid.
        """
        for cell in (*self.cells, *self.donors):
            if cell.name == name:
                return cell
        raise ParamsError(f"Cell '{name}' is not in this grid.", did_you_mean(name, [c.name for c in self.cells]))

    def _train_for(self, cell: CellSpec) -> TrainSpec:
        try:
            return TrainSpec(**{**self.train.model_dump(), **cell.train})
        except ValidationError as error:
            raise explain(error, TrainSpec, prefix=f"cells.{cell.name}.train.") from None

    def row_id(self, cell_name: str, seed: int) -> str:
        """Return the row's name: the cell's alone in a grid of one seed."""
        return cell_name if len(self.seeds) == 1 else f"{cell_name}-seed{seed}"

    def row_spec(self, cell_name: str, seed: int) -> RowSpec:
        """Return one row with its own training settings (also of a donor).

        Raises:
            ParamsError: no such cell in this grid.
        """
        cell = self.cell(cell_name)
        return RowSpec(row_id=self.row_id(cell_name, seed), cell=cell, seed=seed, train=self._train_for(cell))

    def rows(self) -> tuple[RowSpec, ...]:
        """Return all rows, cell by cell, seed by seed."""
        return tuple(self.row_spec(cell.name, seed) for cell in self.cells for seed in self.seeds)


def _unique(key: str, names: list[str]) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ParamsError(f"{key} names {', '.join(twice)} more than once.", "Allowed: each at most once.")
