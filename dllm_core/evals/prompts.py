"""Prompts for generation, and the held-out text that really followed them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dllm_core.data.batch import Batch


@dataclass(frozen=True)
class Prompts:
    """What generation starts from.

    Attributes:
        ids: one 1-D int64 tensor a prompt.
        references: the held-out tokens after each prompt.
        sample_ids: the sequence each came from; keys the noise.
        groups: the document each came from, None where unknown; prompts of one document are not independent.
    """

    ids: tuple[Tensor, ...]
    references: tuple[Tensor, ...]
    sample_ids: tuple[int, ...]
    groups: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> Prompts:
        """Return prompts start..stop-1."""
        part = slice(start, stop)
        groups = None if self.groups is None else self.groups[part]
        return Prompts(self.ids[part], self.references[part], self.sample_ids[part], groups)


def prompts_of(batch: Batch, *, prompt_tokens: int, response_tokens: int, limit: int) -> Prompts:
    """Take the prompt of each sequence's first document, at most `limit` of them.

    A record's own prompt is used where it has one. Where all of a document but its first token is response (packed
    text), its first `prompt_tokens` tokens are the prompt. References are cut to `response_tokens`; sequences with
    nothing after the prompt are skipped.
    """
    ids: list[Tensor] = []
    references: list[Tensor] = []
    sample_ids: list[int] = []
    for row in range(len(batch)):
        if len(ids) == limit:
            break
        first_L = batch.document_BL[row] == 0
        tokens_T = batch.input_ids_BL[row][first_L].cpu()
        response_T = batch.response_BL[row][first_L].cpu()
        start = int(response_T.int().argmax()) if bool(response_T.any()) else len(tokens_T)
        if start <= 1:
            start = min(prompt_tokens, max(1, len(tokens_T) - 1))
        if start < len(tokens_T):
            ids.append(tokens_T[:start])
            references.append(tokens_T[start : start + response_tokens])
            sample_ids.append(batch.sample_ids[row])
    return Prompts(tuple(ids), tuple(references), tuple(sample_ids))
