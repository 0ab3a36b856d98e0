"""Token losses from hidden states, never holding all logits at once. See `reference.token_losses`."""

from __future__ import annotations

from dllm_core.kernels.dispatch import choose
from dllm_core.kernels.masked_ce.reference import TokenLosses, token_losses


def implementation() -> tuple[str, str]:
    """Return (name, reason) of the implementation that `token_losses` runs."""
    return choose("masked_ce", ("reference",))


__all__ = ["TokenLosses", "implementation", "token_losses"]
