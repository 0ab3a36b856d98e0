"""Hidden states of the frozen teacher, computed once for all rows and kept between runs.

The states lie in a store that runs share, one file per sequence, so that a larger budget or another layer computes only
what is new. A cache entry says which sequences, rows and layers a grid needs; a hit looks whether they are still there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_core.backbone.sources import read_config
from dllm_core.data import anchor_files
from dllm_core.data.anchor_files import AnchorFiles, Ranges, readable_bytes
from dllm_core.methods.requirements import AnchorNeed
from params.schema import GridSpec
from steps.cache.closure import closure
from steps.cache.key import library_versions
from steps.cache.store import MANIFEST, USED, write_json
from steps.context import Context
from steps.costs import step_flops
from steps.estimates import ModelShape
from steps.machine import Machine, probe
from steps.plan_rows import plan_rows, shared_work
from steps.progress import duration
from steps.training_plan import Surroundings, TrainJob, plan_job

if TYPE_CHECKING:
    from dllm_core.data.anchors import AnchorStore
    from steps.prepare_data import DataArtifact
    from steps.prepare_model import ModelArtifact

LIBRARIES = ("torch", "transformers")
TOKENS_PER_BATCH = 2048
ESTIMATE_MARGIN = 1.25
"""A budget in seconds is covered for a machine this much faster than the estimate."""
WORST_ERROR = 0.3
"""Standard deviations; stored states further off than this are not those of this model (bf16: 0.02, int8: 0.1)."""


@dataclass(frozen=True, kw_only=True)
class AnchorArtifact:
    """Teacher states on disk.

    Attributes:
        store_dir: directory of the store, shared between runs.
        teacher: identity of model, precision of its computation and code.
        dtype: stored precision.
        layers: layers kept.
        positions: rows kept of every sequence: `response_predictors` or `all`.
        sample_ids: training sequences that are covered.
        num_bytes: on disk, of the covered sequences.
        seconds: what computing all covered sequences from nothing costs, whoever paid for it.
        flops: operations of the teacher for the same.
        error: standardised error of stored against live states, of the worst layer; None when nothing was computed.
        key: cache key.
        hit: everything was there.
        origin: run that asked first.
        wall_s: what this run spent.
    """

    store_dir: str
    teacher: str
    dtype: str
    layers: tuple[str, ...]
    positions: str
    sample_ids: tuple[int, ...]
    num_bytes: int
    seconds: float
    flops: float
    error: float | None
    key: str
    hit: bool
    origin: str
    wall_s: float

    def open(self) -> AnchorStore:
        """Return the store."""
        from dllm_core.data.anchors import AnchorStore

        return AnchorStore(self.store_dir, self.teacher, self.dtype)

    def stand_alone_cost(self, num_sequences: int) -> tuple[float, float]:
        """Return (seconds, FLOPs) of computing the states of so many sequences from nothing: what a row is charged."""
        share = num_sequences / len(self.sample_ids)
        return self.seconds * share, self.flops * share


def cache_anchors(spec: GridSpec, model: ModelArtifact, data: DataArtifact, ctx: Context) -> AnchorArtifact | None:
    """Bring the states into the store that the grid's rows read within their budget, for all seeds.

    Returns:
        None when no row reads anchors.

    Raises:
        StoreError: an 8-bit store for rows that need whole states.
        ResourceError: the disk is too small.
    """
    need = shared_work(*plan_rows(spec, model.num_layers)).anchors
    if need is None:
        return None
    return cover_anchors(spec, need, presented_samples(spec, model, data, ctx), model, data, ctx)


def presented_samples(spec: GridSpec, model: ModelArtifact, data: DataArtifact, ctx: Context) -> tuple[int, ...]:
    """Return the training sequences that the rows that read anchors see within their steps, for all seeds.

    A budget in seconds is turned into steps by measuring them, which needs anchors: here it is estimated, with a
    margin, and a row computes what is then still missing.
    """
    around = Surroundings(spec=spec, model=model, data=data, anchors=None, ctx=ctx)
    rows, donors = plan_rows(spec, model.num_layers)
    by_cell = {row.cell: row for row in (*rows, *donors.values())}
    shape = ModelShape.from_config(read_config(Path(model.path)))
    machine = probe(spec.runtime.device, spec.runtime.threads)

    def estimate(job: TrainJob) -> float:
        flops = step_flops(spec, by_cell[job.cell], shape)
        return machine.seconds(flops, 1, machine.dtype(job.settings.dtype)) / ESTIMATE_MARGIN

    readers = [row for row in rows if row.requirements.anchors is not None]
    jobs = [plan_job(spec.row_spec(row.cell, row.seed), around, estimate) for row in readers]
    return tuple(sorted({sample for job in jobs for sample in job.samples()}))


def cover_anchors(
    spec: GridSpec, need: AnchorNeed, sample_ids: Sequence[int], model: ModelArtifact, data: DataArtifact, ctx: Context
) -> AnchorArtifact:
    """Bring the states of given training sequences into the store; computes only what is not there.

    Args:
        spec: the grid's settings; `anchors`, `train.dtype` and `runtime` are read.
        need: layers and rows.
        sample_ids: training sequences.
        model: the converted base model; run causally it is the teacher.
        data: the training set.
        ctx: run context.

    Raises:
        StoreError: an 8-bit store for a need of whole states, or a store that disagrees with the model.
        ResourceError: the disk is too small.
    """
    dtype = spec.anchors.dtype
    anchor_files.require_dtype_serves(dtype, need.positions)
    machine = probe(spec.runtime.device, spec.runtime.threads)
    compute = machine.dtype(spec.train.dtype)
    teacher = _teacher(model, compute, machine.device)
    files = AnchorFiles(ctx.runs_dir / "cache" / "anchors-store" / teacher[:16] / dtype, teacher, dtype)
    keys = json.loads(Path(data.keys_file).read_text())
    wanted = sorted(keys[sample] for sample in sample_ids)
    work = _Work(spec, need, tuple(sample_ids), model, data, ctx, files, compute, machine)

    started = time.perf_counter()
    entry = ctx.cache.get_or_build(
        "anchors",
        {"layers": list(need.layers), "positions": need.positions, "dtype": dtype},
        inputs={"teacher": teacher, "sequences": hashlib.sha256("\n".join(wanted).encode()).hexdigest()},
        roots=["steps.cache_anchors"],
        libraries=LIBRARIES,
        build=lambda payload, _: work.build(payload),
        label=f"{len(wanted)} sequences x {len(need.layers)} layers",
    )
    result, hit = entry.result, entry.hit
    work.mark_store()
    if hit and (absent := work.absent(entry.path)):
        ctx.log(f"anchors: {absent} of {len(wanted)} chunks are no longer in {files.root}: computing them again")
        result, hit = {**result, **work.fill()}, False
    return AnchorArtifact(
        store_dir=str(files.root),
        teacher=teacher,
        dtype=dtype,
        layers=need.layers,
        positions=need.positions,
        sample_ids=tuple(sample_ids),
        num_bytes=result["num_bytes"],
        seconds=result["seconds"],
        flops=result["flops"],
        error=result["error"],
        key=entry.key,
        hit=hit,
        origin=entry.origin,
        wall_s=time.perf_counter() - started,
    )


def _teacher(model: ModelArtifact, compute: str, device: str) -> str:
    """Name the teacher by all that its states depend on: weights, precision, device, code and libraries."""
    told = {
        "model": model.identity,
        "compute": compute,
        "device": device,
        "sources": closure(["dllm_core.data.anchor_extraction"]),
        "libraries": library_versions(LIBRARIES),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Work:
    """One call of `cover_anchors`."""

    spec: GridSpec
    need: AnchorNeed
    sample_ids: tuple[int, ...]
    model: ModelArtifact
    data: DataArtifact
    ctx: Context
    files: AnchorFiles
    compute: str
    machine: Machine

    def build(self, payload: Path) -> dict[str, Any]:
        """Compute what is missing; leave a list of what there has to be."""
        result = self.fill(overwrite=not self.ctx.use_cache)
        needed: dict[str, Ranges] = result.pop("needed")
        (payload / "needed.json").write_text(json.dumps(needed))
        return result

    def mark_store(self) -> None:
        """Make the store an entry that `python -m steps.cache` lists by name and clears by last use."""
        home = self.files.root.parent
        home.mkdir(parents=True, exist_ok=True)
        if not (home / MANIFEST).exists():
            told = {"key": home.name, "kind": home.parent.name, "label": f"hidden states of {self.model.source}"}
            told |= {"run_id": self.ctx.run_id, "created": time.time(), "seconds": 0.0}
            write_json(home / MANIFEST, {**told, "material": {}, "result": {}, "files": {}})
        with contextlib.suppress(OSError):  # a store that can only be read still serves
            (home / USED).touch()

    def absent(self, payload: Path) -> int:
        """Count chunks of an old entry that are gone or damaged; imports nothing heavy."""
        stored = json.loads((payload / "needed.json").read_text())
        needed = {key: anchor_files.normalise_ranges(ranges) for key, ranges in stored.items()}
        return len(self.files.missing(needed, self.need.layers))

    def fill(self, *, overwrite: bool = False) -> dict[str, Any]:
        """Estimate, refuse if the disk is too small, extract, compare with live states."""
        import torch

        from dllm_core.backbone.backbone import Backbone
        from dllm_core.data.anchor_extraction import extract, worst_error
        from dllm_core.data.anchors import AnchorStore, needed_rows
        from dllm_core.data.sequences import SequenceSet

        if self.spec.runtime.threads is not None:
            torch.set_num_threads(self.spec.runtime.threads)
        train = SequenceSet.load(Path(self.data.train_dir))
        size = max(1, TOKENS_PER_BATCH // train.length)
        batches = [train.batch_of(self.sample_ids[i : i + size]) for i in range(0, len(self.sample_ids), size)]
        needed = {key: rows for batch in batches for key, rows in needed_rows(batch, self.need.positions).items()}
        todo = set(needed) if overwrite else set(self.files.missing(needed, self.need.layers))
        self._announce(needed, todo)
        error = None
        store = AnchorStore(self.files.root, self.files.teacher, self.files.dtype)
        if todo:
            dtype = torch.bfloat16 if self.compute == "bf16" else torch.float32
            backbone = Backbone.from_pretrained(self.model.path, dtype=dtype, device=self.machine.device)
            progress = self.ctx.progress("cache_anchors", unit="sequence")
            pending = [b for b in batches if todo.intersection(b.sequence_keys)]
            extract(
                backbone,
                pending,
                store,
                self.need.layers,
                lambda done, _: progress(done, len(todo)),
                positions=self.need.positions,
                overwrite=overwrite,
            )
            # rather what an earlier run stored than what was computed a moment ago
            found = [i for i in self.sample_ids if train.keys[i] not in todo] or self.sample_ids
            error = worst_error(backbone, train.batch_of({found[0], found[-1]}), store, self.need.layers)
            self._check(error)
        return {
            "needed": needed,
            "num_bytes": sum(self.files.path(key).stat().st_size for key in needed),
            "seconds": self.files.seconds(needed),
            "flops": len(needed) * self._flops(),
            "error": error,
        }

    def _flops(self) -> float:
        shape = ModelShape.from_config(read_config(Path(self.model.path)))
        return shape.forward_flops(self.data.length, self.data.length, 0)

    def _announce(self, needed: dict[str, Ranges], todo: set[str]) -> None:
        rows = sum(anchor_files.num_rows(needed[key]) for key in todo)
        layers = len(self.need.layers)
        size = anchor_files.estimate_bytes(rows, len(todo), self.model.hidden_size, layers, self.files.dtype)
        if todo:
            anchor_files.require_disk(self.files.root, size)
        calls = len(todo) * self.data.length / TOKENS_PER_BATCH
        seconds = self.machine.seconds(len(todo) * self._flops(), calls, self.compute)
        free = readable_bytes(anchor_files.free_bytes(self.files.root))
        self.ctx.log(
            f"anchors: {len(todo)} of {len(needed)} sequences x {layers} layers to compute, {readable_bytes(size)} in "
            f"{self.files.dtype} ({free} free), about {duration(seconds)} (estimate)"
        )

    def _check(self, error: float) -> None:
        self.ctx.log(f"anchors: stored against live states: {error:.3f} standard deviations in the worst layer")
        if not error <= WORST_ERROR:
            from dllm_core.errors import StoreError

            raise StoreError(
                f"The anchors in {self.files.root} are {error:.2f} standard deviations off this model's states.",
                f"Delete {self.files.root} and run again.",
            )
