"""Records to tokens, and tokens to bytes. V vocabulary, T tokens of a document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dllm_core.data.records import Record

_BATCH = 64


@dataclass(frozen=True)
class Document:
    """A tokenised record.

    Attributes:
        name: the record's.
        ids_T: token ids, int32, without anything added in front.
        response_start: tokens of the prompt; 0 for plain text, whose prompt the layout decides on.
    """

    name: str
    ids_T: Tensor
    response_start: int = 0


def bos_of(tokenizer: Any) -> int | None:
    """Return the id that the tokenizer puts before every text, None when it puts none (SmolLM2)."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    close_text: bool = False,
) -> Iterator[Document]:
    """Tokenise records, in order.

    Plain text is taken as it is. A prompt and its response are joined by a line break unless there is white space at
    the seam, and the response is closed by the end-of-sequence token where there is one. A conversation goes through
    the tokenizer's chat template: all turns before the assistant's last are the prompt. Without a template each turn is
    written `role: content` with a blank line after it, and the response is closed by the end-of-sequence token.

    Args:
        records: of one kind.
        tokenizer: of transformers.
        on_progress: called with (documents done, documents in all).
        close_text: put the end-of-sequence token after plain text, too (whole documents, not windows).
    """
    done = 0
    remaining = iter(records)
    while batch := list(islice(remaining, _BATCH)):
        pairs = [_prompt_and_response(record, tokenizer) for record in batch]
        prompts = _ids(tokenizer, [prompt for prompt, _, _ in pairs])
        responses = _ids(tokenizer, [response for _, response, _ in pairs])
        for record, prompt, response, (_, _, closed) in zip(batch, prompts, responses, pairs, strict=True):
            closed = closed and not (close_text and record.kind == "text")
            end = [] if closed or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            ids_T = torch.tensor([*prompt, *response, *end], dtype=torch.int32)
            yield Document(record.document_id, ids_T, len(prompt))
        done += len(batch)
        if on_progress:
            on_progress(done, len(records))


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def _prompt_and_response(record: Record, tokenizer: Any) -> tuple[str, str, bool]:
    """Return (prompt, response, whether nothing is to be added at its end)."""
    if record.text is not None:
        return "", record.text, True
    if record.messages is not None:
        return _conversation(record.messages, tokenizer)
    prompt, response = record.prompt or "", record.response or ""
    seam = "" if not prompt or prompt[-1:].isspace() or response[:1].isspace() else "\n"
    return prompt + seam, response, False


def _conversation(messages: Sequence[dict[str, str]], tokenizer: Any) -> tuple[str, str, bool]:
    *before, last = messages
    if getattr(tokenizer, "chat_template", None):
        prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
        if whole.startswith(prompt):
            response, end = whole[len(prompt) :], tokenizer.eos_token
            closed = end is not None and response.rstrip().endswith(end)
            # a template's line break after the end is no part of the answer
            return prompt, response.rstrip() if closed else response, True
        return prompt, last["content"], False  # a template that rewrites earlier turns when another follows
    prompt = "".join(f"{turn['role']}: {turn['content']}\n\n" for turn in before)
    return f"{prompt}{last['role']}: ", last["content"], False


def byte_lengths(tokenizer: Any, num_tokens: int) -> Tensor:
    """Return how many UTF-8 bytes of text each token stands for: int64 [num_tokens].

    Special tokens stand for none. Summed over the tokens of a text it gives the text's bytes, also where a character is
    divided between tokens, which decoding token by token would get wrong.
    """
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(num_tokens, len(tokenizer)))))
    byte_level = "ByteLevel" in _decoder_of(tokenizer)
    lengths_V = torch.zeros(num_tokens, dtype=torch.int64)
    for index, piece in enumerate(pieces):
        if piece is None or index in special:
            continue
        if index in added:
            lengths_V[index] = len(added[index].content.encode())
        elif byte_level:
            lengths_V[index] = len(piece)  # one letter of the byte alphabet a byte
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            lengths_V[index] = 1  # a byte that the vocabulary has no piece for
        else:
            lengths_V[index] = len(piece.replace("\u2581", " ").encode())
    return lengths_V


def _decoder_of(tokenizer: Any) -> str:
    """Return the description of a fast tokenizer's decoder, "" when it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    return json.dumps(json.loads(decoder.__getstate__())) if decoder is not None else ""
