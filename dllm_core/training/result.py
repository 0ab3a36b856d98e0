"""What a training run reports. Imports no torch."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field, fields
from typing import Any

_RECENT = 10


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Outcome and cost of a run, counted over all of its parts (before and after a resume, its prefix included).

    Attributes:
        steps: optimiser steps done.
        finished: False when stopped before the last step.
        response_tokens: response tokens presented to the method.
        positions: token positions forwarded, extra views included.
        flops: floating-point operations of all forwards and backwards.
        teacher_flops: of those, spent on a frozen teacher while training.
        wall_s: seconds of training and of preparing for it; checkpoints and text samples are not counted.
        tokens_per_s: response tokens a second of that.
        peak_memory_gb: largest memory of the process (CPU) or allocated on the device, in 1e9 bytes.
        trainable_params: parameters that were trained.
        new_params: parameters that the starting checkpoint did not have.
        distinct_samples: different training sequences that were read.
        final_losses: loss and its parts, mean over the last 10 steps.
    """

    steps: int
    finished: bool
    response_tokens: int
    positions: int
    flops: float
    teacher_flops: float
    wall_s: float
    tokens_per_s: float
    peak_memory_gb: float
    trainable_params: int
    new_params: int
    distinct_samples: int
    final_losses: dict[str, float]


@dataclass
class Counters:
    """What accumulates over a run and is kept in its checkpoints.

    Attributes:
        response_tokens, positions, flops, teacher_flops, wall_s, peak_memory_gb: as in `TrainResult`.
        recent: loss and parts of the last steps, oldest first.
    """

    response_tokens: int = 0
    positions: int = 0
    flops: float = 0.0
    teacher_flops: float = 0.0
    wall_s: float = 0.0
    peak_memory_gb: float = 0.0
    recent: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def as_dict(self) -> dict[str, Any]:
        """Return the counters as JSON-able values."""
        return {**asdict(self), "recent": list(self.recent)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Counters:
        """Rebuild what `as_dict` gave."""
        known = {f.name: values[f.name] for f in fields(cls)}
        return cls(**{**known, "recent": deque(known["recent"], maxlen=_RECENT)})

    def final_losses(self) -> dict[str, float]:
        """Return the mean of each loss over the recent steps that report it."""
        names = dict.fromkeys(name for row in self.recent for name in row)
        rows = {name: [row[name] for row in self.recent if name in row] for name in names}
        return {name: sum(values) / len(values) for name, values in rows.items()}
