"""Where anchors lie, how big they are and what is there already.

Imports no torch: dry runs estimate, and cache hits look whether chunks are there, before anything heavy is loaded.

An anchor is a frozen-teacher hidden state. One safetensors chunk per sequence holds, per layer, the states of some
rows (positions); which rows is written as ranges, `((31, 159),)` for the rows that predict tokens 32..159.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dllm_core.errors import ResourceError, StoreError

FORMAT_VERSION = 1
METADATA_KEY = "anchor"
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1}
SCALED = frozenset({"fp8", "int8"})
SCALE_SUFFIX = ".scale"
SCALE_BYTES = 4
HEADER_BYTES_PER_TENSOR = 120
DISK_RESERVE_BYTES = 1 << 30

Ranges = tuple[tuple[int, int], ...]
"""Half-open, ascending, disjoint, not touching."""


def normalise_ranges(ranges: Iterable[Sequence[int]]) -> Ranges:
    """Return ranges sorted, with those that overlap or touch joined and empty ones left out."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted((int(a), int(b)) for a, b in ranges if b > a):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return tuple(joined)


def covers(stored: Ranges, needed: Ranges) -> bool:
    """Return whether every needed row is stored."""
    return all(any(a <= start and stop <= b for a, b in stored) for start, stop in needed)


def num_rows(ranges: Ranges) -> int:
    """Return how many rows the ranges hold."""
    return sum(stop - start for start, stop in ranges)


def estimate_bytes(num_rows: int, num_sequences: int, hidden: int, num_layers: int, dtype: str) -> int:
    """Return the size on disk of anchors.

    Args:
        num_rows: stored rows of all sequences together.
        num_sequences: chunks.
        hidden: width of a state.
        num_layers: layers kept.
        dtype: `fp32`, `bf16`, `fp8` or `int8`; the latter two add a scale per row and layer.
    """
    per_row = hidden * ELEMENT_BYTES[dtype] + (SCALE_BYTES if dtype in SCALED else 0)
    tensors = num_layers * (2 if dtype in SCALED else 1)
    return num_rows * num_layers * per_row + num_sequences * tensors * HEADER_BYTES_PER_TENSOR


def readable_bytes(count: float) -> str:
    """Return a byte count for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def free_bytes(directory: Path) -> int:
    """Return the free space of the disk that holds `directory`, which need not exist yet."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_disk(directory: Path, num_bytes: int) -> None:
    """Refuse anchors that the disk cannot hold (one gibibyte is left free).

    Raises:
        ResourceError: too little disk.
    """
    free = free_bytes(directory)
    if num_bytes + DISK_RESERVE_BYTES > free:
        raise ResourceError(
            f"The anchors need {readable_bytes(num_bytes)} and {readable_bytes(DISK_RESERVE_BYTES)} that stay free, "
            f"the disk of {directory} has {readable_bytes(free)} free.",
            "Use fewer layers (layers: quarters), fewer training sequences, anchors.dtype=int8, or a larger disk.",
        )


def require_dtype_serves(dtype: str, positions: str) -> None:
    """Refuse an 8-bit store for uses that need more of a state than its direction.

    Raises:
        StoreError: fp8 or int8 asked for with other rows than `response_predictors`, the ones alignment reads.
    """
    if dtype in SCALED and positions != "response_predictors":
        raise StoreError(
            f"Anchors in {dtype} keep a state's direction only, but a cell of this grid reconstructs the states.",
            "Set anchors.dtype=bf16 (or fp32); fp8 and int8 serve repr_align alone.",
        )


@dataclass(frozen=True)
class ChunkHeader:
    """What a chunk says of itself.

    Attributes:
        key: sequence key.
        teacher: identity of the frozen model.
        attention: attention mode the teacher ran in.
        dtype: stored precision.
        length: tokens of the sequence.
        rows: stored positions.
        layers: stored layers, without scales.
        checksums: CRC-32 per tensor.
        seconds: what computing the chunk from nothing costs, the sequence's share of its batches.
    """

    key: str
    teacher: str
    attention: str
    dtype: str
    length: int
    rows: Ranges
    layers: tuple[str, ...]
    checksums: dict[str, int]
    seconds: float

    def metadata(self) -> dict[str, str]:
        """Return the header as safetensors metadata: one entry, since safetensors writes several in random order."""
        told = {"format_version": FORMAT_VERSION, **asdict(self)}
        del told["layers"]
        return {METADATA_KEY: json.dumps(told, sort_keys=True)}


def parse_header(metadata: Mapping[str, str], names: Iterable[str]) -> ChunkHeader | None:
    """Return the header told by a chunk's metadata and tensor names, None when it is none of this format."""
    try:
        told = json.loads(metadata[METADATA_KEY])
        if told.pop("format_version") != FORMAT_VERSION:
            return None
        told["rows"] = normalise_ranges(told["rows"])
        return ChunkHeader(**told, layers=tuple(name for name in names if not name.endswith(SCALE_SUFFIX)))
    except (ValueError, KeyError, TypeError):
        return None


def read_header(path: Path) -> ChunkHeader | None:
    """Return the header of a chunk, None when the file is damaged (cut short, not safetensors, another format).

    Raises:
        FileNotFoundError: no such chunk.
    """
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start = handle.read(8)
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or header_bytes > size - 8:
            return None
        raw = handle.read(header_bytes)
    try:
        tensors = json.loads(raw)
        metadata = tensors.pop("__metadata__")
        if size != 8 + header_bytes + max(tensor["data_offsets"][1] for tensor in tensors.values()):
            return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return parse_header(metadata, tensors)


@dataclass(frozen=True)
class AnchorFiles:
    """The chunks below one directory, all of one teacher, attention mode and precision.

    Attributes:
        root: directory; made by the first write.
        teacher: identity of the frozen model (weights, config and compute precision).
        dtype: stored precision.
        attention: attention mode the teacher ran in.
    """

    root: Path
    teacher: str
    dtype: str = "bf16"
    attention: str = "causal"

    def path(self, key: str) -> Path:
        """Return where the chunk of a sequence lies or would lie."""
        return self.root / key[:2] / f"{key}.safetensors"

    def header(self, key: str) -> ChunkHeader | None:
        """Return a chunk's header, None when it is absent or damaged.

        Raises:
            StoreError: it belongs to another teacher, attention mode, precision or sequence.
        """
        try:
            header = read_header(self.path(key))
        except FileNotFoundError:
            return None
        if header is not None:
            self.check(header, key)
        return header

    def missing(self, needed: Mapping[str, Ranges], layers: Iterable[str]) -> list[str]:
        """Return the keys whose chunk is absent, damaged, or lacks a layer or a row.

        Args:
            needed: sequence key -> rows that will be read.
            layers: layers that will be read.

        Raises:
            StoreError: a chunk belongs to another teacher, attention mode, precision or sequence.
        """
        wanted = set(layers)
        absent = []
        for key, rows in needed.items():
            header = self.header(key)
            if header is None or not wanted <= set(header.layers) or not covers(header.rows, rows):
                absent.append(key)
        return absent

    def seconds(self, keys: Iterable[str]) -> float:
        """Return what computing these chunks from nothing costs, whoever paid for it."""
        return sum(header.seconds for key in keys if (header := self.header(key)) is not None)

    def check(self, header: ChunkHeader, key: str) -> None:
        """Raise unless a chunk is of this store and sequence.

        Raises:
            StoreError: it belongs to another teacher, attention mode, precision or sequence.
        """
        pairs = {
            "key": (header.key, key),
            "teacher": (header.teacher, self.teacher),
            "attention": (header.attention, self.attention),
            "dtype": (header.dtype, self.dtype),
        }
        for name, (found, wanted) in pairs.items():
            if found != wanted:
                raise StoreError(
                    f"The anchors in {self.root} have {name} '{found}', but '{wanted}' was asked for.",
                    "Use another directory for these anchors, or delete this one.",
                )
