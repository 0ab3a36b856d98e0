"""Hidden states of a frozen model, computed once for all rows and kept between runs: of the base model, the teacher
of most rows, or of a trained cell that a row is built on. Both are read causally.

The states lie in a store that runs share, one file per sequence, so that a larger budget, another layer or another cell
computes only what is new. Rows differ in what they read: few layers of many sequences, or many layers of few. Each
distinct need has a cache entry that says which sequences, rows and layers it covers; a hit looks whether they are still
there. A sequence that several needs read goes through the teacher once, for the layers of all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_core.backbone.sources import read_config
from dllm_core.data import anchor_files
from dllm_core.data.anchor_files import AnchorFiles, Ranges
from dllm_core.errors import DllmError
from dllm_core.methods.requirements import AnchorNeed
from params.schema import GridSpec
from steps.anchor_needs import WantedAnchors, wanted_anchors
from steps.cache.closure import closure
from steps.cache.key import library_versions
from steps.cache.store import MANIFEST, USED, write_json
from steps.context import Context
from steps.estimates import ModelShape
from steps.machine import Machine, probe

if TYPE_CHECKING:
    from dllm_core.data.anchors import AnchorStore
    from steps.prepare_data import DataArtifact
    from steps.prepare_model import ModelArtifact

LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class TrainedTeacher:
    """A trained cell whose states are kept, in place of the base model.

    Attributes:
        cell: the row that trained it.
        identity: of its weights, known before they are there.
        directory: returns where it lies, called once something is to be computed.
    """

    cell: str
    identity: str
    directory: Callable[[], Path]


@dataclass(frozen=True, kw_only=True)
class AnchorPart:
    """Teacher states that rows of one need read.

    Attributes:
        wanted: layers, rows and sequences that are covered.
        seconds: what computing the training sequences from nothing costs, whoever paid for it. (A sequence's time
            includes writing all layers that its file holds.)
        flops: operations of the teacher for the same.
        error: standardised error of stored against live states, of the worst layer; None when nothing was computed.
        key: cache key.
        hit: everything was there.
        origin: run that asked first.
    """

    wanted: WantedAnchors
    seconds: float
    flops: float
    error: float | None
    key: str
    hit: bool
    origin: str

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """Training sequences that are covered."""
        return self.wanted.sample_ids

    def stand_alone_cost(self, num_sequences: int) -> tuple[float, float]:
        """Return (seconds, FLOPs) of computing the states of so many sequences from nothing: what a row is charged."""
        share = num_sequences / len(self.sample_ids)
        return self.seconds * share, self.flops * share


@dataclass(frozen=True, kw_only=True)
class AnchorArtifact:
    """Teacher states on disk.

    Attributes:
        store_dir: directory of the store, shared between runs.
        teacher: identity of model, precision of its computation and code.
        dtype: stored precision.
        parts: one for each distinct need of the grid.
        num_bytes: on disk, of the covered sequences with all their layers.
        wall_s: what this run spent.
    """

    store_dir: str
    teacher: str
    dtype: str
    parts: tuple[AnchorPart, ...]
    num_bytes: int
    wall_s: float

    @property
    def hit(self) -> bool:
        """Everything was there."""
        return all(part.hit for part in self.parts)

    def find(self, need: AnchorNeed) -> AnchorPart | None:
        """Return the part that serves a need, None when no row of the grid had it."""
        return next((part for part in self.parts if part.wanted.serves(need)), None)

    def part(self, need: AnchorNeed) -> AnchorPart:
        """Return the part that serves a need.

        Raises:
            DllmError: there is none.
        """
        found = self.find(need)
        if found is None:
            layers = ", ".join(need.layers)
            raise DllmError(f"No anchors of layers {layers} ({need.positions}) were prepared.", "Run the grid again.")
        return found

    def open(self) -> AnchorStore:
        """Return the store."""
        from dllm_core.data.anchors import AnchorStore

        return AnchorStore(self.store_dir, self.teacher, self.dtype)


def cache_anchors(spec: GridSpec, model: ModelArtifact, data: DataArtifact, ctx: Context) -> AnchorArtifact | None:
    """Bring the states of the base model into the store that the grid's rows read within their budget, for all seeds.

    Returns:
        None when no row reads any.

    Raises:
        StoreError: an 8-bit store for rows that need whole states.
        ResourceError: the disk is too small.
    """
    wanted = wanted_anchors(spec, model, data, ctx)
    return cover_anchors(spec, wanted, model, data, ctx) if wanted else None


def cover_anchors(
    spec: GridSpec,
    wanted: Sequence[WantedAnchors],
    model: ModelArtifact,
    data: DataArtifact,
    ctx: Context,
    trained: TrainedTeacher | None = None,
) -> AnchorArtifact:
    """Bring the states of given needs into the store; computes only what is not there, each sequence once.

    Args:
        spec: the grid's settings; `anchors`, `train.dtype` and `runtime` are read.
        wanted: distinct needs with their sequences.
        model: the converted base model; run causally it is the teacher.
        data: training and held-out sequences.
        ctx: run context.
        trained: the trained cell that is the teacher instead.

    Raises:
        StoreError: an 8-bit store for a need of whole states, or a store that disagrees with the model.
        ResourceError: the disk is too small.
    """
    dtype = spec.anchors.dtype
    for one in wanted:
        anchor_files.require_dtype_serves(dtype, one.positions)
    machine = probe(spec.runtime.device, spec.runtime.threads)
    teacher = teacher_identity(model.identity if trained is None else trained.identity, spec)
    files = AnchorFiles(ctx.runs_dir / "cache" / "anchors-store" / teacher[:16] / dtype, teacher, dtype)
    started = time.perf_counter()
    compute = machine.dtype(spec.train.dtype)
    work = AnchorWork(spec, tuple(wanted), model, data, ctx, files, compute, machine, trained)
    parts = tuple(work.part(one) for one in wanted)
    work.mark_store()
    return AnchorArtifact(
        store_dir=str(files.root),
        teacher=teacher,
        dtype=dtype,
        parts=parts,
        num_bytes=sum(files.path(key).stat().st_size for key in work.covered),
        wall_s=time.perf_counter() - started,
    )


def teacher_identity(weights: str, spec: GridSpec) -> str:
    """Name a teacher by all that its states depend on: weights, precision, device, code and libraries.

    Args:
        weights: identity of its weights.
        spec: the grid's settings; `train.dtype` and `runtime` are read.
    """
    machine = probe(spec.runtime.device, spec.runtime.threads)
    told = {
        "model": weights,
        "compute": machine.dtype(spec.train.dtype),
        "device": machine.device,
        "sources": closure(["dllm_core.data.anchor_extraction"]),
        "libraries": library_versions(LIBRARIES),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass
class AnchorWork:
    """One call of `cover_anchors`."""

    spec: GridSpec
    wanted: tuple[WantedAnchors, ...]
    model: ModelArtifact
    data: DataArtifact
    ctx: Context
    files: AnchorFiles
    compute: str
    machine: Machine
    trained: TrainedTeacher | None = None
    covered: set[str] = field(default_factory=set)
    _filled: Mapping[WantedAnchors, Mapping[str, Any]] | None = None

    @property
    def name(self) -> str:
        """What the log calls these states."""
        return "anchors" if self.trained is None else f"anchors of {self.trained.cell}"

    def teacher_dir(self) -> Path:
        """Return where the teacher's weights lie."""
        return Path(self.model.path) if self.trained is None else self.trained.directory()

    def part(self, one: WantedAnchors) -> AnchorPart:
        """Return the part of one need, computing what is missing for any of them."""
        keys = json.loads(Path(self.data.keys_file).read_text())
        names = sorted(keys[sample] for sample in one.sample_ids)
        inputs = {"teacher": self.files.teacher, "sequences": hashlib.sha256("\n".join(names).encode()).hexdigest()}
        if one.heldout:
            inputs["heldout"] = self.data.fingerprint
        entry = self.ctx.cache.get_or_build(
            "anchors",
            {"layers": list(one.layers), "positions": one.positions, "dtype": self.files.dtype},
            inputs=inputs,
            roots=["steps.cache_anchors"],
            libraries=LIBRARIES,
            build=lambda payload, _: self._build(one, payload),
            label=f"{len(names)} sequences x {len(one.layers)} layers{self._of_cell}",
        )
        result, hit = entry.result, entry.hit
        needed = _read_needed(entry.path)
        if hit and (absent := self.files.missing(needed, one.layers)):
            what = f"{len(absent)} of {len(needed)} chunks are no longer in {self.files.root}"
            self.ctx.log(f"{self.name}: {what}: computing them again")
            result, hit = dict(self.fill(one)), False
        self.covered |= needed.keys()
        return AnchorPart(
            wanted=one,
            seconds=result["seconds"],
            flops=result["flops"],
            error=result["error"],
            key=entry.key,
            hit=hit,
            origin=entry.origin,
        )

    def _build(self, one: WantedAnchors, payload: Path) -> dict[str, Any]:
        """Compute what is missing; leave a list of what there has to be."""
        result = dict(self.fill(one))
        (payload / "needed.json").write_text(json.dumps(result.pop("needed")))
        return result

    def fill(self, one: WantedAnchors) -> Mapping[str, Any]:
        """Fill the store for all needs, once in this call; return what concerns one of them."""
        if self._filled is None:
            from steps.anchor_run import fill

            self._filled = fill(self)
        return self._filled[one]

    def mark_store(self) -> None:
        """Make the store an entry that `python -m steps.cache` lists by name and clears by last use."""
        home = self.files.root.parent
        home.mkdir(parents=True, exist_ok=True)
        if not (home / MANIFEST).exists():
            label = f"hidden states of {self.model.source}{self._of_cell}"
            told = {"key": home.name, "kind": home.parent.name, "label": label}
            told |= {"run_id": self.ctx.run_id, "created": time.time(), "seconds": 0.0}
            write_json(home / MANIFEST, {**told, "material": {}, "result": {}, "files": {}})
        with contextlib.suppress(OSError):  # a store that can only be read still serves
            (home / USED).touch()

    @property
    def _of_cell(self) -> str:
        return "" if self.trained is None else f", {self.trained.cell}"

    def forward_flops(self) -> float:
        """Return operations of the teacher for one sequence; a trained cell is as large as the base model."""
        shape = ModelShape.from_config(read_config(Path(self.model.path)))
        return shape.teacher_flops(self.data.length)


def _read_needed(payload: Path) -> dict[str, Ranges]:
    stored = json.loads((payload / "needed.json").read_text())
    return {key: anchor_files.normalise_ranges(ranges) for key, ranges in stored.items()}
