"""Which sequences' states the rows of a grid read, of which model, grouped by what they read; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dllm_core.methods.requirements import AnchorNeed, StateClass
from steps.budgets import step_flops
from steps.machine import probe
from steps.plan_rows import built_upon, plan_rows
from steps.training_plan import Surroundings, TrainJob, plan_job

if TYPE_CHECKING:
    from params.schema import GridSpec
    from steps.context import Context
    from steps.prepare_data import DataArtifact
    from steps.prepare_model import ModelArtifact

ESTIMATE_MARGIN = 1.25
"""A budget in seconds is covered for a machine this much faster than the estimate."""


@dataclass(frozen=True, kw_only=True)
class WantedAnchors:
    """What rows of one need read.

    Attributes:
        layers: names of the layers.
        positions: class of the rows.
        heldout: all held-out sequences are read too.
        sample_ids: training sequences, ascending.
        cell: the trained cell whose states they are; None: the base model.
    """

    layers: tuple[str, ...]
    positions: StateClass
    heldout: bool
    sample_ids: tuple[int, ...]
    cell: str | None = None

    def serves(self, need: AnchorNeed) -> bool:
        """Return whether a need is this one, whatever its sequences."""
        return (self.layers, self.positions, self.heldout, self.cell) == _states_of(need)


def _states_of(need: AnchorNeed) -> tuple[tuple[str, ...], StateClass, bool, str | None]:
    return need.layers, need.positions, need.heldout, need.cell


def wanted_by(jobs: Sequence[TrainJob]) -> tuple[WantedAnchors, ...]:
    """Return one entry for each distinct need of the jobs, with the sequences of all jobs that have it."""
    found: dict[tuple[tuple[str, ...], StateClass, bool, str | None], set[int]] = {}
    for job in jobs:
        need = job.requirements.anchors
        if need is not None:
            found.setdefault(_states_of(need), set()).update(job.samples())
    return tuple(
        WantedAnchors(layers=layers, positions=positions, heldout=heldout, sample_ids=tuple(sorted(samples)), cell=cell)
        for (layers, positions, heldout, cell), samples in found.items()
    )


def wanted_anchors(spec: GridSpec, model: ModelArtifact, data: DataArtifact, ctx: Context) -> tuple[WantedAnchors, ...]:
    """Return what the rows of a grid read of the base model within their steps, for all seeds.

    A budget in seconds is turned into steps by measuring them, which needs anchors: here it is estimated, with a
    margin, and a row computes what is then still missing. What a row reads of a trained cell waits until that cell is
    trained (`steps.cell_states`); what that cell itself reads of the base model is covered here, be it a row or not.
    """
    around = Surroundings(spec=spec, model=model, data=data, anchors=None, ctx=ctx)
    rows, donors = plan_rows(spec, model.num_layers)
    machine = probe(spec.runtime.device, spec.runtime.threads)

    def estimate(job: TrainJob) -> float:
        return machine.seconds(step_flops(job), 1, machine.dtype(job.settings.dtype)) / ESTIMATE_MARGIN

    jobs = [
        plan_job(spec.row_spec(row.cell, seed), around, estimate)
        for row, seed in [
            *((row, row.seed) for row in rows),
            *((donor, seed) for donor in built_upon(rows, donors) for seed in spec.seeds),
        ]
        if row.requirements.anchors is not None and row.requirements.anchors.cell is None
    ]
    return wanted_by(jobs)
