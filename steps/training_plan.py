"""What training a row reads and how many steps its budget gives, worked out without torch: the keys of cached steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_core.data.order import SampleOrder
from dllm_core.errors import DllmError
from dllm_core.methods.requirements import Requirements, RoomOptions, TrajectoryNeed
from dllm_core.training.schedule import share_of_steps
from dllm_core.training.settings import TrainSettings
from steps.budgets import SecondsPerStep, branch_total, own_steps
from steps.cache.key import key_of, material
from steps.machine import probe
from steps.row_options import options_of

if TYPE_CHECKING:
    from params.schema import GridSpec, RowSpec
    from steps.cache_anchors import AnchorArtifact
    from steps.context import Context
    from steps.prepare_data import DataArtifact
    from steps.prepare_model import ModelArtifact

LIBRARIES = ("torch", "transformers", "safetensors")
CELL = "cell"
"""Directory of the cell in the cached result of its training."""
_NO_STEPS_YET = 1


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What all rows of a grid train on."""

    spec: GridSpec
    model: ModelArtifact
    data: DataArtifact
    anchors: AnchorArtifact | None
    ctx: Context

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return probe(self.spec.runtime.device, self.spec.runtime.threads).device

    def dtype(self, wanted: str) -> str:
        """Resolve `auto`."""
        return probe(self.spec.runtime.device, self.spec.runtime.threads).dtype(wanted)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One row's training, or its first part.

    Attributes:
        row_id, cell, room, seed: what it is.
        options: the room's validated options.
        settings: for the trainer.
        around: model, data, stores and context.
        branch: the job whose first `branch_at` steps this one continues from; None starts at the base model.
        branch_at: finished steps of that part.
        source: the job of the cell that this one is built on, whose states it reads; None: the base model.
        source_dir: where that cell lies, once it has been looked up.
    """

    row_id: str
    cell: str
    room: str
    seed: int
    options: RoomOptions
    settings: TrainSettings
    around: Surroundings
    branch: TrainJob | None = None
    branch_at: int = 0
    source: TrainJob | None = None
    source_dir: Path | None = None

    @property
    def requirements(self) -> Requirements:
        """What the room reads."""
        return self.options.requirements(self.around.model.num_layers)

    @property
    def order(self) -> SampleOrder:
        """The grid's common order under this row's seed."""
        return SampleOrder(self.around.data.num_train, self.seed)

    @property
    def trajectories(self) -> TrajectoryNeed | None:
        """The commit orders it trains on."""
        return self.requirements.trajectories

    def base_dir(self) -> Path:
        """Return where the model it starts from lies: the base model, or the cell it is built on, trained by now.

        Raises:
            DllmError: that cell could not be trained.
        """
        if self.source is None:
            return Path(self.around.model.path)
        if self.source_dir is not None:
            return self.source_dir
        from steps.cell_states import finished_source

        return finished_source(self).path / CELL

    def samples(self) -> tuple[int, ...]:
        """Return the training sequences it may present, ascending."""
        if self.trajectories is not None:  # it loops over a subset, which may reach further than its steps do
            return tuple(self.order.presented(self._before_branch + self.trajectories.responses))
        return tuple(self.order.presented(self._in_order(self.settings.steps)))

    def num_distinct(self, steps: int) -> int:
        """Return how many distinct training sequences its first `steps` steps present."""
        count = self._in_order(steps)
        if self.trajectories is not None:
            count = min(count, self._before_branch + self.trajectories.responses)
        return min(count, self.around.data.num_train)

    @property
    def _before_branch(self) -> int:
        return self.branch_at * self.settings.batch_size

    def _in_order(self, steps: int) -> int:
        """Return up to which place of the common order so many steps read, in its first round."""
        anchors = self.requirements.anchors
        most = anchors.sequences if anchors is not None else None
        count = steps * self.settings.batch_size
        return count if most is None else min(count, most)

    def _fields(self) -> dict[str, Any]:
        return {
            "cell": self.cell,
            "method": self.room,
            "options": self.options.model_dump(mode="json"),
            "train": self.settings.influential(),
            "device": self.around.device,
        }

    def _inputs(self) -> dict[str, str]:
        inputs = {"model": self.around.model.identity, "data": self.around.data.train_fingerprint}
        if self.source is not None:
            from steps.cell_states import teacher_of

            inputs["teacher"] = f"{teacher_of(self)}/{self.around.spec.anchors.dtype}"
        elif self.requirements.anchors is not None:
            anchors = self.around.anchors
            if anchors is None:
                raise DllmError(f"Row '{self.row_id}' reads anchors, and there are none.", "Run cache_anchors first.")
            inputs["teacher"] = f"{anchors.teacher}/{anchors.dtype}"
        return inputs

    def _request(self, kind: str, fields: dict[str, Any], inputs: dict[str, str], *roots: str) -> Request:
        everywhere = ("dllm_core.training", f"dllm_core.methods.{self.room}")
        return Request(
            kind=kind, fields=fields, inputs=inputs, roots=(*roots, *everywhere), libraries=LIBRARIES, label=self.row_id
        )

    def cell_request(self) -> Request:
        """Return what the finished cell depends on. A prefix of its own changes nothing and is not part of it."""
        inputs = self._inputs()
        if self.branch is not None:
            inputs["prefix"] = self.branch.prefix_request(self.branch_at).key()
        if self.trajectories is not None:
            inputs["trajectories"] = self.trajectory_request().key()
        fields = {**self._fields(), "sample_every_steps": self.settings.sample_every_steps}
        return self._request("train_cell", fields, inputs, "steps.train_run", "dllm_core.methods.cell")

    def prefix_request(self, stop_at: int) -> Request:
        """Return what its first `stop_at` steps depend on."""
        return self._request("train_prefix", {**self._fields(), "stop_at": stop_at}, self._inputs(), "steps.train_run")

    def trajectory_request(self) -> Request:
        """Return what its commit orders depend on: who decodes, which responses, how."""
        need, around = self.trajectories, self.around
        assert need is not None
        inputs = {"data": around.data.train_fingerprint, "tokenizer": around.model.tokenizer}
        if need.mode == "student":
            assert self.branch is not None, "a student's order needs the student"
            inputs["student"] = self.branch.prefix_request(self.branch_at).key()
        elif need.mode == "ar_difficulty":
            inputs["model"] = around.model.identity
        fields = {
            **asdict(need),
            "seed": self.seed,
            "first_index": self.branch_at * self.settings.batch_size,
            "dtype": self.settings.dtype,
            "device": around.device,
        }
        return self._request("trajectories", fields, inputs, "steps.trajectory_run")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `StepCache.get_or_build` that say what is wanted."""

    kind: str
    fields: dict[str, Any]
    inputs: dict[str, str]
    roots: tuple[str, ...]
    libraries: tuple[str, ...]
    label: str

    def key(self) -> str:
        """Return the cache key without looking for the entry."""
        return key_of(material(self.kind, self.fields, self.inputs, self.roots, self.libraries))

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for `get_or_build`, all but `build`."""
        names = ("kind", "fields", "inputs", "roots", "libraries", "label")
        return {name: getattr(self, name) for name in names}


def plan_job(row: RowSpec, around: Surroundings, seconds_per_step: SecondsPerStep) -> TrainJob:
    """Work out how a row is trained.

    Args:
        row: which row.
        around: what it trains on.
        seconds_per_step: measures a step of a job (only asked under a budget in seconds; cached by the caller).

    Raises:
        DllmError: a budget that cannot be turned into steps.
    """
    options = options_of(row)
    needs = options.requirements(around.model.num_layers)
    prefix = needs.prefix
    if prefix is None:
        source = _source(row, needs, around, seconds_per_step)
        job = _job(row, options, around, _NO_STEPS_YET, source=source)
        return _job(row, options, around, own_steps(job, seconds_per_step), source=source)
    assert needs.anchors is None or needs.anchors.cell is None, "a branch starts from its prefix, not from a cell"
    donor = plan_job(around.spec.row_spec(prefix.cell, row.seed), around, seconds_per_step)
    branch_at = share_of_steps(prefix.share, donor.settings.steps)
    if not 0 < branch_at < donor.settings.steps:
        raise DllmError(
            f"Row '{row.row_id}' branches after {prefix.share:g} of {donor.settings.steps} steps, which is no step "
            "between the first and the last.",
            "Raise the budget.",
        )
    job = _job(row, options, around, _NO_STEPS_YET, branch=donor, branch_at=branch_at)
    steps = branch_total(job, donor, prefix.share, branch_at, seconds_per_step)
    by_share = share_of_steps(prefix.share, steps) == branch_at
    starts = None if by_share else (0, branch_at)
    return _job(row, options, around, steps, branch=donor, branch_at=branch_at, phase_starts=starts)


def _source(
    row: RowSpec, needs: Requirements, around: Surroundings, seconds_per_step: SecondsPerStep
) -> TrainJob | None:
    """Return the job of the cell that a row is built on, with the row's seed; what it tells is not told of the row."""
    if needs.anchors is None or needs.anchors.cell is None:
        return None
    quiet = replace(around, ctx=replace(around.ctx, listeners=[]))
    return plan_job(around.spec.row_spec(needs.anchors.cell, row.seed), quiet, seconds_per_step)


def prefix_wanted(job: TrainJob, seconds_per_step: SecondsPerStep) -> int | None:
    """Return after how many steps another row of the grid branches off this one, or None."""
    if job.branch is not None:
        return None
    spec, layers = job.around.spec, job.around.model.num_layers
    for row in spec.rows():
        need = options_of(row).requirements(layers).prefix
        if need is not None and need.cell == job.cell and row.seed == job.seed:
            return plan_job(row, job.around, seconds_per_step).branch_at
    return None


def _job(row: RowSpec, options: RoomOptions, around: Surroundings, steps: int, **origin: Any) -> TrainJob:
    starts = origin.pop("phase_starts", None)
    settings = TrainSettings.from_spec(
        row.train.model_dump(),
        steps=steps,
        seed=row.seed,
        dtype=around.dtype(row.train.dtype),
        phase_starts=starts,
    )
    return TrainJob(
        row_id=row.row_id,
        cell=row.cell.name,
        room=row.cell.method,
        seed=row.seed,
        options=options,
        settings=settings,
        around=around,
        **origin,
    )


def covering_anchors(job: TrainJob) -> AnchorArtifact | None:
    """Return anchors that hold all the job reads, computing what a budget's estimate left out."""
    from steps.anchor_needs import wanted_by
    from steps.cache_anchors import cover_anchors

    around, need = job.around, job.requirements.anchors
    if job.source is not None:
        from steps.cell_states import cell_anchors

        return cell_anchors(job)
    if need is None or around.anchors is None:
        return None
    (wanted,) = wanted_by([job])
    known = around.anchors.find(need)
    there = set(known.sample_ids) if known is not None else set()
    if there.issuperset(wanted.sample_ids):
        return around.anchors
    wanted = replace(wanted, sample_ids=tuple(sorted(there.union(wanted.sample_ids))))
    return cover_anchors(around.spec, [wanted], around.model, around.data, around.ctx)
