"""The anchor store: frozen-teacher hidden states by sequence. B batch, L length, R stored rows, M rows, D hidden."""

from __future__ import annotations

import contextlib
import os
import uuid
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dllm_core.data import anchor_codec, anchor_files
from dllm_core.data.anchor_files import SCALE_SUFFIX, SCALED, AnchorFiles, ChunkHeader, Ranges
from dllm_core.data.batch import Batch
from dllm_core.errors import StoreError
from dllm_core.methods.requirements import StateClass

try:
    import fcntl
except ImportError:  # no such lock on this platform: do not write one store from two processes there
    fcntl = None  # type: ignore[assignment]


Positions = StateClass | Collection[StateClass]
"""Which rows of a sequence are meant: one class, or the union of several."""


def needed_rows(batch: Batch, positions: Positions) -> dict[str, Ranges]:
    """Return, by sequence key, the rows of each sequence whose states will be read.

    `response_predictors` are the rows i whose next token, i+1 of the same document, is a response token: all that
    alignment under the shifted contract reads. `response` are the rows of response tokens themselves. `all` is every
    row that is not padding.
    """
    classes = _classes(positions)
    wanted_BL = torch.zeros_like(batch.response_BL)
    if "all" in classes:
        wanted_BL |= batch.document_BL >= 0
    if "response" in classes:
        wanted_BL |= batch.response_BL
    if "response_predictors" in classes:
        wanted_BL[:, :-1] |= batch.response_BL[:, 1:]
    return {key: _ranges(wanted_L) for key, wanted_L in zip(batch.sequence_keys, wanted_BL, strict=True)}


def kept_rows(batch: Batch, positions: Positions) -> dict[str, Ranges]:
    """Return the rows that are stored for such a need.

    Predictors and response tokens differ by one row a document, so both are kept whoever asks for either: another cell
    that reads the other ones later then finds them, instead of every layer of the chunk being computed again.
    """
    return needed_rows(batch, "all" if "all" in _classes(positions) else ("response_predictors", "response"))


def _classes(positions: Positions) -> frozenset[str]:
    return frozenset((positions,) if isinstance(positions, str) else positions)


def _ranges(wanted_L: Tensor) -> Ranges:
    edges = torch.nn.functional.pad(wanted_L.to(torch.int8), (1, 1)).diff()
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


class AnchorStore:
    """Hidden states of one teacher below one directory; one safetensors chunk per sequence.

    A chunk holds some rows of some layers. Layers can be added later; a chunk that is damaged counts as missing. Files
    appear whole or not at all, and the checksum of a tensor is compared when a store object first reads it.

    Args:
        root: directory; made by the first write.
        teacher_identity: SHA-256 of the frozen model (and of its compute precision).
        dtype: stored precision; `fp8` and `int8` with a scale per row, for cosines only.
        attention: attention mode the teacher ran in.
    """

    def __init__(self, root: Path | str, teacher_identity: str, dtype: str = "bf16", attention: str = "causal") -> None:
        assert dtype in anchor_codec.STORED_DTYPE, dtype
        self.files = AnchorFiles(Path(root), teacher_identity, dtype, attention)
        self._trusted: dict[str, frozenset[str]] = {}
        self._layer_sets: dict[frozenset[str], frozenset[str]] = {}

    # -- asking -----------------------------------------------------------------------------------------------------

    @staticmethod
    def estimate(num_sequences: int, length: int, hidden: int, layers: Sequence[str], dtype: str = "bf16") -> int:
        """Return bytes on disk for `length` stored rows a sequence (64 layers of 100,000 x 1,024 x 5,120: 67 TB)."""
        return anchor_files.estimate_bytes(num_sequences * length, num_sequences, hidden, len(layers), dtype)

    def missing(
        self, keys: Sequence[str], layers: Sequence[str], rows: Mapping[str, Ranges] | None = None
    ) -> list[str]:
        """Return the keys that lack a layer or a row, or whose chunk is absent or damaged.

        Args:
            keys: sequence keys.
            layers: layers that will be read.
            rows: rows that will be read, from `needed_rows`; None means that any will do.

        Raises:
            StoreError: a chunk belongs to another teacher, attention mode or precision.
        """
        needed = {key: rows[key] if rows is not None else () for key in keys}
        return self.files.missing(needed, layers)

    # -- writing ----------------------------------------------------------------------------------------------------

    def write(
        self, key: str, states: Mapping[str, Tensor], rows: Ranges | None = None, *, seconds: float = 0.0
    ) -> None:
        """Add layers of one sequence to the store.

        What the chunk holds already stays, as long as the new rows are among its rows; otherwise the chunk is written
        anew with the rows of both, and keeps of its old layers only those in `states`.

        Args:
            key: sequence key.
            states: layer -> states of *all* rows, [L, D].
            rows: rows to keep; None keeps all.
            seconds: what computing them cost.

        Raises:
            StoreError: the existing chunk belongs to something else.
        """
        length = next(iter(states.values())).shape[0]
        wanted = ((0, length),) if rows is None else rows
        with self._lock():
            old = self.files.header(key)
            kept: dict[str, Tensor] = {}
            if old is not None and anchor_files.covers(old.rows, wanted):
                wanted = old.rows
                kept = self._read_raw(key, [layer for layer in old.layers if layer not in states])
                seconds = max(seconds, old.seconds)  # one forward gives all layers at once
            elif old is not None:
                wanted = anchor_files.normalise_ranges([*old.rows, *wanted])
            index_R = _positions(wanted)
            for layer, states_LD in states.items():
                kept |= anchor_codec.encode(layer, states_LD[index_R.to(states_LD.device)], self.files.dtype)
            header = ChunkHeader(
                key=key,
                teacher=self.files.teacher,
                attention=self.files.attention,
                dtype=self.files.dtype,
                length=length,
                rows=wanted,
                layers=tuple(name for name in kept if not name.endswith(SCALE_SUFFIX)),
                checksums={name: _checksum(tensor) for name, tensor in kept.items()},
                seconds=seconds,
            )
            self._replace(self.files.path(key), save(kept, header.metadata()))
            self._trusted.pop(key, None)

    def _read_raw(self, key: str, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors of layers as stored; none at all when the chunk turns out damaged."""
        names = [name for layer in layers for name in self._names(layer)]
        try:
            with self._open(key) as (chunk, header):
                return {name: self._tensor(chunk, header, name, verify=True).clone() for name in names}
        except StoreError:
            return {}

    def _replace(self, target: Path, content: bytes) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Let one process at a time read, merge and replace a chunk."""
        self.files.root.mkdir(parents=True, exist_ok=True)
        with (self.files.root / ".lock").open("a") as handle:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(self, keys: Sequence[str], layers: Sequence[str]) -> dict[str, Tensor]:
        """Return layer -> states [B, L, D]; NaN where a row is not stored, so that it cannot pass for a state.

        Raises:
            StoreError: a chunk or layer is missing, damaged, or belongs to something else.
        """
        found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        for key in keys:
            with self._open(key) as (chunk, header):
                index_R = _positions(header.rows)
                for layer, stored_RD, scale_R in self._stored(chunk, header, layers):
                    states_RD = anchor_codec.decode(stored_RD, scale_R)
                    states_LD = states_RD.new_full((header.length, states_RD.shape[1]), torch.nan)
                    found[layer].append(states_LD.index_copy_(0, index_R, states_RD))
        return {layer: torch.stack(states) for layer, states in found.items()}

    def gather(self, keys: Sequence[str], layers: Sequence[str], rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return layer -> states [M, D] of chosen rows, sequence after sequence, reading nothing else.

        Args:
            keys: sequence keys.
            layers: layers.
            rows: for each key the positions wanted, 1-D int64 (possibly empty); M is their total number.

        Returns:
            bf16 or fp32 as stored; fp32 from an fp8 or int8 store. On CPU.

        Raises:
            StoreError: a chunk, layer or row is missing, damaged, or belongs to something else.
        """
        found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        for key, rows_M in zip(keys, rows, strict=True):
            with self._open(key) as (chunk, header):
                index_M = _stored_index(header, rows_M.to("cpu"))
                for layer, stored_RD, scale_R in self._stored(chunk, header, layers):
                    picked_MD = anchor_codec.select(stored_RD, index_M)
                    scale_M = None if scale_R is None else scale_R.index_select(0, index_M)
                    found[layer].append(anchor_codec.decode(picked_MD, scale_M))
        return {layer: torch.cat(states) for layer, states in found.items()}

    @contextmanager
    def _open(self, key: str) -> Iterator[tuple[safe_open, ChunkHeader]]:
        path = self.files.path(key)
        if not path.exists():
            raise StoreError(
                f"The anchors of sequence {key[:12]} are not in {self.files.root}.",
                "Run again with the same settings: what is missing is computed.",
            )
        try:
            chunk = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise self._damaged(key, str(error)) from error
        except OSError as error:
            raise StoreError(f"Cannot read {path}: {error}.", "Make it readable, then run again.") from error
        with chunk:
            # the header of the file that is open, not of one that may have replaced it since
            header = anchor_files.parse_header(chunk.metadata() or {}, chunk.keys())
            if header is None:
                raise self._damaged(key, "its header is of another format")
            self.files.check(header, key)
            yield chunk, header

    def _stored(
        self, chunk: safe_open, header: ChunkHeader, layers: Sequence[str]
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yield (layer, stored rows [R, D], scales [R] or None), comparing checksums the first time."""
        wanted = frozenset(layers)
        trusted = self._trusted.get(header.key, frozenset())
        for layer in layers:
            if layer not in header.layers:
                raise StoreError(
                    f"The anchors of sequence {header.key[:12]} hold layers {', '.join(header.layers)}, not '{layer}'.",
                    "Run again with the same settings: missing layers are added.",
                )
            verify = layer not in trusted
            tensors = [self._tensor(chunk, header, name, verify=verify) for name in self._names(layer)]
            yield layer, tensors[0], tensors[1] if len(tensors) > 1 else None
        if not wanted <= trusted:
            both = wanted | trusted
            self._trusted[header.key] = self._layer_sets.setdefault(both, both)

    def _tensor(self, chunk: safe_open, header: ChunkHeader, name: str, *, verify: bool) -> Tensor:
        tensor: Tensor = chunk.get_tensor(name)
        if verify and _checksum(tensor) != header.checksums.get(name):
            raise self._damaged(header.key, f"the checksum of '{name}' differs")
        return tensor

    def _names(self, layer: str) -> list[str]:
        return [layer, layer + SCALE_SUFFIX] if self.files.dtype in SCALED else [layer]

    def _damaged(self, key: str, reason: str) -> StoreError:
        """Take a damaged chunk out of the store, so that the next run computes it anew."""
        with contextlib.suppress(OSError):
            self.files.path(key).unlink(missing_ok=True)
        self._trusted.pop(key, None)
        return StoreError(
            f"The anchors of sequence {key[:12]} in {self.files.root} are damaged ({reason}) and were removed.",
            "Run again with the same settings: they are computed anew.",
        )


def _positions(ranges: Ranges) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in ranges] or [torch.arange(0)])


def _stored_index(header: ChunkHeader, rows_M: Tensor) -> Tensor:
    """Return where positions lie among the stored rows."""
    index_M = torch.full_like(rows_M, -1)
    before = 0
    for start, stop in header.rows:
        inside_M = (rows_M >= start) & (rows_M < stop)
        index_M[inside_M] = rows_M[inside_M] - start + before
        before += stop - start
    if bool((index_M < 0).any()):
        absent = int(rows_M[index_M < 0][0])
        raise StoreError(
            f"The anchors of sequence {header.key[:12]} hold rows {_spoken(header.rows)}, but row {absent} is read.",
            "The cell must ask for anchors at positions 'all', or the store was made for another prompt length.",
        )
    return index_M


def _spoken(ranges: Ranges) -> str:
    return ", ".join(f"{start}..{stop - 1}" for start, stop in ranges)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data) if tensor.numel() else 0
