"""From a budget to steps, before training starts, so that caching and exact resume hold. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dllm_core.errors import DllmError

BudgetKind = Literal["tokens", "flops", "seconds", "epochs"]


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one optimiser step of a row costs.

    Attributes:
        sequences: sequences in it.
        response_tokens: response tokens presented to the method (mean).
        flops: floating-point operations, a live teacher's included; None if unknown.
        seconds: measured time; None if it was not measured.
    """

    sequences: int
    response_tokens: float
    flops: float | None = None
    seconds: float | None = None


def steps_from_budget(kind: BudgetKind, value: float, cost: StepCost, *, num_sequences: int | None = None) -> int:
    """Return the number of steps that spends a budget: at least one, rounded up for tokens and epochs (the last batch
    is whole), to the nearest step for flops and seconds.

    Args:
        kind: what is held equal between rows.
        value: how much of it.
        cost: of one step of this row.
        num_sequences: size of the training set, for epochs.

    Raises:
        DllmError: the budget is not positive, or the cost it is counted in is unknown or zero.
    """
    _check_value(value)
    if kind == "epochs":
        return max(1, math.ceil(value * _known(num_sequences, kind) / cost.sequences))
    if kind == "tokens":
        return max(1, math.ceil(value / _known(cost.response_tokens, kind)))
    return max(1, round(value / _known(cost.flops if kind == "flops" else cost.seconds, kind)))


def steps_from_flops(value: float, charged: Callable[[int], float]) -> int:
    """Return the number of steps, at least one, whose charge comes nearest to a budget in FLOPs.

    A charge need not grow by the same amount every step: a teacher is paid for once a sequence, so that steps get
    cheaper when the training set comes round again. Cost: about 2 log2(steps) calls of `charged`.

    Args:
        value: the budget.
        charged: from a number of steps, what they cost in all; never falls, and grows without bound.

    Raises:
        DllmError: the budget is not positive, or steps cost nothing.
    """
    _check_value(value)
    _known(charged(1), "flops")
    high = 1
    while charged(high) < value:
        high *= 2
    low = high // 2
    while high - low > 1:  # charged(low) < value <= charged(high)
        middle = (low + high) // 2
        low, high = (middle, high) if charged(middle) < value else (low, middle)
    return low if low > 0 and value - charged(low) < charged(high) - value else high


def branch_steps(prefix_steps: int, share: float, kind: BudgetKind, value: float, cost: StepCost) -> int:
    """Return the total steps of a row that branches from another one's prefix.

    The prefix is charged `share` of the budget; the rest buys steps of the branch at their own cost. For tokens and
    epochs a step costs both rows the same, and the total is theirs: use `steps_from_budget`.

    Raises:
        DllmError: as `steps_from_budget`.
    """
    assert kind in ("flops", "seconds"), kind
    return prefix_steps + steps_from_budget(kind, value * (1.0 - share), cost)


def _check_value(value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise DllmError(f"budget.value is {value}.", "Give a finite number greater than 0.")


def _known(value: float | None, kind: str) -> float:
    if value is None or not value > 0:
        raise DllmError(
            f"A budget in {kind} cannot be turned into steps: the cost of a step is {value}.",
            "Set budget.kind=tokens, or train.steps instead of a budget.",
        )
    return value
