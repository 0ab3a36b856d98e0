"""Documents to rows of one length. N rows, L length, T tokens of a document."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dllm_core.data.encoding import Document
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import DataError


@dataclass
class Rows:
    """Rows under construction, one tensor each per row.

    Attributes:
        ids: token ids, int32 [L].
        response: bool [L].
        document: int32 [L], -1 for padding.
        position: int32 [L].
        source: index into `names` of the document that most of the row's tokens come from.
        names: documents that rows were made of.
        num_truncated: documents of which something was cut off.
    """

    ids: list[Tensor] = field(default_factory=list)
    response: list[Tensor] = field(default_factory=list)
    document: list[Tensor] = field(default_factory=list)
    position: list[Tensor] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    num_truncated: int = 0

    def name(self, document: str) -> int:
        """Note a document that rows are made of; return its index."""
        self.names.append(document)
        return len(self.names) - 1

    def add(self, parts: Sequence[tuple[Document, int]], length: int, pad_id: int) -> None:
        """Append a row of (document, index of its name), padded to `length`; first tokens are never response tokens."""
        ids_L = torch.full((length,), pad_id, dtype=torch.int32)
        response_L = torch.zeros(length, dtype=torch.bool)
        document_L = torch.full((length,), -1, dtype=torch.int32)
        position_L = torch.zeros(length, dtype=torch.int32)
        start = 0
        tokens: Counter[int] = Counter()
        for index, (part, name) in enumerate(parts):
            tokens[name] += len(part.ids_T)
            stop = start + len(part.ids_T)
            ids_L[start:stop] = part.ids_T
            response_L[start + max(1, part.response_start) : stop] = True
            document_L[start:stop] = index
            position_L[start:stop] = torch.arange(stop - start, dtype=torch.int32)
            start = stop
        self.ids.append(ids_L)
        self.response.append(response_L)
        self.document.append(document_L)
        self.position.append(position_L)
        self.source.append(tokens.most_common(1)[0][0])

    def sequence_set(self, byte_lengths_V: Tensor) -> SequenceSet:
        """Return the rows as a set; bytes are those of the response tokens."""
        ids_NL, response_NL = torch.stack(self.ids), torch.stack(self.response)
        return SequenceSet(
            input_ids_NL=ids_NL,
            response_NL=response_NL,
            document_NL=torch.stack(self.document),
            position_NL=torch.stack(self.position),
            num_bytes_N=(byte_lengths_V[ids_NL.long()] * response_NL).sum(dim=1),
            num_tokens=len(byte_lengths_V),
            documents=tuple(self.names),
            source_N=torch.tensor(self.source, dtype=torch.int64),
        )


def cut_windows(
    documents: Iterable[Document], *, prompt_tokens: int, response_tokens: int, bos_id: int | None, part: str = ""
) -> Rows:
    """Cut windows of prompt + response inside documents: next to each other, not overlapping, the rest left out.

    Every window begins with a clean token: the tokenizer's BOS where it has one (it counts as one of the prompt's
    tokens), else the first prompt token.

    Args:
        documents: plain text.
        prompt_tokens: given tokens of a window, at least 1.
        response_tokens: scored tokens of a window.
        bos_id: put in front of every window; None puts nothing.
        part: which documents these are, for the error ("held-out ").

    Raises:
        DataError: every document is shorter than one window.
    """
    rows = Rows()
    front_T = torch.tensor([] if bos_id is None else [bos_id], dtype=torch.int32)
    stride = prompt_tokens + response_tokens - len(front_T)
    longest = 0
    for document in documents:
        longest = max(longest, len(document.ids_T))
        if len(document.ids_T) < stride:
            continue
        name = rows.name(document.name)
        for window_T in document.ids_T.unfold(0, stride, stride):
            window = Document(document.name, torch.cat([front_T, window_T]), prompt_tokens)
            rows.add([(window, name)], prompt_tokens + response_tokens, 0)
    if not rows.ids:
        raise DataError(
            f"Every {part}document is shorter than one window: the longest has {longest} tokens, a window "
            f"{stride} (data.prompt_tokens {prompt_tokens} + data.response_tokens {response_tokens}"
            f"{'' if bos_id is None else ', BOS included'}).",
            "Use longer documents, smaller data.prompt_tokens and data.response_tokens, or data.layout=pack.",
        )
    return rows


def pad_pairs(
    documents: Iterable[Document], *, prompt_tokens: int, response_tokens: int, bos_id: int | None, pad_id: int
) -> Rows:
    """Lay out one prompt with its response a row, padded at the end.

    A response keeps its first `response_tokens` tokens; a prompt its last tokens, as many as the row then has room for.
    Without a BOS the first token of an empty prompt's response stays clean.
    """
    rows = Rows()
    for document in documents:
        part, cut = _fit_pair(document, prompt_tokens + response_tokens, response_tokens, bos_id)
        if part is None:
            continue
        rows.num_truncated += cut
        rows.add([(part, rows.name(document.name))], prompt_tokens + response_tokens, pad_id)
    if not rows.ids:
        raise DataError("Every response is empty.", "Give records whose response holds text.")
    return rows


def _fit_pair(
    document: Document, length: int, response_tokens: int, bos_id: int | None
) -> tuple[Document | None, bool]:
    """Return (prompt + response of at most `length` tokens, whether anything was cut off)."""
    front_T = torch.tensor([] if bos_id is None else [bos_id], dtype=torch.int32)
    prompt_T, response_T = document.ids_T[: document.response_start], document.ids_T[document.response_start :]
    kept_T = response_T[:response_tokens]
    room = length - len(front_T) - len(kept_T)
    tail_T = prompt_T[max(0, len(prompt_T) - room) :] if room > 0 else prompt_T[:0]
    ids_T = torch.cat([front_T, tail_T, kept_T])
    start = len(front_T) + len(tail_T)
    if len(ids_T) <= max(1, start):
        return None, False
    return Document(document.name, ids_T, start), len(kept_T) + len(tail_T) < len(document.ids_T)


def pack_documents(documents: Iterable[Document], *, length: int, bos_id: int | None, pad_id: int) -> Rows:
    """Pack whole documents into rows; neither attention nor positions cross their boundaries.

    Plain text longer than a row is divided into pieces that are documents of their own; of a longer prompt and response
    the prompt's beginning, then the response's end is cut off. Documents go, longest first, into the row with the least
    room that still holds them (best fit decreasing: at most 11/9 of the fewest rows possible, plus one).

    Raises:
        DataError: no document has two tokens.
    """
    rows = Rows()
    parts: list[tuple[Document, int]] = []
    for document in documents:
        pieces, cut = _pieces(document, length, bos_id)
        rows.num_truncated += cut
        if pieces:
            name = rows.name(document.name)
            parts += [(piece, name) for piece in pieces]
    parts.sort(key=lambda part: -len(part[0].ids_T))
    contents: list[list[tuple[Document, int]]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for part in parts:
        size = len(part[0].ids_T)
        place = bisect_left(rooms, (size, 0))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = length, len(contents)
            contents.append([])
        contents[row].append(part)
        insort(rooms, (room - size, row))
    for row_parts in contents:
        rows.add(row_parts, length, pad_id)
    if not rows.ids:
        raise DataError("No document has two tokens: there is nothing to predict.", "Use longer documents.")
    return rows


def _pieces(document: Document, length: int, bos_id: int | None) -> tuple[list[Document], bool]:
    if document.response_start:
        part, cut = _fit_pair(document, length, length - 1, bos_id)
        return ([] if part is None else [part]), cut
    front_T = torch.tensor([] if bos_id is None else [bos_id], dtype=torch.int32)
    found = [torch.cat([front_T, piece_T]) for piece_T in document.ids_T.split(length - len(front_T))]
    return [replace(document, ids_T=ids_T) for ids_T in found if len(ids_T) > 1], False
