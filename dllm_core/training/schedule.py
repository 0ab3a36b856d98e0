"""Learning rate and phases as functions of the step. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dllm_core.errors import DllmError

if TYPE_CHECKING:
    from dllm_core.methods.protocol import Phase, StepInfo


def learning_rate_scale(step: int, steps: int, *, warmup_ratio: float, min_lr_ratio: float) -> float:
    """Return the learning rate of 0-based `step` relative to its peak.

    Linear from peak / w at step 0 to the peak at step w - 1, where w = ceil(warmup_ratio * steps); then half a cosine
    that reaches `min_lr_ratio` at the last step.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def share_of_steps(share: float, steps: int) -> int:
    """Return how many of `steps` a share is (nearest integer, halves up): one rule for phases and prefixes."""
    return min(steps, max(0, math.floor(share * steps + 0.5)))


def phase_starts(phases: Sequence[Phase], steps: int) -> tuple[int, ...]:
    """Return the first step of each phase. Shares are summed before rounding, so that no step is lost or doubled."""
    total = math.fsum(p.share for p in phases)
    assert abs(total - 1.0) < 1e-6, f"the shares of the phases sum to {total}, not 1"
    return tuple(share_of_steps(math.fsum(p.share for p in phases[:i]), steps) for i in range(len(phases)))


def check_starts(starts: Sequence[int], phases: Sequence[Phase], steps: int) -> None:
    """Raise if given phase starts do not fit the phases.

    Raises:
        DllmError: another number of phases, or starts that do not rise from 0 to at most `steps`.
    """
    rising = list(starts) == sorted(starts) and (not starts or (starts[0] == 0 and starts[-1] <= steps))
    if len(starts) != len(phases) or not rising:
        raise DllmError(
            f"phase_starts={tuple(starts)} does not fit {len(phases)} phases and {steps} steps.",
            f"Give {len(phases)} rising steps, the first 0 and the last at most {steps}.",
        )


def step_info(step: int, phases: Sequence[Phase], starts: Sequence[int], *, steps: int, batch_size: int) -> StepInfo:
    """Return where 0-based `step` stands. A phase without steps never shows up."""
    from dllm_core.methods.protocol import StepInfo

    index = max(i for i, start in enumerate(starts) if start <= step)
    stop = starts[index + 1] if index + 1 < len(starts) else steps
    return StepInfo(
        step=step,
        total_steps=steps,
        phase=phases[index].name,
        phase_step=step - starts[index],
        phase_steps=stop - starts[index],
        phase_start=starts[index],
        batch_size=batch_size,
    )
