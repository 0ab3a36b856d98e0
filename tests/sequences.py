"""Small sequence sets for tests, made from random ids."""

from __future__ import annotations

import torch

from dllm_core.data.sequences import SequenceSet


def random_sequences(num: int, length: int, prompt: int, vocab: int, seed: int = 0) -> SequenceSet:
    """Return `num` plain rows of `length` random ids below `vocab`; the first `prompt` tokens are the prompt."""
    assert 1 <= prompt < length
    ids_NL = torch.randint(vocab, (num, length), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    position_NL = torch.arange(length, dtype=torch.int32).repeat(num, 1)
    return SequenceSet(
        input_ids_NL=ids_NL,
        response_NL=position_NL >= prompt,
        document_NL=torch.zeros_like(ids_NL),
        position_NL=position_NL,
        num_bytes_N=torch.full((num,), 4 * (length - prompt)),
        num_tokens=vocab,
    )


def packed_sequences(num: int, documents: tuple[int, ...], padding: int, vocab: int, seed: int = 0) -> SequenceSet:
    """Return rows that each hold documents of the given lengths, then padding; all but first tokens are response."""
    length = sum(documents) + padding
    plain = random_sequences(num, length, 1, vocab, seed)
    document_L = torch.cat([torch.full((n,), i) for i, n in enumerate(documents)] + [torch.full((padding,), -1)])
    position_L = torch.cat([torch.arange(n) for n in documents] + [torch.zeros(padding, dtype=torch.long)])
    document_NL = document_L.to(torch.int32).repeat(num, 1)
    position_NL = position_L.to(torch.int32).repeat(num, 1)
    ids_NL = plain.input_ids_NL.masked_fill(document_NL < 0, 0)
    response_NL = (document_NL >= 0) & (position_NL > 0)
    return SequenceSet(ids_NL, response_NL, document_NL, position_NL, 4 * response_NL.sum(1), vocab)
