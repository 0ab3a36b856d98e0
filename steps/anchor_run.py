"""Filling the anchor store for several needs at once: everything that needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_core.backbone.backbone import Backbone
from dllm_core.data import anchor_files
from dllm_core.data.anchor_extraction import extract, worst_error
from dllm_core.data.anchor_files import Ranges, readable_bytes
from dllm_core.data.anchors import AnchorStore, kept_rows, needed_rows
from dllm_core.data.batch import Batch
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import StoreError
from dllm_core.methods.requirements import StateClass
from steps.anchor_needs import WantedAnchors
from steps.cache_anchors import AnchorWork
from steps.progress import duration

TOKENS_PER_BATCH = 2048
WORST_ERROR = 0.3
"""Standard deviations; stored states further off than this are not those of this model (bf16: 0.02, int8: 0.1)."""


@dataclass
class _Group:
    """Sequences of which the same layers and rows are read, by one need or by several together.

    Attributes:
        layers, positions: union over the needs.
        train, heldout: sample ids, ascending.
        needed: sequence key -> rows that are read.
        kept: sequence key -> rows that are stored.
        todo: keys that are not in the store.
    """

    layers: tuple[str, ...]
    positions: frozenset[StateClass]
    train: list[int] = field(default_factory=list)
    heldout: list[int] = field(default_factory=list)
    needed: dict[str, Ranges] = field(default_factory=dict)
    kept: dict[str, Ranges] = field(default_factory=dict)
    todo: set[str] = field(default_factory=set)

    def batches(self, train: SequenceSet, heldout: SequenceSet | None) -> Iterator[Batch]:
        """Yield the group's sequences in batches of about `TOKENS_PER_BATCH` tokens."""
        size = max(1, TOKENS_PER_BATCH // train.length)
        for sequences, ids in ((train, self.train), (heldout, self.heldout)):
            for start in range(0, len(ids), size):
                assert sequences is not None
                yield sequences.batch_of(ids[start : start + size])


def fill(work: AnchorWork) -> Mapping[WantedAnchors, Mapping[str, Any]]:
    """Estimate, refuse if the disk is too small, extract, compare with live states.

    Returns:
        For each need what its cache entry keeps: `needed` (rows by key), `seconds`, `flops`, `error`.
    """
    import torch

    if work.spec.runtime.threads is not None:
        torch.set_num_threads(work.spec.runtime.threads)
    train = SequenceSet.load(Path(work.data.train_dir))
    heldout = SequenceSet.load(Path(work.data.heldout_dir)) if any(one.heldout for one in work.wanted) else None
    overwrite = not work.ctx.use_cache
    groups = _groups(work.wanted, len(heldout) if heldout is not None else 0)
    for group in groups:
        for batch in group.batches(train, heldout):
            group.needed |= needed_rows(batch, group.positions)
            group.kept |= kept_rows(batch, group.positions)
        missing = group.needed if overwrite else work.files.missing(group.needed, group.layers)
        group.todo = set(missing)
    _announce(work, groups)
    errors: dict[WantedAnchors, float | None] = dict.fromkeys(work.wanted)
    if any(group.todo for group in groups):
        errors |= _extract(work, groups, train, heldout, overwrite=overwrite)
    return {one: _told(work, one, train, heldout, errors[one]) for one in work.wanted}


def _groups(wanted: tuple[WantedAnchors, ...], num_heldout: int) -> list[_Group]:
    """Sort sequences by the needs that read them: each belongs to exactly one group."""
    readers: dict[tuple[str, int], list[WantedAnchors]] = {}
    for one in wanted:
        for sample in one.sample_ids:
            readers.setdefault(("train", sample), []).append(one)
        for sample in range(num_heldout if one.heldout else 0):
            readers.setdefault(("heldout", sample), []).append(one)
    groups: dict[tuple[tuple[str, ...], frozenset[StateClass]], _Group] = {}
    for (where, sample), ones in sorted(readers.items()):
        layers = tuple(dict.fromkeys(layer for one in ones for layer in one.layers))
        positions = frozenset(one.positions for one in ones)
        group = groups.setdefault((layers, positions), _Group(layers, positions))
        (group.train if where == "train" else group.heldout).append(sample)
    return list(groups.values())


def _announce(work: AnchorWork, groups: list[_Group]) -> None:
    """Say what will be computed; refuse if it does not fit on the disk."""
    width, size, todo, parts = work.model.hidden_size, 0, 0, []
    for group in groups:
        rows = sum(anchor_files.num_rows(group.kept[key]) for key in group.todo)
        layers = len(group.layers)
        size += anchor_files.estimate_bytes(rows, len(group.todo), width, layers, work.files.dtype)
        todo += len(group.todo)
        parts.append(f"{len(group.todo)} of {len(group.needed)} sequences x {layers} layers")
    if todo:
        anchor_files.require_disk(work.files.root, size)
    calls = todo * work.data.length / TOKENS_PER_BATCH
    seconds = work.machine.seconds(todo * work.forward_flops(), calls, work.compute)
    free = readable_bytes(anchor_files.free_bytes(work.files.root))
    work.ctx.log(
        f"{work.name}: {' and '.join(parts)} to compute, {readable_bytes(size)} in {work.files.dtype} ({free} free), "
        f"about {duration(seconds)} (estimate)"
    )


def _extract(
    work: AnchorWork, groups: list[_Group], train: SequenceSet, heldout: SequenceSet | None, *, overwrite: bool
) -> dict[WantedAnchors, float | None]:
    """Run the teacher over what is missing; return the error of each need."""
    import torch

    dtype = torch.bfloat16 if work.compute == "bf16" else torch.float32
    backbone = Backbone.from_pretrained(work.teacher_dir(), dtype=dtype, device=work.machine.device)
    store = AnchorStore(work.files.root, work.files.teacher, work.files.dtype)
    todo = {key for group in groups for key in group.todo}
    name = "cache_anchors" if work.trained is None else f"{work.trained.cell}-anchors"
    progress, finished = work.ctx.progress(name, unit="sequence"), 0

    def tell(done: int, _: int) -> None:
        progress(finished + done, len(todo))

    for group in groups:
        pending = (b for b in group.batches(train, heldout) if group.todo.intersection(b.sequence_keys))
        done = extract(backbone, pending, store, group.layers, tell, positions=group.positions, overwrite=overwrite)
        finished += done.num_computed
    errors: dict[WantedAnchors, float | None] = {}
    for one in work.wanted:
        # rather what an earlier run stored than what was computed a moment ago
        found = [i for i in one.sample_ids if train.keys[i] not in todo] or one.sample_ids
        errors[one] = error = worst_error(backbone, train.batch_of({found[0], found[-1]}), store, one.layers)
        _check(work, error)
    return errors


def _check(work: AnchorWork, error: float) -> None:
    work.ctx.log(f"{work.name}: stored against live states: {error:.3f} standard deviations in the worst layer")
    if not error <= WORST_ERROR:
        raise StoreError(
            f"The anchors in {work.files.root} are {error:.2f} standard deviations off this model's states.",
            f"Delete {work.files.root} and run again.",
        )


def _told(
    work: AnchorWork, one: WantedAnchors, train: SequenceSet, heldout: SequenceSet | None, error: float | None
) -> dict[str, Any]:
    alone = _Group(one.layers, frozenset({one.positions}), list(one.sample_ids))
    if one.heldout and heldout is not None:
        alone.heldout = list(range(len(heldout)))
    needed = {k: rows for b in alone.batches(train, heldout) for k, rows in needed_rows(b, one.positions).items()}
    keys = [train.keys[sample] for sample in one.sample_ids]
    return {
        "needed": needed,
        "seconds": work.files.seconds(keys),
        "flops": len(keys) * work.forward_flops(),
        "error": error,
    }
