"""What training and measuring one row costs: steps from the budget, seconds from a machine's rates, bytes counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from dllm_core.methods.requirements import BaseShape, NetworkCost
from dllm_core.training.budget import steps_from_flops
from params.schema import GridSpec, ParallelismSpec, StepSweepSpec
from steps.benchmark_rounds import decodes_by_group
from steps.estimates import (
    DTYPE_BYTES,
    MemoryEstimate,
    ModelShape,
    RowCost,
    ar_seconds,
    decode_seconds,
    laid_out_bytes,
    network_memory,
    training_memory,
)
from steps.machine import Machine
from steps.plan_rows import PlannedRow


def response_tokens(spec: GridSpec) -> int:
    """Return response tokens of a sequence; a packed one is taken to hold nothing else."""
    return spec.data.response_tokens if spec.data.layout == "windows" else spec.data.length


def own_network(spec: GridSpec, row: PlannedRow, shape: ModelShape) -> NetworkCost | None:
    """Return sizes of a row's own networks; None where the base model itself is trained."""
    return row.options.network(base_shape(spec, shape))


def base_shape(spec: GridSpec, shape: ModelShape) -> BaseShape:
    """Return what rooms size networks of their own by."""
    length = spec.data.length
    return shape.base(converted=False, positions_per_response_token=length / response_tokens(spec), length=length)


def step_flops(spec: GridSpec, row: PlannedRow, shape: ModelShape) -> float:
    """FLOPs of one optimiser step: a backward pass costs two forwards; half of the response rows reach the head."""
    size = row.train.batch_size
    network = own_network(spec, row, shape)
    if network is not None:
        return network.flops_per_response_token * size * response_tokens(spec)
    head_rows = size * response_tokens(spec) * (1.0 if row.capabilities.causal else 0.5)
    return 3.0 * shape.forward_flops(size * spec.data.length, spec.data.length, head_rows) * row.cost_factor


def distinct_sequences(row: PlannedRow, steps: int, sequences: int | None) -> int:
    """Return how many distinct training sequences a row presents within its steps.

    Args:
        row: which row.
        steps: its optimiser steps.
        sequences: size of the training set; None when unknown, then none comes twice.
    """
    needs = row.requirements
    count = steps * row.train.batch_size
    if needs.trajectories is not None and needs.prefix is not None:  # it loops over a subset after the branch
        before = round(needs.prefix.share * steps) * row.train.batch_size
        count = min(count, before + needs.trajectories.responses)
    most = needs.anchors.sequences if needs.anchors is not None else None
    return min(n for n in (count, most, sequences) if n is not None)


def teacher_flops(spec: GridSpec, row: PlannedRow, shape: ModelShape, distinct: int) -> float:
    """Return what a row is charged for the anchors of so many sequences."""
    return distinct * shape.teacher_flops(spec.data.length) if row.requirements.anchors is not None else 0.0


def planned_steps(spec: GridSpec, row: PlannedRow, shape: ModelShape, sequences: int | None, machine: Machine) -> int:
    """Convert the budget into optimiser steps; those of `seconds` and `flops` are estimates until the run."""
    if not row.trains:
        return 0
    if spec.budget is None:
        return row.train.steps or 0
    kind, value = spec.budget.kind, spec.budget.value
    flops = step_flops(spec, row, shape)
    if kind == "flops":

        def charged(steps: int) -> float:
            return steps * flops + teacher_flops(spec, row, shape, distinct_sequences(row, steps, sequences))

        return steps_from_flops(value, charged)
    if kind == "tokens":
        steps = value / (row.train.batch_size * response_tokens(spec))
    elif kind == "seconds":
        steps = value / machine.seconds(flops, 1, machine.dtype(row.train.dtype))
    else:
        steps = value * (sequences or 0) / row.train.batch_size
    return max(1, math.ceil(steps - 1e-9))


def row_cost(
    spec: GridSpec,
    row: PlannedRow,
    factors: Mapping[str, float],
    shape: ModelShape,
    sequences: int | None,
    machine: Machine,
) -> RowCost:
    """Estimate one row; `factors` are the cost factors of all cells by name."""
    steps = planned_steps(spec, row, shape, sequences, machine)
    distinct = distinct_sequences(row, steps, sequences)
    flops = steps * step_flops(spec, row, shape)
    seconds = machine.seconds(flops, steps, machine.dtype(row.train.dtype)) if steps else 0.0
    prefix = row.requirements.prefix
    if prefix is not None:  # trained once, by the cell it comes from or as shared work
        first = prefix.share * factors[prefix.cell]
        seconds *= max(0.0, row.cost_factor - first) / row.cost_factor
    return RowCost(
        steps=steps,
        distinct=distinct,
        train_flops=flops,
        teacher_flops=teacher_flops(spec, row, shape, distinct),
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
        total += forwards(settings.nelbo_sequences, response_tokens(spec))
    if row.capabilities.nelbo:
        total += 2 * forwards(settings.nelbo_sequences * settings.nelbo_samples, response_tokens(spec) / 2)
        total += forwards(settings.mask_ratio_sequences * len(settings.mask_ratios), response_tokens(spec) / 2)
    samples = settings.frontier_samples * len(settings.frontier_temperatures)
    new = response_tokens(spec)
    total += _texts_seconds(spec, row, shape, machine, samples=samples, steps=settings.frontier_steps)
    total += forwards(samples, new)  # the judge reads them all
    if settings.step_sweep is not None:
        total += _step_sweep_seconds(spec, row, shape, machine, settings.step_sweep)
        judged = settings.step_sweep.samples * len(settings.step_sweep.temperatures)
        total += forwards(judged * (1 if row.capabilities.causal else len(settings.step_sweep.steps)), new)
    if settings.parallelism is not None and row.capabilities.infill:
        total += _parallelism_seconds(spec, shape, machine, settings.parallelism)
    return total


def _texts_seconds(
    spec: GridSpec, row: PlannedRow, shape: ModelShape, machine: Machine, *, samples: int, steps: int
) -> float:
    """Time of writing so many whole responses, in so many denoising steps where a row knows steps."""
    size, new, dtype = spec.eval.batch_size, response_tokens(spec), machine.dtype(spec.eval.dtype)
    network = own_network(spec, row, shape)
    if network is not None:
        return _latent_seconds(network, machine, tokens=samples * new, steps=steps, dtype=dtype)
    if row.capabilities.unmasking:
        return _fill_seconds(spec, shape, machine, texts=samples, gap=new, passes=steps, batch=size)
    if row.capabilities.causal:
        return math.ceil(samples / size) * ar_seconds(shape, machine, new=new, batch=size, dtype=dtype)
    return 0.0


def _fill_seconds(
    spec: GridSpec, shape: ModelShape, machine: Machine, *, texts: int, gap: int, passes: int, batch: int
) -> float:
    """Time of filling `gap` tokens of each text in so many passes over the whole of it."""
    dtype = machine.dtype(spec.eval.dtype)
    once = decode_seconds(shape, machine, length=spec.data.length, new=gap, steps=passes, batch=batch, dtype=dtype)
    return math.ceil(texts / batch) * once


def _step_sweep_seconds(
    spec: GridSpec, row: PlannedRow, shape: ModelShape, machine: Machine, sweep: StepSweepSpec
) -> float:
    """Time of the continuations and gaps at every number of steps; a row that writes token by token does them once."""
    samples, new = sweep.samples * len(sweep.temperatures), response_tokens(spec)
    gap = min(sweep.infill_tokens, new // 2)
    if row.capabilities.causal:
        size, dtype = spec.eval.batch_size, machine.dtype(spec.eval.dtype)
        gaps = math.ceil(sweep.infill_sequences / size) * ar_seconds(shape, machine, new=gap, batch=size, dtype=dtype)
        return _texts_seconds(spec, row, shape, machine, samples=samples, steps=new) + gaps
    total = 0.0
    for steps in {min(s, new) for s in sweep.steps}:
        total += _texts_seconds(spec, row, shape, machine, samples=samples, steps=steps)
        if row.capabilities.infill:
            passes, texts = math.ceil(steps * gap / new), sweep.infill_sequences
            batch = min(texts, spec.eval.batch_size)
            total += _fill_seconds(spec, shape, machine, texts=texts, gap=gap, passes=passes, batch=batch)
    return total


def _parallelism_seconds(spec: GridSpec, shape: ModelShape, machine: Machine, sweep: ParallelismSpec) -> float:
    """Time of the curves at most: a rule that goes by scores takes a pass for every token of a row that is never sure.

    How sure a row will be is not known beforehand.
    """
    new, total = response_tokens(spec), 0.0
    batch = min(sweep.sequences, spec.eval.batch_size)
    by_scores = len(sweep.thresholds) + len(sweep.factors)
    by_scores += len(sweep.entropy_thresholds) * len(sweep.block_add_thresholds)
    for gap in (max(1, round(sweep.mask_ratio * new)), min(sweep.infill_tokens, new // 2)):
        passes = by_scores * gap + sum(math.ceil(gap / tokens) for tokens in sweep.tokens_per_forward)
        total += _fill_seconds(spec, shape, machine, texts=sweep.sequences, gap=gap, passes=passes, batch=batch)
    return total


def _benchmark_seconds(spec: GridSpec, row: PlannedRow, shape: ModelShape, machine: Machine) -> float:
    """Time of all decodes of a row; of several seeds of a cell only the first is timed."""
    bench = spec.bench
    dtype = machine.dtype(row.train.dtype)
    network = own_network(spec, row, shape)

    def seconds(steps: int | None, batch: int) -> float:
        if steps is None:
            return ar_seconds(shape, machine, new=bench.new_tokens, batch=batch, dtype=dtype)
        if network is not None:
            return _latent_seconds(network, machine, tokens=batch * bench.new_tokens, steps=steps, dtype=dtype)
        length = bench.prompt_tokens + bench.new_tokens
        return decode_seconds(
            shape, machine, length=length, new=bench.new_tokens, steps=steps, batch=batch, dtype=dtype
        )

    if row.seed != spec.seeds[0]:
        return 0.0
    decodes = decodes_by_group(bench, causal=row.capabilities.causal)
    return sum(count * seconds(steps, batch) for (steps, batch), count in decodes.items())


def _latent_seconds(network: NetworkCost, machine: Machine, *, tokens: float, steps: int, dtype: str) -> float:
    """Time of decoding through a room's own networks in so many denoising steps of all tokens.

    A room that does not say what a step costs is charged a forward of all that it trains: an upper bound.
    """
    per_token = network.flops_per_denoised_token
    if per_token is None:
        per_token = network.flops_per_response_token / 3.0
    return machine.seconds(steps * tokens * per_token, steps, dtype)


def row_memory(spec: GridSpec, row: PlannedRow, shape: ModelShape, machine: Machine) -> MemoryEstimate:
    """Estimate the bytes at the peak of training a row, or of measuring one that is not trained."""
    sequences = row.train.micro_batch_size or row.train.batch_size
    dtype = machine.dtype(row.train.dtype)
    network = own_network(spec, row, shape)
    if network is not None:
        return network_memory(network, shape.hidden, sequences * response_tokens(spec), dtype=dtype)
    if not row.trains:
        size = DTYPE_BYTES[machine.dtype(spec.eval.dtype)]
        base = training_memory(shape, 0, spec.data.length, dtype="fp32", checkpointing=True)
        return MemoryEstimate(weights=size * shape.parameters, activations=0.0, rest=base.rest)
    prompt = spec.data.length - response_tokens(spec)
    positions = row.options.training_positions(prompt, response_tokens(spec))
    checkpointing = row.train.activation_checkpointing
    trained = training_memory(shape, sequences, positions, dtype=dtype, checkpointing=checkpointing)
    if row.train.sample_every_steps is None:
        return trained
    return replace(trained, copies=writing_copy(row, shape, machine, dtype))


def writing_copy(row: PlannedRow, shape: ModelShape, machine: Machine, dtype: str) -> float:
    """Return the bytes of weights that a row keeps a second time once it has written a text."""
    writes = row.capabilities.unmasking or row.capabilities.causal
    return laid_out_bytes(shape, machine.device, dtype) if writes else 0.0
