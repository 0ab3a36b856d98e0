"""Decoding speed of all rows in one process, in turns. Cached under all weights and the hardware."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.benchmark_rounds import groups_of, rounds_by_group
from steps.evaluate_cell import LIBRARIES, load_row, weights_dir, weights_identity
from steps.machine import Machine, probe, speed_conditions
from steps.row_options import options_of

if TYPE_CHECKING:
    from dllm_core.evals.throughput import Decode, Timing
    from dllm_core.methods.protocol import GenerationOutput, Method
    from dllm_core.methods.requirements import Capabilities
    from params.schema import BenchSpec, GridSpec, RowSpec
    from steps.context import Context
    from steps.prepare_model import ModelArtifact
    from steps.train_cell import TrainedCell

SEED = 0
ROOM_TO_WORK_BYTES = 1.5e9


@dataclass(frozen=True)
class BenchResult:
    """Speed of all rows; an artifact.

    Attributes:
        rows: row id -> {"steps": {group: figures}, "batches", "peak_memory_gb", "load_s", "trained"}.
        ties: one entry per pair of rows that run the same network, and number of steps.
        dtype: compute dtype of the decodes.
        together: all rows were in memory at once and took turns within every round.
        key: cache key.
        hit: it came from the cache.
        origin: run that computed it.
        seconds: what computing it took.
    """

    rows: dict[str, Any]
    ties: list[dict[str, Any]]
    dtype: str = ""
    together: bool = True
    key: str = ""
    hit: bool = False
    origin: str = ""
    seconds: float = 0.0


@dataclass
class _Entrant:
    """A row that is timed."""

    row: RowSpec
    directory: Path
    capabilities: Capabilities
    load_s: float = 0.0
    peak_memory_gb: float | None = None
    method: Method | None = field(default=None, repr=False)


def benchmark(
    spec: GridSpec,
    rows: Sequence[RowSpec],
    trained: Mapping[str, TrainedCell | None],
    model: ModelArtifact,
    ctx: Context,
) -> BenchResult:
    """Time the decoding of all rows, or find the result.

    One row a cell is timed, the first seed that was trained: seeds differ in values, not in work. Rows whose method
    trains but which were not trained are marked and not timed.

    Args:
        spec: the grid's settings.
        rows: finished rows in table order.
        trained: row id -> finished cell; None or absent for rows without one.
        model: the base model.
        ctx: run context.
    """
    machine = probe(spec.runtime.device, spec.runtime.threads)
    dtype = machine.dtype(spec.train.dtype)
    entrants, untrained = _entrants(rows, trained, model)
    for row_id in untrained:
        ctx.log(f"benchmark: {row_id} was not trained, so its speed is not measured")
    if not entrants:
        return BenchResult({row_id: {"steps": {}, "trained": False} for row_id in untrained}, [], dtype)

    def build(payload: Path, work: Path) -> dict[str, Any]:
        result = _measure(spec, entrants, model, ctx, dtype, machine)
        (payload / "benchmark.json").write_text(json.dumps(result, indent=1))
        return result

    entry = ctx.cache.get_or_build(
        "benchmark",
        {
            "bench": spec.bench.model_dump(mode="json"),
            "dtype": dtype,
            "hardware": speed_conditions(machine),
            "rows": {e.row.row_id: [e.row.cell.method, e.row.cell.options] for e in entrants},
            "memory_limit_gb": spec.runtime.memory_limit_gb,
        },
        inputs={e.row.row_id: weights_identity(e.directory, model) for e in entrants},
        roots=["steps.benchmark", *sorted({f"dllm_core.methods.{e.row.cell.method}" for e in entrants})],
        libraries=LIBRARIES,
        build=build,
        label=f"{len(entrants)} rows",
    )
    measured = dict(entry.result["rows"])
    measured |= {row_id: {"steps": {}, "trained": False} for row_id in untrained}
    return BenchResult(
        measured,
        entry.result["ties"],
        dtype,
        entry.result["together"],
        entry.key,
        entry.hit,
        entry.origin,
        entry.seconds,
    )


def _entrants(
    rows: Sequence[RowSpec], trained: Mapping[str, TrainedCell | None], model: ModelArtifact
) -> tuple[list[_Entrant], list[str]]:
    """Return what is timed, and the ids of rows that should have been trained and were not."""
    entrants: dict[str, _Entrant] = {}
    untrained = []
    for row in rows:
        capabilities = options_of(row).capabilities()
        directory = weights_dir(trained.get(row.row_id), model)
        if capabilities.trains and directory == Path(model.path):
            untrained.append(row.row_id)
        elif row.cell.name not in entrants:
            entrants[row.cell.name] = _Entrant(row, directory, capabilities)
    return list(entrants.values()), untrained


def _decodes(entrant: _Entrant, bench: BenchSpec, num_tokens: int, device: str) -> dict[str, Decode]:
    """Return what to time of a loaded row, by group. All rows decode the same prompts in a round."""
    import torch

    from dllm_core.corruption.noise import NoiseSource
    from dllm_core.methods.protocol import SamplingRequest

    method = entrant.method
    assert method is not None
    noise = NoiseSource(SEED)

    def decode_with(steps: int, batch_size: int) -> Callable[[int], GenerationOutput]:
        request = SamplingRequest(max_new_tokens=bench.new_tokens, num_steps=steps, seed=SEED)

        def decode(index: int) -> GenerationOutput:
            # scheduled decoding of a fixed length costs the same for any text
            ids_BL = [
                torch.randint(num_tokens, (bench.prompt_tokens,), generator=noise.generator(b, index % 1000, "prompt"))
                for b in range(batch_size)
            ]
            with torch.inference_mode():
                return method.sample([ids.to(device) for ids in ids_BL], request)

        return decode

    return {
        group: decode_with(steps or bench.new_tokens, size)
        for group, steps, size in groups_of(bench, causal=entrant.capabilities.causal)
    }


def _measure(
    spec: GridSpec, entrants: list[_Entrant], model: ModelArtifact, ctx: Context, dtype: str, machine: Machine
) -> dict[str, Any]:
    import torch

    from dllm_core.evals.throughput import in_laps, interleave

    if spec.runtime.threads is not None:
        torch.set_num_threads(spec.runtime.threads)
    bench = spec.bench
    rounds = rounds_by_group(bench)
    progress = ctx.progress("benchmark", unit="round")
    together = _fits(spec, entrants, model, dtype, machine)

    @contextmanager
    def loaded(entrant: _Entrant) -> Iterator[Mapping[str, Decode]]:
        _load(entrant, bench, model, dtype, machine.device)
        yield _decodes(entrant, bench, model.num_tokens, machine.device)
        entrant.method = None
        if machine.device == "cuda":
            torch.cuda.empty_cache()

    if together:
        for entrant in entrants:
            _load(entrant, bench, model, dtype, machine.device)
        groups: dict[str, dict[str, Decode]] = {g: {} for g in rounds}
        for entrant in entrants:
            for group, decode in _decodes(entrant, bench, model.num_tokens, machine.device).items():
                groups[group][entrant.row.row_id] = decode
        groups = {g: rows for g, rows in groups.items() if rows}
        timings = interleave(
            groups,
            rounds={g: rounds[g] for g in groups},
            # the decode that memory was measured on has warmed every row up once
            warmup_rounds=max(0, bench.warmup_rounds - 1),
            on_round=lambda done, total: progress(done, total),
        )
    else:
        ctx.log("benchmark: the rows do not fit into memory together; they run one after another, in laps")
        turns = {e.row.row_id: lambda e=e: loaded(e) for e in entrants}
        timings = in_laps(turns, rounds=rounds, on_turn=lambda done, total: progress(done, total))
    rows = {e.row.row_id: _figures(e, bench, timings) for e in entrants}
    return {"rows": rows, "ties": _ties(entrants, bench, timings), "together": together, "rounds": rounds}


def _load(entrant: _Entrant, bench: BenchSpec, model: ModelArtifact, dtype: str, device: str) -> None:
    """Load a row, then decode once to see how much memory that takes."""
    import torch

    from dllm_core.evals.memory import watch_peak, weight_bytes
    from dllm_core.evals.throughput import synchronize

    started = time.perf_counter()
    entrant.method = load_row(entrant.row, entrant.directory, model, dtype=dtype, device=device)
    synchronize()
    entrant.load_s = time.perf_counter() - started
    first = next(iter(_decodes(entrant, bench, model.num_tokens, device).values()))
    with watch_peak(torch.device(device)) as peak:
        first(-1)
    if peak.extra_bytes is not None:
        entrant.peak_memory_gb = (weight_bytes(entrant.method) + peak.extra_bytes) / 1e9


def _fits(spec: GridSpec, entrants: Sequence[_Entrant], model: ModelArtifact, dtype: str, machine: Machine) -> bool:
    """Return whether all rows can be in memory at once, with what decoding lays out a second time."""
    import torch

    from dllm_core.backbone.sources import read_config
    from dllm_core.evals.memory import loaded_bytes
    from steps.estimates import ModelShape, laid_out_bytes

    loaded = sum(loaded_bytes(e.directory, torch.bfloat16 if dtype == "bf16" else torch.float32) for e in entrants)
    copy = laid_out_bytes(ModelShape.from_config(read_config(Path(model.path))), machine.device, dtype)
    copies = copy * sum(e.capabilities.unmasking or e.capabilities.causal for e in entrants)
    limit = spec.runtime.memory_limit_gb
    free = machine.memory_free if limit is None else min(machine.memory_free, limit * 1e9)
    return loaded + copies + ROOM_TO_WORK_BYTES < free


def _figures(
    entrant: _Entrant, bench: BenchSpec, timings: Mapping[str, Mapping[str, Sequence[Timing]]]
) -> dict[str, Any]:
    """Return the figures of a row; those of further batch sizes stand apart under `batches`."""
    from dllm_core.evals.throughput import summary

    own = {g: summary(rows[entrant.row.row_id]) for g, rows in timings.items() if entrant.row.row_id in rows}
    batches: dict[str, dict[str, Any]] = {}
    for group, figures in own.items():
        name, _, size = group.partition(" x")
        batches.setdefault(size or str(bench.batch_sizes[0]), {})[name] = figures
    return {
        "steps": batches.pop(str(bench.batch_sizes[0])),
        "batches": batches,
        "peak_memory_gb": entrant.peak_memory_gb,
        "load_s": entrant.load_s,
        "trained": entrant.capabilities.trains,
    }


def _ties(
    entrants: Sequence[_Entrant], bench: BenchSpec, timings: Mapping[str, Mapping[str, Sequence[Timing]]]
) -> list[dict[str, Any]]:
    """Compare every two rows that run the same network, at every number of steps (first batch size)."""
    from dllm_core.evals.throughput import compare

    pairs = [
        (a.row.row_id, b.row.row_id)
        for a, b in itertools.combinations(entrants, 2)
        if a.capabilities.speed_group is not None and a.capabilities.speed_group == b.capabilities.speed_group
    ]
    ties = []
    for steps in sorted(bench.steps):
        found = compare(timings[str(steps)], pairs) if pairs else []
        ties += [{**entry, "steps": str(steps)} for entry in found]
    return ties
