"""Quality beside speed: a row at several numbers of steps, and its accuracy under parallelism. Both are cached."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.evaluate_cell import (
    LIBRARIES,
    SEED,
    Evaluation,
    judge_identity,
    judge_of,
    load_row,
    settings_of,
    weights_dir,
    weights_identity,
)
from steps.machine import Machine, probe
from steps.row_options import options_of

if TYPE_CHECKING:
    from dllm_core.data.sequences import SequenceSet
    from dllm_core.methods.protocol import Method
    from params.schema import GridSpec, RowSpec
    from steps.context import Context
    from steps.prepare_data import DataArtifact
    from steps.prepare_model import ModelArtifact
    from steps.train_cell import TrainedCell

OnProgress = Callable[[int, int], None]
STEPS, PARALLELISM = "step_sweep", "parallelism"
"""Of `params.sections.EvalSpec`, and the names of what comes out."""


def sweep_cell(
    spec: GridSpec,
    row: RowSpec,
    trained: TrainedCell | None,
    model: ModelArtifact,
    data: DataArtifact,
    ctx: Context,
    evaluation: Evaluation,
) -> Evaluation:
    """Return a row's evaluation with its sweeps in the metrics, as far as `spec.eval` asks for them.

    Args:
        spec: the grid's settings.
        row: which row.
        trained: its finished cell; None for a row that is only measured.
        model: the base model: judge, and weights of rows without their own.
        data: held-out sequences.
        ctx: run context.
        evaluation: what was measured of it without them.
    """
    machine = probe(spec.runtime.device, spec.runtime.threads)
    directory = weights_dir(trained, model)
    found = {}
    for name in (STEPS, PARALLELISM):
        if getattr(spec.eval, name) is not None:
            found[name] = _cached(name, spec, row, directory, model, data, ctx, machine)
    return replace(evaluation, metrics={**evaluation.metrics, **found})


def _cached(
    name: str,
    spec: GridSpec,
    row: RowSpec,
    directory: Path,
    model: ModelArtifact,
    data: DataArtifact,
    ctx: Context,
    machine: Machine,
) -> dict[str, Any]:
    """Return one sweep of a row, or find it."""
    dtype = machine.dtype(spec.eval.dtype)

    def build(payload: Path, work: Path) -> dict[str, Any]:
        import torch

        from dllm_core.data.sequences import SequenceSet

        if spec.runtime.threads is not None:
            torch.set_num_threads(spec.runtime.threads)
        method = load_row(row, directory, model, dtype=dtype, device=machine.device)
        heldout, report = SequenceSet.load(Path(data.heldout_dir)), ctx.progress(row.row_id, unit="text")

        def progress(done: int, total: int) -> None:
            report(done, total, measuring=name.replace("_", " "))

        measure = step_quality if name == STEPS else parallel_accuracy
        metrics = measure(spec, method, model, heldout, dtype, machine.device, progress)
        (payload / f"{name}.json").write_text(json.dumps(metrics, indent=1))
        return metrics

    options = options_of(row)
    entry = ctx.cache.get_or_build(
        name,
        {
            "settings": getattr(spec.eval, name).model_dump(mode="json"),
            "lengths": [spec.data.prompt_tokens, spec.data.response_tokens],
            "batch_size": spec.eval.batch_size,
            "dtype": dtype,
            "device": machine.device,
            "seed": SEED,
            "method": row.cell.method,
            "options": options.model_dump(mode="json"),
        },
        inputs={
            "weights": weights_identity(directory, model),
            "data": data.fingerprint,
            **({"judge": judge_identity(spec, model)} if name == STEPS else {}),
        },
        roots=["steps.sweep_cell", f"dllm_core.methods.{row.cell.method}"],
        libraries=LIBRARIES,
        build=build,
        label=row.row_id,
    )
    return entry.result


def step_quality(
    spec: GridSpec,
    method: Method,
    model: ModelArtifact,
    heldout: SequenceSet,
    dtype: str,
    device: str,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Measure a loaded row at the numbers of steps of `spec.eval.step_sweep`; see `dllm_core.evals.step_sweep`."""
    from dllm_core.corruption.noise import NoiseSource
    from dllm_core.evals.evaluate import heldout_prompts
    from dllm_core.evals.gaps import middle_gaps
    from dllm_core.evals.step_sweep import StepSweep, step_sweep

    wanted = spec.eval.step_sweep
    assert wanted is not None
    prompts = heldout_prompts(heldout, replace(settings_of(spec), frontier_samples=wanted.samples))
    batch = heldout.batch_of(range(min(wanted.infill_sequences, len(heldout))))
    gaps = middle_gaps(batch, wanted.infill_tokens, heldout.groups(batch.sample_ids))
    sweep = StepSweep(
        steps=wanted.steps,
        temperatures=wanted.temperatures,
        new_tokens=spec.data.response_tokens,
        batch_size=spec.eval.batch_size,
    )
    on_done = _counter(sweep.work(method.capabilities, prompts, gaps), on_progress)
    return step_sweep(method, prompts, gaps, judge_of(spec, model, dtype, device), NoiseSource(SEED), sweep, on_done)


def parallel_accuracy(
    spec: GridSpec,
    method: Method,
    model: ModelArtifact,
    heldout: SequenceSet,
    dtype: str,
    device: str,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Measure a loaded row's curves of `spec.eval.parallelism`; see `dllm_core.evals.parallelism`."""
    from dllm_core.corruption.noise import NoiseSource
    from dllm_core.evals.gaps import middle_gaps, random_gaps
    from dllm_core.evals.parallelism import ParallelismSweep, parallelism

    wanted = spec.eval.parallelism
    assert wanted is not None
    batch = heldout.batch_of(range(min(wanted.sequences, len(heldout))))
    groups = heldout.groups(batch.sample_ids)
    tasks = {
        "masked": random_gaps(batch, wanted.mask_ratio, NoiseSource(SEED), groups),
        "infill": middle_gaps(batch, wanted.infill_tokens, groups),
    }
    varied = wanted.model_dump(exclude={"sequences", "mask_ratio", "infill_tokens"})
    sweep = ParallelismSweep(**varied, batch_size=spec.eval.batch_size, seed=SEED)
    on_done = _counter(sweep.work(method.capabilities, tasks), on_progress)
    told = {"mask_ratio": wanted.mask_ratio, "num_sequences": len(batch)}
    return {**parallelism(method, tasks, sweep, on_done), **told}


def _counter(total: int, on_progress: OnProgress | None) -> Callable[[int], None] | None:
    """Return what adds up finished texts and passes on (done, total)."""
    if on_progress is None:
        return None
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    return add
