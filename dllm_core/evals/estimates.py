"""Sums per held-out sequence, and what follows from them. Sequences are the independent units, tokens are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (None with fewer than two sequences)."""

    value: float
    se: float | None

    def as_json(self) -> dict[str, float | None]:
        """Return `{"value", "se"}`."""
        return {"value": self.value, "se": self.se}


@dataclass(frozen=True)
class SequenceSums:
    """A quantity summed over the scored tokens of each sequence; kept so that rows can be compared in pairs.

    Attributes:
        sums: one number a sequence: nats, or correct tokens.
        tokens: scored tokens of each sequence.
    """

    sums: tuple[float, ...]
    tokens: tuple[float, ...]

    @classmethod
    def of(cls, sums_N: Tensor, tokens_N: Tensor) -> SequenceSums:
        """Build from two vectors."""
        return cls(tuple(sums_N.double().tolist()), tuple(tokens_N.double().tolist()))

    def per_token(self) -> Estimate:
        """Return sum / tokens over all sequences, with the ratio estimator's standard error.

        se^2 = n / (n - 1) * sum_n (s_n - value * t_n)^2 / (sum_n t_n)^2, so it covers both the sampling of sequences
        and the Monte Carlo noise within each.
        """
        total = sum(self.tokens)
        if not total:
            return Estimate(math.nan, None)
        value = math.fsum(self.sums) / total
        n = len(self.sums)
        if n < 2:
            return Estimate(value, None)
        residuals = (s - value * t for s, t in zip(self.sums, self.tokens, strict=True))
        return Estimate(value, math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals)) / total)

    def bits_per_byte(self, num_bytes: Sequence[float]) -> float:
        """Return nats / ln 2 / bytes, where `num_bytes` counts the UTF-8 bytes of each sequence's scored tokens."""
        assert len(num_bytes) == len(self.sums)
        return math.fsum(self.sums) / math.log(2) / sum(num_bytes)

    def as_json(self, name: str = "nats") -> dict[str, Any]:
        """Return `{name: [...], "tokens": [...]}`."""
        return {name: list(self.sums), "tokens": list(self.tokens)}


def paired_difference(first: SequenceSums, second: SequenceSums) -> Estimate:
    """Return the per-token difference first - second of two rows scored on the same sequences with the same noise.

    Its standard error is usually far below that of either row, since what makes a sequence hard is common to both.
    """
    assert first.tokens == second.tokens, "rows were scored on different tokens"
    differences = tuple(a - b for a, b in zip(first.sums, second.sums, strict=True))
    return SequenceSums(differences, first.tokens).per_token()
