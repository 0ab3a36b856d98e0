"""Text with gaps: `The {{2}} of the union` has a gap of two tokens. L tokens of one row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dllm_core.errors import DllmError

if TYPE_CHECKING:
    from torch import Tensor

_GAP = re.compile(r"\{\{(\d+)\}\}")
MOST_TOKENS = 4096


@dataclass(frozen=True)
class Gapped:
    """A row with places to fill.

    Attributes:
        ids_L: int64; anything at the places.
        to_fill_L: bool; True at the places.
        gaps: (start, stop) of each.
        is_prompt: it is to be written on from: the one gap at its end holds at most so many tokens.
    """

    ids_L: Tensor
    to_fill_L: Tensor
    gaps: tuple[tuple[int, int], ...]
    is_prompt: bool = False


def row_of_prompt(prompt_P: Tensor, max_new_tokens: int) -> Gapped:
    """Return a prompt and the places behind it.

    Args:
        prompt_P: int64 ids.
        max_new_tokens: places.
    """
    import torch

    start, stop = len(prompt_P), len(prompt_P) + max_new_tokens
    ids_L = torch.nn.functional.pad(prompt_P, (0, max_new_tokens))
    return Gapped(ids_L, torch.arange(stop) >= start, ((start, stop),), is_prompt=True)


def split(text: str) -> list[str | int]:
    """Return pieces of text, and the tokens of the gaps between them; whatever is not `{{digits}}` is text.

    Raises:
        DllmError: no gap, or one of no tokens or too many.
    """
    parts: list[str | int] = []
    for i, part in enumerate(_GAP.split(text)):
        if i % 2:
            tokens = int(part)
            if not 1 <= tokens <= MOST_TOKENS:
                raise DllmError(f"The gap {{{{{part}}}}} has {part} tokens.", f"Give 1 to {MOST_TOKENS} tokens.")
            parts.append(tokens)
        elif part:
            parts.append(part)
    if not any(isinstance(part, int) for part in parts):
        raise DllmError(
            "The text has no gap to fill.", 'Write {{8}} where 8 tokens are missing: "The {{2}} of the union".'
        )
    return parts


def encode(parts: Sequence[str | int], tokenizer: Any) -> Gapped:
    """Tokenise text with gaps; BOS comes first where the tokenizer puts one.

    A space right before a gap is left to the gap: tokens of most models begin with the space before their word, so
    text that ends in a space would ask for a word without one.

    Args:
        parts: of `split`.
        tokenizer: of transformers.
    """
    import torch

    from dllm_core.data.encoding import bos_of

    bos = bos_of(tokenizer)
    ids, to_fill, gaps = ([] if bos is None else [bos]), [False] * (bos is not None), []
    for i, part in enumerate(parts):
        if isinstance(part, int):
            gaps.append((len(ids), len(ids) + part))
            ids += [0] * part
            to_fill += [True] * part
        else:
            before_gap = i + 1 < len(parts) and part.endswith(" ") and not part.isspace()
            found = tokenizer(part[:-1] if before_gap else part, add_special_tokens=False)["input_ids"]
            ids += found
            to_fill += [False] * len(found)
    return Gapped(torch.tensor(ids), torch.tensor(to_fill), tuple(gaps))
