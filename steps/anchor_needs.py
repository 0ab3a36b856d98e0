"""Which sequences' teacher states the rows of a grid read, grouped by what they read of them; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dllm_core.methods.requirements import AnchorNeed, StateClass
from steps.budgets import step_flops
from steps.machine import probe
from steps.plan_rows import plan_rows
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
    """

    layers: tuple[str, ...]
    positions: StateClass
    heldout: bool
    sample_ids: tuple[int, ...]

    def serves(self, need: AnchorNeed) -> bool:
        """Return whether a need is this one, whatever its sequences."""
        return (self.layers, self.positions, self.heldout) == (need.layers, need.positions, need.heldout)


def wanted_by(jobs: Sequence[TrainJob]) -> tuple[WantedAnchors, ...]:
    """Return one entry for each distinct need of the jobs, with the sequences of all jobs that have it."""
    found: dict[tuple[tuple[str, ...], StateClass, bool], set[int]] = {}
    for job in jobs:
        need = job.requirements.anchors
        if need is not None:
            found.setdefault((need.layers, need.positions, need.heldout), set()).update(job.samples())
    return tuple(
        WantedAnchors(layers=layers, positions=positions, heldout=heldout, sample_ids=tuple(sorted(samples)))
        for (layers, positions, heldout), samples in found.items()
    )


def wanted_anchors(spec: GridSpec, model: ModelArtifact, data: DataArtifact, ctx: Context) -> tuple[WantedAnchors, ...]:
    """Return what the rows of a grid read within their steps, for all seeds.

    A budget in seconds is turned into steps by measuring them, which needs anchors: here it is estimated, with a
    margin, and a row computes what is then still missing.
    """
    around = Surroundings(spec=spec, model=model, data=data, anchors=None, ctx=ctx)
    rows, _ = plan_rows(spec, model.num_layers)
    machine = probe(spec.runtime.device, spec.runtime.threads)

    def estimate(job: TrainJob) -> float:
        return machine.seconds(step_flops(job), 1, machine.dtype(job.settings.dtype)) / ESTIMATE_MARGIN

    readers = [row for row in rows if row.requirements.anchors is not None]
    return wanted_by([plan_job(spec.row_spec(row.cell, row.seed), around, estimate) for row in readers])
