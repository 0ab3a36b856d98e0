"""How many steps a row's budget gives, worked out without torch before training starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dllm_core.backbone.sources import read_config
from dllm_core.training.budget import StepCost, branch_steps, steps_from_budget, steps_from_flops
from steps.estimates import ModelShape

if TYPE_CHECKING:
    from steps.training_plan import TrainJob

SecondsPerStep = Callable[["TrainJob"], float]


def own_steps(job: TrainJob, seconds_per_step: SecondsPerStep) -> int:
    """Return the steps of a row that starts at the base model.

    Raises:
        DllmError: a budget that cannot be turned into steps.
    """
    spec, data = job.around.spec, job.around.data
    if spec.budget is None:
        assert spec.train.steps is not None
        return spec.train.steps
    kind, value = spec.budget.kind, spec.budget.value
    if kind == "flops":
        return steps_from_flops(value, lambda steps: charged_flops(job, steps))
    cost = _cost(job, seconds_per_step(job) if kind == "seconds" else None)
    return steps_from_budget(kind, value, cost, num_sequences=data.num_train)


def branch_total(job: TrainJob, donor: TrainJob, share: float, branch_at: int, seconds_per_step: SecondsPerStep) -> int:
    """Return the total steps of a row that branches off: equal to the donor's where a step costs both the same.

    Args:
        job: the branch; `branch_at` is set, its number of steps does not matter.
        donor: whose first `branch_at` steps it continues from.
        share: part of the budget that those steps stand for.
        branch_at: finished steps of that part.
        seconds_per_step: as for `own_steps`.
    """
    budget = job.around.spec.budget
    if budget is None or budget.kind in ("tokens", "epochs"):
        return own_steps(job, seconds_per_step)
    # the factor of a branching room is that of the whole run; what it leaves beyond the prefix is its own part
    own = (job.options.cost_factor() - share * donor.options.cost_factor()) / (1.0 - share)
    if budget.kind == "seconds":
        cost = _cost(job, own / donor.options.cost_factor() * seconds_per_step(donor))
        return branch_steps(branch_at, share, budget.kind, budget.value, cost)
    before = charged_flops(donor, branch_at)
    per_step, teacher = own * unit_flops(job), teacher_flops(job)
    known = job.num_distinct(branch_at)

    def charged(steps: int) -> float:
        return steps * per_step + teacher * (job.num_distinct(branch_at + steps) - known)

    return branch_at + steps_from_flops(max(budget.value - before, per_step), charged)


def charged_flops(job: TrainJob, steps: int) -> float:
    """Return what so many steps from the base model are charged: training, and the teacher once for each sequence."""
    return steps * step_flops(job) + teacher_flops(job) * job.num_distinct(steps)


def step_flops(job: TrainJob) -> float:
    """Return training FLOPs of one step: of the room's own networks, or of the base model times the room's factor."""
    data = job.around.data
    positions = data.length / data.mean_response_tokens
    base = _shape(job).base(converted=True, positions_per_response_token=positions, length=data.length)
    network = job.options.network(base)
    if network is not None:
        return network.flops_per_response_token * job.settings.batch_size * data.mean_response_tokens
    return job.options.cost_factor() * unit_flops(job)


def teacher_flops(job: TrainJob) -> float:
    """Return the teacher's FLOPs for one sequence whose anchors are read; 0 for a row that reads none."""
    return _shape(job).teacher_flops(job.around.data.length) if job.requirements.anchors is not None else 0.0


def unit_flops(job: TrainJob) -> float:
    """Return FLOPs of one masked-CE step over the batch; half of the response rows reach the head of a denoiser."""
    data = job.around.data
    size = job.settings.batch_size
    scored = size * data.mean_response_tokens * (1.0 if job.options.capabilities().causal else 0.5)
    return 3.0 * _shape(job).forward_flops(size * data.length, data.length, scored)


def _shape(job: TrainJob) -> ModelShape:
    return ModelShape.from_config(read_config(Path(job.around.model.path)))


def _cost(job: TrainJob, seconds: float | None) -> StepCost:
    size = job.settings.batch_size
    return StepCost(sequences=size, response_tokens=size * job.around.data.mean_response_tokens, seconds=seconds)
