"""Sums per held-out sequence, and what follows from them.

Documents are the independent units where they are known, else sequences; tokens never are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (None with fewer than two independent units)."""

    value: float
    se: float | None

    def as_json(self) -> dict[str, float | None]:
        """Return `{"value", "se"}`."""
        return {"value": self.value, "se": self.se}


def cluster_se(residuals: Sequence[float], groups: Sequence[int] | None, total: float) -> float | None:
    """Return the standard error of a ratio sum / total from each sequence's residual sum - value * weight.

    The linearised, cluster-robust form: se^2 = G / (G - 1) * sum_g (sum of the group's residuals)^2 / total^2 over the
    G groups. Each sequence is a group of its own without `groups`, which is the textbook ratio estimator. None below
    two groups. Few groups make it too small rather than too large.

    Args:
        residuals: one number a sequence.
        groups: which sequences belong together, such as the document each was cut from; None: none do.
        total: sum of all weights.
    """
    sums: dict[int, list[float]] = {}
    for group, residual in zip(range(len(residuals)) if groups is None else groups, residuals, strict=True):
        sums.setdefault(group, []).append(residual)
    count = len(sums)
    if count < 2 or not total:
        return None
    return math.sqrt(count / (count - 1) * math.fsum(math.fsum(r) ** 2 for r in sums.values())) / total


@dataclass(frozen=True)
class SequenceSums:
    """A quantity summed over the scored tokens of each sequence; kept so that rows can be compared in pairs.

    Attributes:
        sums: one number a sequence: nats, or correct tokens.
        tokens: scored tokens of each sequence.
        groups: the document each sequence was cut from; None: every sequence is independent of the others.
    """

    sums: tuple[float, ...]
    tokens: tuple[float, ...]
    groups: tuple[int, ...] | None = None

    @classmethod
    def of(cls, sums_N: Tensor, tokens_N: Tensor) -> SequenceSums:
        """Build from two vectors."""
        return cls(tuple(sums_N.double().tolist()), tuple(tokens_N.double().tolist()))

    def grouped(self, groups: tuple[int, ...] | None) -> SequenceSums:
        """Return the same sums with the document of each sequence."""
        assert groups is None or len(groups) == len(self.sums)
        return replace(self, groups=groups)

    def per_token(self) -> Estimate:
        """Return sum / tokens over all sequences, with the ratio estimator's standard error (`cluster_se`).

        It covers both the sampling of documents and the Monte Carlo noise within each.
        """
        total = sum(self.tokens)
        if not total:
            return Estimate(math.nan, None)
        value = math.fsum(self.sums) / total
        residuals = [s - value * t for s, t in zip(self.sums, self.tokens, strict=True)]
        return Estimate(value, cluster_se(residuals, self.groups, total))

    def bits_per_byte(self, num_bytes: Sequence[float]) -> float:
        """Return nats / ln 2 / bytes, where `num_bytes` counts the UTF-8 bytes of each sequence's scored tokens."""
        assert len(num_bytes) == len(self.sums)
        return math.fsum(self.sums) / math.log(2) / sum(num_bytes)

    def as_json(self, name: str = "nats") -> dict[str, Any]:
        """Return `{name: [...], "tokens": [...], "groups": [...]}`, without groups where there are none."""
        found = {name: list(self.sums), "tokens": list(self.tokens)}
        return found if self.groups is None else {**found, "groups": list(self.groups)}


def paired_difference(first: SequenceSums, second: SequenceSums) -> Estimate:
    """Return the per-token difference first - second of two rows scored on the same sequences with the same noise.

    Its standard error is usually far below that of either row, since what makes a sequence hard is common to both.
    """
    assert first.tokens == second.tokens, "rows were scored on different tokens"
    differences = tuple(a - b for a, b in zip(first.sums, second.sums, strict=True))
    return SequenceSums(differences, first.tokens, first.groups).per_token()
