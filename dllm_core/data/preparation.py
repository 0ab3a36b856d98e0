"""Records to a training set and a held-out set: split by document, tokenise, lay out, cap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from dllm_core.data.encoding import Document, bos_of, byte_lengths, encode
from dllm_core.data.layout import Rows, cut_windows, pack_documents, pad_pairs
from dllm_core.data.order import SampleOrder
from dllm_core.data.records import Kind, Record
from dllm_core.data.sequences import SequenceSet
from dllm_core.data.split import split_records
from dllm_core.errors import DataError

CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer's mean on prose or code: a stream that is read until it holds so many characters suffices."""


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """How documents become sequences; mirrors `data:` of a grid's settings.

    Attributes:
        layout: `windows` (prompt/response records: one padded pair a row) or `pack`.
        prompt_tokens: given tokens of a window or pair.
        response_tokens: scored tokens of a window or pair.
        sequence_length: tokens of a packed row.
        train_sequences: cap on the training set, None for all.
        heldout_sequences: cap on the held-out set.
        heldout_fraction: part of the documents that is held out.
        split_seed: draws the held-out documents and what a cap keeps.
    """

    layout: Literal["windows", "pack"] = "windows"
    prompt_tokens: int = 32
    response_tokens: int = 128
    sequence_length: int | None = None
    train_sequences: int | None = None
    heldout_sequences: int = 64
    heldout_fraction: float = 0.1
    split_seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of a row."""
        if self.layout == "pack":
            assert self.sequence_length is not None, "packing needs a sequence length"
            return self.sequence_length
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class PreparedData:
    """What came of a source.

    Attributes:
        train: training sequences, after the cap.
        heldout: held-out sequences, after the cap; any first part of them is a fair sample.
        kind: kind of the records.
        num_documents: records read.
        num_tokens: tokens of all documents.
        num_truncated: documents that lost tokens to a row's length (prompt/response records only).
        train_available: training sequences before the cap.
        heldout_available: held-out sequences before the cap.
    """

    train: SequenceSet
    heldout: SequenceSet
    kind: Kind
    num_documents: int
    num_tokens: int
    num_truncated: int
    train_available: int
    heldout_available: int


def take_enough(records: Iterable[Record], settings: LayoutSettings) -> list[Record]:
    """Read a stream that may never end only as far as the caps need; without a cap on training it is read whole."""
    taken: list[Record] = []
    rows = 0.0
    for record in records:
        taken.append(record)
        rows += len(record.text) / (CHARACTERS_PER_TOKEN * settings.length) if record.text is not None else 1.0
        if settings.train_sequences is None:
            continue
        enough_train = rows * (1 - settings.heldout_fraction) >= settings.train_sequences
        if enough_train and rows * settings.heldout_fraction >= settings.heldout_sequences and len(taken) > 1:
            break
    return taken


def prepare_sequences(
    records: Sequence[Record],
    tokenizer: Any,
    settings: LayoutSettings,
    *,
    num_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> PreparedData:
    """Split, tokenise and lay out records.

    Args:
        records: all of one kind.
        tokenizer: of transformers.
        settings: layout, split and caps.
        num_tokens: ids below it are the tokenizer's (mask and padding rows of the model lie above).
        on_progress: called with (documents tokenised, documents in all).

    Raises:
        DataError: records of several kinds, fewer than two documents, no document as long as a window, or a token
            outside the model's vocabulary.
    """
    kinds = {record.kind: record.document_id for record in reversed(records)}
    if len(kinds) > 1:
        raise DataError(
            f"The data mixes {' and '.join(f'{kind} ({name})' for kind, name in sorted(kinds.items()))}.",
            "Give records of one kind.",
        )
    sides = split_records(records, heldout_fraction=settings.heldout_fraction, seed=settings.split_seed)
    lengths_V = byte_lengths(tokenizer, num_tokens)
    total = sum(len(side) for side in sides)
    sets, tokens, truncated, before = [], 0, 0, 0
    for side, part in zip(sides, ("", "held-out "), strict=True):
        report = _shifted(on_progress, before, total)
        documents = list(encode(side, tokenizer, report, close_text=settings.layout == "pack"))
        _check_ids(documents, num_tokens)
        rows = _lay_out(documents, tokenizer, settings, kind=next(iter(kinds)), part=part)
        sets.append(rows.sequence_set(lengths_V))
        tokens += sum(len(document.ids_T) for document in documents)
        truncated += rows.num_truncated
        before += len(side)
    train, heldout = sets
    counted = replace(train, text_counts_V=train.token_counts)
    return PreparedData(
        train=_capped(counted, settings.train_sequences, settings.split_seed),
        heldout=_capped(heldout, settings.heldout_sequences, settings.split_seed),
        kind=next(iter(kinds)),
        num_documents=len(records),
        num_tokens=tokens,
        num_truncated=truncated,
        train_available=len(train),
        heldout_available=len(heldout),
    )


def _shifted(
    on_progress: Callable[[int, int], None] | None, before: int, total: int
) -> Callable[[int, int], None] | None:
    return None if on_progress is None else lambda done, _: on_progress(before + done, total)


def _check_ids(documents: list[Document], num_tokens: int) -> None:
    largest = max((int(d.ids_T.max()) for d in documents if len(d.ids_T)), default=-1)
    if largest >= num_tokens:
        raise DataError(
            f"The tokenizer gives id {largest}, but the model has {num_tokens} tokens.",
            "Use the tokenizer that belongs to the model.",
        )


def _lay_out(documents: list[Document], tokenizer: Any, settings: LayoutSettings, *, kind: Kind, part: str) -> Rows:
    bos_id = bos_of(tokenizer) if kind != "messages" else None  # a chat template writes its own
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    if settings.layout == "pack":
        return pack_documents(documents, length=settings.length, bos_id=bos_id, pad_id=pad_id)
    sizes = {"prompt_tokens": settings.prompt_tokens, "response_tokens": settings.response_tokens}
    if kind == "text":
        return cut_windows(documents, **sizes, bos_id=bos_id, part=part)
    return pad_pairs(documents, **sizes, bos_id=bos_id, pad_id=pad_id)


def _capped(sequences: SequenceSet, limit: int | None, seed: int) -> SequenceSet:
    """Return at most `limit` rows, drawn over all documents; a smaller limit keeps a first part of a larger one's."""
    order = SampleOrder(sequences.num_sequences, seed)
    count = min(limit or sequences.num_sequences, sequences.num_sequences)
    return sequences.select([order[i][0] for i in range(count)])


def unigram_nats(train_counts_V: Tensor, heldout_counts_V: Tensor) -> float:
    """Return the mean -log p in nats of held-out response tokens under add-one smoothed training frequencies.

    The floor that every trained row must beat. Both count vectors are int64 [V].
    """
    counts_V = train_counts_V.double()
    nll_V = (counts_V.sum() + len(counts_V)).log() - (counts_V + 1).log()
    return float((nll_V * heldout_counts_V).sum() / heldout_counts_V.sum())
