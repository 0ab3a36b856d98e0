"""Budgets become steps by closed forms; settings refuse what makes no sense."""

from __future__ import annotations

import math

import pytest

from dllm_core.errors import DllmError
from dllm_core.training.budget import StepCost, branch_steps, steps_from_budget, steps_from_flops
from dllm_core.training.settings import TrainSettings

COST = StepCost(sequences=8, response_tokens=1024.0, flops=2e12, seconds=1.5)


@pytest.mark.parametrize(
    ("kind", "value", "steps"),
    [
        ("tokens", 1024, 1),
        ("tokens", 1025, 2),
        ("tokens", 100_000, math.ceil(100_000 / 1024)),
        ("flops", 1e14, 50),
        ("flops", 1e9, 1),
        ("seconds", 120, 80),
        ("epochs", 2, 13),
    ],
)
def test_steps(kind: str, value: float, steps: int) -> None:
    assert steps_from_budget(kind, value, COST, num_sequences=50) == steps  # type: ignore[arg-type]


def test_a_branch_spends_what_its_prefix_left() -> None:
    # prefix: 40 % of 1e14 at 1e12 a step = 40 steps; 60 % at 2e12 a step = 30 steps
    assert branch_steps(40, 0.4, "flops", 1e14, COST) == 70


@pytest.mark.parametrize("value", [0.4, 1.0, 6.9, 7.0, 7.1, 33.0, 49.0, 50.0, 51.2, 99.9, 1000.0, 1002.1])
@pytest.mark.parametrize("sequences", [1, 5, 12, 10**9])
def test_a_flop_budget_ends_at_the_nearest_step_of_any_rising_charge(value: float, sequences: int) -> None:
    """Four sequences a step, each paid for at its first presentation, against a look at every number of steps."""
    asked = 0

    def charged(steps: int) -> float:
        nonlocal asked
        asked += 1
        return 3.0 * steps + 1.0 * min(4 * steps, sequences)

    nearest = min(range(1, 1000), key=lambda steps: (abs(charged(steps) - value), -steps))
    asked = 0
    assert abs(charged(steps_from_flops(value, charged)) - value) == abs(charged(nearest) - value)
    assert asked < 30


def test_a_flop_budget_of_equal_steps_is_a_division() -> None:
    for value, steps in ((1e14, 50), (1e9, 1), (2.9e12, 1), (3.1e12, 2)):
        assert steps_from_flops(value, lambda n: 2e12 * n) == steps
    for value in (0.0, math.inf):
        with pytest.raises(DllmError, match=r"budget\.value"):
            steps_from_flops(value, lambda n: 2e12 * n)
    with pytest.raises(DllmError, match="flops"):
        steps_from_flops(1e9, lambda n: 0.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_is_a_positive_number(value: float) -> None:
    with pytest.raises(DllmError, match=r"budget\.value"):
        steps_from_budget("tokens", value, COST)


@pytest.mark.parametrize("kind", ["flops", "seconds", "epochs"])
def test_an_unknown_cost_says_what_to_do(kind: str) -> None:
    with pytest.raises(DllmError, match=kind) as error:
        steps_from_budget(kind, 1.0, StepCost(sequences=8, response_tokens=100.0))  # type: ignore[arg-type]
    assert "tokens" in error.value.remedy


def test_settings_come_from_a_spec_by_name() -> None:
    settings = TrainSettings.from_spec({"lr": 0.1, "betas": [0.9, 0.95], "steps": None}, steps=7, dtype="bf16")
    assert (settings.steps, settings.lr, settings.betas, settings.dtype) == (7, 0.1, (0.9, 0.95), "bf16")
    with pytest.raises(DllmError, match="learning_rate"):
        TrainSettings.from_spec({"learning_rate": 0.1}, steps=1)
    with pytest.raises(DllmError, match=r"train\.steps"):
        TrainSettings(steps=0)
    with pytest.raises(DllmError, match="auto"):
        TrainSettings.from_spec({"dtype": "auto"}, steps=1)


def test_identity_covers_what_changes_weights_only() -> None:
    base = TrainSettings(steps=5)
    assert base.identity() == TrainSettings(steps=5, log_every_s=3.0, checkpoint_every_s=None).identity()
    assert base.identity() != TrainSettings(steps=6).identity()
    assert base.identity() != TrainSettings(steps=5, seed=1).identity()
