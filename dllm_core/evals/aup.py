"""Accuracy under parallelism (AUP): one number for a curve of accuracy against tokens per forward (d3LLM).

Defined in arXiv:2601.07568 and computed there by `AUP_leaderboard/aup_utils.py:get_aup`; `aup` is that definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_core.evals.estimates import Estimate, SequenceSums

ALPHA = 3.0
"""How fast accuracy below the best one loses its weight."""
CUT = 5.0
"""Points of accuracy below the least parallel setting at which a setting is left out."""


def weight(accuracy: float, best: float, alpha: float = ALPHA) -> float:
    """Return W(y) = min(exp(-alpha (1 - y / y_max)), 1): 1 at the best accuracy, less below it."""
    return min(math.exp(-alpha * (1.0 - accuracy / best)), 1.0)


def aup(points: Iterable[tuple[float, float]], best: float, *, alpha: float = ALPHA, cut: float = CUT) -> float | None:
    """Return rho_1 y_1 + sum_{i >= 2} (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2.

    Points are taken by rising rho; those with y < y_1 - cut are left out. Of several with one rho the most accurate
    counts. The rectangle below the first point carries no weight, as in the source. A curve that sets out from many
    tokens per forward is therefore given y_1 for all fewer: sweep down to about one.

    Args:
        points: (rho, y): tokens per forward, accuracy in percent.
        best: y_max, the best accuracy in percent among all that is compared; the same for every curve.
        alpha: of the weight.
        cut: in points of accuracy.

    Returns:
        The area, in percent times tokens per forward; None without a point.
    """
    accuracy_at: dict[float, float] = {}
    for rho, y in points:
        accuracy_at[rho] = max(y, accuracy_at.get(rho, -math.inf))
    curve = sorted(accuracy_at.items())
    if not curve:
        return None
    if best <= 0:
        return 0.0  # nobody is right anywhere: the weight has no meaning, the area none either
    (first_rho, first_y), *_ = curve
    area, before, weighted_before = first_rho * first_y, first_rho, first_y * weight(first_y, best, alpha)
    for rho, y in curve[1:]:
        if y < first_y - cut:
            continue
        weighted = y * weight(y, best, alpha)
        area += (rho - before) * (weighted + weighted_before) / 2
        before, weighted_before = rho, weighted
    return area


@dataclass(frozen=True)
class CurvePoint:
    """What one setting did to each sequence.

    Attributes:
        right: tokens that equal the held-out ones.
        tokens: tokens that were filled in.
        forwards: network passes the sequence takes by itself.
        groups: document of each sequence; None: every sequence is independent.
    """

    right: tuple[float, ...]
    tokens: tuple[float, ...]
    forwards: tuple[float, ...]
    groups: tuple[int, ...] | None = None

    @property
    def accuracy(self) -> SequenceSums:
        """Right tokens over tokens."""
        return SequenceSums(self.right, self.tokens, self.groups)

    @property
    def tokens_per_forward(self) -> SequenceSums:
        """Tokens over passes, both summed over the sequences."""
        return SequenceSums(self.tokens, self.forwards, self.groups)

    def place(self, kept: Sequence[int]) -> tuple[float, float]:
        """Return (tokens per forward, accuracy in percent) of some of the sequences."""
        right, tokens, forwards = (math.fsum(v[i] for i in kept) for v in (self.right, self.tokens, self.forwards))
        return tokens / forwards, 100.0 * right / tokens

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        groups = None if self.groups is None else list(self.groups)
        return {
            "right": list(self.right),
            "tokens": list(self.tokens),
            "forwards": list(self.forwards),
            "groups": groups,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> CurvePoint:
        """Build from what `as_json` returned."""
        groups = found.get("groups")
        right, tokens, forwards = (tuple(found[name]) for name in ("right", "tokens", "forwards"))
        return cls(right, tokens, forwards, None if groups is None else tuple(groups))


def aup_estimate(points: Sequence[CurvePoint], best: float) -> Estimate | None:
    """Return the AUP of a curve with its jackknife standard error, leaving out one document at a time.

    All points are measured on the same sequences, which the jackknife leaves out of all of them together; `best` stays
    what it is. None without a point; no error below two documents.

    Args:
        points: one a setting, in any order.
        best: y_max in percent.
    """
    if not points:
        return None
    groups = points[0].groups or tuple(range(len(points[0].right)))
    assert all((p.groups or groups) == groups for p in points), "points were measured on different sequences"

    def without(group: int | None) -> float:
        kept = [i for i, g in enumerate(groups) if g != group]
        found = aup((p.place(kept) for p in points), best)
        assert found is not None
        return found

    names = sorted(set(groups))
    if len(names) < 2:
        return Estimate(without(None), None)
    left_out = [without(name) for name in names]
    centre = math.fsum(left_out) / len(names)
    variance = (len(names) - 1) / len(names) * math.fsum((v - centre) ** 2 for v in left_out)
    return Estimate(without(None), math.sqrt(variance))
