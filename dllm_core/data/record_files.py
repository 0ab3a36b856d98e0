"""Reading one file: plain text, JSON lines, Parquet. Errors name the file and the line. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dllm_core.errors import DataError, MissingExtraError

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".utf8")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def read_file(path: Path) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield (line or row number from 1, fields) of a file; plain text is one `text` with number None.

    Raises:
        DataError: unknown kind of file, empty, binary, not UTF-8, a broken line.
        MissingExtraError: Parquet without pyarrow.
    """
    if path.suffix == ".jsonl":
        yield from _json_lines(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix in TEXT_SUFFIXES:
        yield None, {"text": text_of(path)}
    else:
        raise DataError(
            f"Data file '{path}' ends in '{path.suffix}'.", f"Allowed: {', '.join(SUFFIXES)}; rename or convert it."
        )


def text_of(path: Path) -> str:
    """Return the text of a UTF-8 file (a byte order mark is dropped).

    Raises:
        DataError: binary, or not UTF-8.
    """
    raw = _read_bytes(path)
    _refuse_binary(raw, path)
    return _decode(raw, path, "byte {}").removeprefix("\ufeff")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Data file '{path}' cannot be read ({error.strerror}).", "Make it readable.") from None


def _refuse_binary(raw: bytes, path: Path) -> None:
    if b"\0" in raw:
        raise DataError(f"Data file '{path}' is binary, not text.", "Give a UTF-8 .txt or .jsonl, or a .parquet file.")


def _decode(raw: bytes, path: Path, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"Data file '{path}' is not UTF-8 (0x{raw[error.start]:02x} at {where.format(error.start)}).",
            f"Convert it, e.g.: iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}",
        ) from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    remedy = "Each line has to be one JSON object; correct or delete that line."
    found = False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                _refuse_binary(line, path)
                text = _decode(line, path, f"line {number}").removeprefix("\ufeff")
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"'{path}' line {number} is not JSON: {error.msg} at column {error.colno}.", remedy
                    ) from None
                if not isinstance(row, dict):
                    raise DataError(f"'{path}' line {number} is a {type(row).__name__}, not an object.", remedy)
                found = True
                yield number, row
    except OSError as error:
        raise DataError(f"Data file '{path}' cannot be read ({error.strerror}).", "Make it readable.") from None
    if not found:
        raise DataError(f"Data file '{path}' is empty.", "Give a file with one JSON object a line.")


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if find_spec("pyarrow") is None:
        raise MissingExtraError(
            f"Data file '{path}' needs the package pyarrow, which is not installed.",
            "Run: pip install 'dllm-grid[data]'",
        )
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        cause = " ".join(str(error).split())[:120]
        raise DataError(f"Data file '{path}' is not readable Parquet: {cause}", "Write it again.") from error
    if not number:
        raise DataError(f"Data file '{path}' is empty.", "Give a file with rows.")
