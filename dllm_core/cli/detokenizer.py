"""Tokens to text, a stretch at a time. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"


class Detokenizer:
    """Decodes stretches of a text as they read inside it.

    Decoders treat the beginning of a text differently (some drop the space before the first word), so every stretch is
    decoded behind a token that is cut off again. Special tokens are left out.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._skip = len(self._decode(self._before))

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a stretch."""
        return self._decode([*self._before, *ids])[self._skip :]

    def pieces(self, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
        """Return the text of a stretch, cut before the tokens at `cuts`; the pieces joined are `text(ids)`.

        A character whose bytes lie in several tokens goes to the piece in which it ends.

        Args:
            ids: of the stretch.
            cuts: places in it, ascending.
        """
        whole, start, pieces = self.text(ids), 0, []
        for cut in cuts:
            before = self.text(ids[:cut]).rstrip(_BROKEN)
            stop = max(start, len(before)) if whole.startswith(before) else start
            pieces.append(whole[start:stop])
            start = stop
        return [*pieces, whole[start:]]
