"""What enters the losses of `token_losses`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """Settings that every chunk shares.

    Attributes:
        entropy: the entropy term is in.
        temperature: of the entropy, > 0.
        blocked_V: bool; ids whose logit is -inf.
        gradient: of the logits is wanted.
    """

    entropy: bool
    temperature: float
    blocked_V: Tensor | None
    gradient: bool
