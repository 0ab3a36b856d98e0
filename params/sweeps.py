"""Settings of the sweeps that set quality beside speed. Reading them imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from params.base import MaskRatio, NonNegative, Positive, PositiveInt, Settings
from params.errors import ParamsError


class StepSweepSpec(Settings):
    """Quality of every row at several numbers of denoising steps."""

    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (4, 8, 16, 32, 64, 128)
    """Denoising steps of a whole response; more than it has tokens count as one a token."""
    temperatures: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0.7,)
    """Sampling temperatures of the continuations."""
    samples: PositiveInt = 8
    """Continuations at each number of steps and temperature."""
    infill_tokens: PositiveInt = 32
    """Tokens that are taken out of the middle of a response and filled in again; at most half of the response."""
    infill_sequences: PositiveInt = 16
    """Held-out sequences of which a span is filled in; all where there are fewer."""


class ParallelismSpec(Settings):
    """Accuracy against tokens per forward, as the rules accept more at once; token-space rows only."""

    sequences: PositiveInt = 8
    """Held-out sequences; all where there are fewer."""
    mask_ratio: MaskRatio = 0.5
    """Part of a response that is masked at random and filled in: one of the two tasks."""
    infill_tokens: PositiveInt = 32
    """Tokens of the span in the middle that is filled in: the other task; at most half of the response."""
    tokens_per_forward: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16)
    """Tokens that a scheduled decode (rule `confidence`) accepts at each pass: what the others are held against."""
    thresholds: tuple[MaskRatio, ...] = (0.9, 0.7, 0.5, 0.3, 0.1)
    """Probabilities of rule `threshold`."""
    factors: tuple[Positive, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    """Factors of rule `factor`."""
    entropy_thresholds: tuple[Positive, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Nats of rule `entropy_threshold`, which decodes in blocks."""
    block_size: PositiveInt = 16
    """Tokens a block of that rule."""
    block_add_thresholds: tuple[MaskRatio, ...] = (1.0, 0.1)
    """Progress of a block from which on the next one joins; 1 is one block after the other. A curve each."""

    @model_validator(mode="after")
    def _relations(self) -> ParallelismSpec:
        in_blocks = self.entropy_thresholds and self.block_add_thresholds
        if not (self.tokens_per_forward or self.thresholds or self.factors or in_blocks):
            raise ParamsError(
                "eval.parallelism has nothing to vary: every list of settings is empty.",
                "Give tokens_per_forward, thresholds, factors or entropy_thresholds; or set eval.parallelism=null.",
            )
        return self
