"""Whether a grid can run here and what it will cost, answered before anything is computed; imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dllm_core.errors import DllmError, ResourceError
from params.errors import ParamsError
from params.schema import GridSpec
from steps.check_data import DataFacts, check_data
from steps.check_judge import check_judge
from steps.check_model import ModelFacts, check_model
from steps.costs import GridCost, grid_cost
from steps.estimates import GPU_SIZES_GB
from steps.machine import Machine, probe
from steps.plan_disk import disk_check, nearest
from steps.plan_rows import PlannedRow, SharedWork, plan_rows, shared_work
from steps.row_costs import own_network

__all__ = ["Plan", "PlannedRow", "SharedWork", "render", "validate"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid that passed every cheap check.

    Attributes:
        spec: the settings.
        rows: the lines of the table, in order.
        donors: cell name -> a cell that a row continues from without being a row itself.
        shared: anchors, trajectories and prefixes to prepare.
        model, data: what was found.
        machine: what the estimates hold for.
        cost: estimates.
        obstacles: what would stop the run here (a dry run reports them, a run raises the first).
        warning: what may stop it later, in one line; empty when nothing is known of.
    """

    spec: GridSpec
    rows: tuple[PlannedRow, ...]
    donors: Mapping[str, PlannedRow]
    shared: SharedWork
    model: ModelFacts
    data: DataFacts
    machine: Machine
    cost: GridCost
    obstacles: tuple[DllmError, ...] = ()
    warning: str = ""


def validate(
    spec: GridSpec, *, runs_dir: Path | str | None = None, dry_run: bool = False, machine: Machine | None = None
) -> Plan:
    """Check a grid and estimate its cost.

    Args:
        spec: the settings.
        runs_dir: where the run will write; not checked when None.
        dry_run: report missing memory, disk or devices in the plan instead of raising.
        machine: the machine to plan for; this one when None.

    Raises:
        DllmError, ParamsError: anything in the settings, the model or the data that a run would stumble over, or
            (not in a dry run) too little memory or disk, no GPU where one was asked for, an unwritable directory.
    """
    model = check_model(spec.model, dry_run=dry_run)
    check_judge(spec)
    _check_positions(spec, model)
    rows, donors = plan_rows(spec, model.shape.layers)
    _check_freeze(spec, rows, model)
    data = check_data(spec.data)
    machine = machine or probe(spec.runtime.device, spec.runtime.threads)
    shared = shared_work(rows, donors)
    cost = grid_cost(spec, rows, donors, shared, model.shape, data, machine)
    too_large, warning = disk_check(cost, runs_dir)
    found = (
        _device_obstacle(spec, machine),
        _writable_obstacle(runs_dir),
        _memory_obstacle(spec, cost, machine),
        too_large,
    )
    obstacles = tuple(o for o in found if o is not None)
    if obstacles and not dry_run:
        raise obstacles[0]
    return Plan(
        spec=spec,
        rows=rows,
        donors=donors,
        shared=shared,
        model=model,
        data=data,
        machine=machine,
        cost=cost,
        obstacles=obstacles,
        warning=warning,
    )


def render(plan: Plan) -> str:
    """Return the text of `--dry-run`: settings, contracts, rows and their needs, estimates."""
    from steps.plan_text import render as text

    return text(plan)


def _check_positions(spec: GridSpec, model: ModelFacts) -> None:
    limit = model.shape.positions
    for key, length in (
        ("data.prompt_tokens + data.response_tokens", spec.data.length),
        ("bench.prompt_tokens + bench.new_tokens", spec.bench.prompt_tokens + spec.bench.new_tokens),
    ):
        if length > limit:
            key = "data.sequence_length" if spec.data.layout == "pack" and key.startswith("data") else key
            raise ParamsError(
                f"{key} = {length} is more than the {limit} positions of {model.source}.", f"Allowed: at most {limit}."
            )


def _check_freeze(spec: GridSpec, rows: tuple[PlannedRow, ...], model: ModelFacts) -> None:
    for row in rows:
        if row.train.freeze and own_network(spec, row, model.shape) is not None:
            raise ParamsError(
                f"train.freeze = {list(row.train.freeze)}, but cell '{row.cell}' trains networks of its own "
                "that have no such parts.",
                f"Add --set cells.{row.cell}.train.freeze=[].",
            )


def _device_obstacle(spec: GridSpec, machine: Machine) -> DllmError | None:
    if spec.runtime.device == "cuda" and not (machine.device == "cuda" and machine.visible):
        return ResourceError(
            "runtime.device = cuda, but no NVIDIA GPU is visible here.",
            "Run on a machine with one, or --set runtime.device=cpu.",
        )
    return None


def _writable_obstacle(runs_dir: Path | str | None) -> DllmError | None:
    """Try to write beside where the runs directory is or will be; nothing stays behind."""
    if runs_dir is None:
        return None
    if "?" in str(Path(runs_dir).absolute()):  # the tracking database would be made beside it, under half its name
        return DllmError(
            f"The runs directory '{runs_dir}' has a '?' in its path, where the address of an SQLite file ends.",
            "Choose another place with --runs-dir DIR (or the variable DLLM_RUNS).",
        )
    try:
        with tempfile.TemporaryFile(dir=nearest(Path(runs_dir))):
            return None
    except OSError as error:
        return DllmError(
            f"The runs directory '{runs_dir}' cannot be written ({error.strerror or error}).",
            "Make it writable, or set DLLM_RUNS to another directory.",
        )


def _memory_obstacle(spec: GridSpec, cost: GridCost, machine: Machine) -> DllmError | None:
    need, limit = cost.memory.total, spec.runtime.memory_limit_gb
    have = min(machine.memory_free, limit * 1e9 if limit is not None else float("inf"))
    if need <= have:
        return None
    kind = "GPU memory" if machine.device == "cuda" else "memory"
    size = cost.memory.smallest_gpu_gb()
    gpu = f"a GPU of {size} GB would fit" if size else f"no single GPU up to {GPU_SIZES_GB[-1]} GB would fit"
    state = "allowed by runtime.memory_limit_gb" if have < machine.memory_free else "free"
    return ResourceError(
        f"Training {cost.memory_row} needs about {need / 1e9:.1f} GB of {kind} (estimate), "
        f"{have / 1e9:.1f} GB are {state}.",
        f"Try --set train.micro_batch_size=1,train.activation_checkpointing=true or a smaller model; {gpu}.",
    )
