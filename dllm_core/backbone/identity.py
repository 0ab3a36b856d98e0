"""Names for weights that depend on their content alone. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dllm_core.backbone.sources import read_config, tokenizer_files, weight_files

_VOLATILE = {"transformers_version", "_name_or_path"}


def model_identity(directory: Path | str, *, memo: Path | None = None) -> str:
    """Return the SHA-256 (hex) of a model directory's config and weights.

    The directory's name, file dates and the transformers version that wrote it do not matter.

    Args:
        directory: config.json and weights.
        memo: JSON file in which hashes of unchanged files (path, size, modification time) are remembered.

    Raises:
        UnsupportedModelError: there is no readable config.json.
    """
    path = Path(directory)
    config = {k: v for k, v in read_config(path).items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    known = _read_memo(memo)
    for file in weight_files(path):
        digest.update(f"{file.name}:{_file_hash(file, known)}".encode())
    _write_memo(memo, known)
    return digest.hexdigest()


def tokenizer_identity(directory: Path | str) -> str:
    """Return the SHA-256 (hex) of a model directory's tokenizer files."""
    digest = hashlib.sha256()
    for file in tokenizer_files(directory):
        digest.update(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def _file_hash(file: Path, known: dict[str, Any]) -> str:
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    entry = known.get(str(file.resolve()))
    if entry and entry[:2] == stamp:
        return str(entry[2])
    with file.open("rb") as stream:
        value = hashlib.file_digest(stream, "sha256").hexdigest()
    known[str(file.resolve())] = [*stamp, value]
    return value


def _read_memo(memo: Path | None) -> dict[str, Any]:
    if memo is None or not memo.is_file():
        return {}
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_memo(memo: Path | None, known: dict[str, Any]) -> None:
    if memo is None:
        return
    partial = memo.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(known, indent=1), encoding="utf-8")
    partial.replace(memo)
