"""The reference beside the fast decoder: one row at a time, whole canvas, whole logits; a difference is raised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.errors import DllmError
from dllm_core.samplers.cache_settings import CacheConfig
from dllm_core.samplers.canvas import Canvas

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.samplers.config import DiffusionGenerationConfig
    from dllm_core.samplers.loop import Decoding


class VerificationError(DllmError):
    """The fast decoder and the reference did not agree."""


class Verifier:
    """Decodes every row by itself and compares after each pass.

    What is checked is everything that is there for speed: caches, batches of rows of different length, fused kernels,
    heads on some rows only. The rules themselves are shared (tests compare those with a float64 decoder).

    Args:
        backbone: the model.
        canvas: of the batch.
        config: of the batch.
        sample_ids: of the rows.
    """

    def __init__(
        self, backbone: Backbone, canvas: Canvas, config: DiffusionGenerationConfig, sample_ids: Sequence[int]
    ) -> None:
        from dllm_core.samplers.loop import Decoding

        plain = replace(config, cache=CacheConfig(), verify=False, record_passes=True)
        self.rows = [
            Decoding(backbone, canvas.row(row), plain, [sample_id], fused=False)
            for row, sample_id in enumerate(sample_ids)
        ]

    def check(self, fast: Decoding) -> None:
        """Make the same pass in every row that is not finished, and compare.

        Raises:
            VerificationError: saying where, and how far the scores were apart.
        """
        for row, reference in enumerate(self.rows):
            step = reference.plan.next_step(reference.device)
            if step is None:
                continue
            reference.advance(step)
            length = reference.lengths[0]
            for name, found_C, expected_C in (
                ("token", fast.canvas_BC[row, :length], reference.canvas_BC[0]),
                ("mask", fast.masked_BC[row, :length], reference.masked_BC[0]),
            ):
                if not torch.equal(found_C, expected_C):
                    self._report(name, row, found_C, expected_C, fast, reference)
            if fast.plan.rows[row].finished != reference.plan.rows[0].finished:
                raise VerificationError(
                    f"Row {row} ends after pass {fast.passes} in one decoder and not in the other.",
                    "Decode the row alone with cache='none' and report both.",
                )

    @staticmethod
    def _report(name: str, row: int, found_C: Tensor, expected_C: Tensor, fast: Decoding, reference: Decoding) -> None:
        place = int((found_C != expected_C).nonzero()[0])
        steps = [fast.history[-1], reference.history[-1]]
        scores = [float(step.score_BC[r, place]) for step, r in zip(steps, (row, 0), strict=True)]
        drafts = [int(step.drafted_BC[r, place]) for step, r in zip(steps, (row, 0), strict=True)]
        raise VerificationError(
            f"Pass {fast.passes}, row {row}, position {place}: the {name} is {found_C[place].item()}, that of the "
            f"reference {expected_C[place].item()} (drafts {drafts[0]} and {drafts[1]}, scores {scores[0]:.7g} and "
            f"{scores[1]:.7g}).",
            "Scores that differ in the last digits are a near-tie, which fp32 makes rare; anything else is a fault.",
        )
