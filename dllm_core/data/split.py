"""Which documents are held out. The split goes by document, never by window. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from dllm_core.data.records import Record
from dllm_core.errors import DataError


def split_records(
    records: Sequence[Record], *, heldout_fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Return (training records, held-out records), each in the given order.

    A document's side depends on its contents and the seed, so that file names and reading order do not matter and
    copies of one document stay on one side. A source that is one plain text is cut in two: its end is held out.

    Args:
        records: all records of a source.
        heldout_fraction: part of the documents that is held out, in (0, 1); at least one.
        seed: draws the held-out documents.

    Raises:
        DataError: fewer than two different documents.
    """
    if len(records) == 1 and records[0].text is not None:
        return _cut(records[0], heldout_fraction)
    draws = [_draw(record, seed) for record in records]
    ranked = sorted(set(draws))
    if len(ranked) < 2:
        raise DataError(
            f"The data holds {len(ranked)} document{'s' * (len(ranked) != 1)}, and whole documents are held out.",
            "Give at least two different documents.",
        )
    count = min(max(1, round(heldout_fraction * len(ranked))), len(ranked) - 1)
    heldout = set(ranked[:count])
    train = [record for record, draw in zip(records, draws, strict=True) if draw not in heldout]
    return train, [record for record, draw in zip(records, draws, strict=True) if draw in heldout]


def _draw(record: Record, seed: int) -> bytes:
    contents = repr((record.text, record.prompt, record.response, record.messages))
    return hashlib.blake2b(f"{seed}/split/{contents}".encode(errors="surrogatepass"), digest_size=16).digest()


def _cut(record: Record, heldout_fraction: float) -> tuple[list[Record], list[Record]]:
    """Cut a lone text at the last line break, or else space, of its training part."""
    text = record.text or ""
    limit = max(1, round(len(text) * (1 - heldout_fraction)))
    place = text.rfind("\n", limit // 2, limit) + 1 or text.rfind(" ", limit // 2, limit) + 1 or limit
    head = replace(record, document_id=f"{record.document_id} (beginning)", text=text[:place])
    tail = replace(record, document_id=f"{record.document_id} (end)", text=text[place:])
    return [head], [tail]
