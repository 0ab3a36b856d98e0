"""What acceptance rules read off a distribution, without keeping it. See `reference.stats`."""

from __future__ import annotations

from dllm_core.kernels.dispatch import choose
from dllm_core.kernels.token_stats.reference import TokenStats, stats


def implementation() -> tuple[str, str]:
    """Return (name, reason) of the implementation that `stats` runs."""
    return choose("token_stats", ("reference",))


__all__ = ["TokenStats", "implementation", "stats"]
