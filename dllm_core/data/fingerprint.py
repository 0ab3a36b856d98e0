"""A hash of what a source says, so that results follow the text and not its path. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dllm_core.data.records import source_files

HASHED_BYTES = 2_000_000_000
"""Larger sources are told apart by names, sizes and modification times: reading them would cost minutes a run."""


def source_fingerprint(source: str) -> str:
    """Return a SHA-256 over names and contents of a source's files.

    A data set of the hub cannot be hashed without reading it: its name stands for it, whatever the hub holds under
    that name later. One in a local directory (`hf:DIRECTORY`) goes by its files like any other source.

    Args:
        source: as for `records.read_records`.

    Raises:
        DataError, MissingExtraError: as `records.source_files`.
    """
    digest = hashlib.sha256()
    if source.startswith("hf:"):
        name, _, config = source.removeprefix("hf:").partition(":")
        root = Path(name)
        if not root.is_dir():
            return hashlib.sha256(source.encode()).hexdigest()
        digest.update(f"hf:{config}\n".encode())
        files = sorted(file for file in root.rglob("*") if file.is_file())
    else:
        root, files = source_files(source)
    stats = [path.stat() for path in files]
    by_content = sum(stat.st_size for stat in stats) <= HASHED_BYTES
    for path, stat in zip(files, stats, strict=True):
        told = _content_hash(path) if by_content else f"{stat.st_size}/{stat.st_mtime_ns}"
        digest.update(f"{path.relative_to(root).as_posix()}\0{told}\n".encode())
    return digest.hexdigest()


def _content_hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
