"""Is the text there and readable? Reads it as the data step will, before any compute; tokenises nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dllm_core.data.records import read_records, require_hub_reader
from dllm_core.errors import DataError
from params.schema import DataSpec

SCAN_BYTES = 256_000_000
"""Text is read this far; what lies beyond is checked when it is tokenised."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What is known of the text before it is tokenised.

    Attributes:
        source: as the user named it.
        documents: records found (`max_documents` at most); None when unknown (a hub data set).
        num_bytes: UTF-8 bytes of their text; None when unknown.
        longest_bytes: of the longest of them; None when unknown.
        kind: `text`, `prompt+response` or `messages`, of the first record; None when unknown.
        complete: False when only the first `SCAN_BYTES` were read.
    """

    source: str
    documents: int | None = None
    num_bytes: int | None = None
    longest_bytes: int | None = None
    kind: str | None = None
    complete: bool = True


def check_data(spec: DataSpec) -> DataFacts:
    """Find the text and look through it.

    A hub data set is not touched: asking the hub takes seconds, and its first record is the data step's first act.

    Raises:
        DataError: nothing there, empty, binary, not UTF-8, a broken line, missing fields, or
            documents that are certainly shorter than one window.
        MissingExtraError: a package that holds or reads the text is not installed.
    """
    if spec.source.startswith("hf:"):
        require_hub_reader(spec.source)
        name = spec.source.removeprefix("hf:").partition(":")[0]
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise DataError(f"There is no directory '{name}' (from {spec.source}).", "Check the path.")
        return DataFacts(source=spec.source)
    fields: Mapping[str, str] = {str(ours): theirs for ours, theirs in spec.fields.items()}
    documents = total = longest = 0
    kind: str | None = None
    for record in read_records(spec.source, fields=fields, max_documents=spec.max_documents):
        size = record.num_bytes
        kind = kind or record.kind
        documents += 1
        total += size
        longest = max(longest, size)
        if total > SCAN_BYTES:
            break
    facts = DataFacts(
        source=spec.source,
        documents=documents,
        num_bytes=total,
        longest_bytes=longest,
        kind=kind,
        complete=total <= SCAN_BYTES,
    )
    _check_length(facts, spec)
    return facts


def _check_length(facts: DataFacts, spec: DataSpec) -> None:
    """A token is at least one byte, so a document of fewer bytes than a window has tokens cannot hold one."""
    if (
        spec.layout == "windows"
        and facts.kind == "text"
        and facts.complete
        and (facts.longest_bytes or 0) < spec.length
    ):
        raise DataError(
            f"The longest document of '{spec.source}' has {facts.longest_bytes} bytes, "
            f"less than one window of {spec.length} tokens.",
            "Use longer documents, or smaller data.prompt_tokens and data.response_tokens, or data.layout=pack.",
        )
