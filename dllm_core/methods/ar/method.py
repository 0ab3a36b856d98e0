"""The autoregressive reference rows. B batch, L length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.ar.options import Options
from dllm_core.methods.protocol import (
    Corrupted,
    GenerationOutput,
    LossOutput,
    Resources,
    SamplingRequest,
    ScoredTokens,
    StepInfo,
)
from dllm_core.methods.single_network import FORWARD_AND_BACKWARD, SingleNetworkMethod, gather_rows
from dllm_core.methods.token_space import per_row_mean


class Method(SingleNetworkMethod):
    """The model with its causal attention: as it was, or fine-tuned on the tokens that the cells are scored on.

    Loss: mean cross-entropy over the response tokens of a sequence, then over the sequences of the global batch.
    """

    options: Options
    causal = True

    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        """Corrupt nothing: every response token is to be predicted from what precedes it."""
        return Corrupted(batch, batch.input_ids_BL, batch.response_BL)

    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        """Return the number of sequences that carry a loss."""
        return {"sequences": float(corrupted.masked_BL.any(1).sum())}

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        """Return this micro-batch's contribution to the loss."""
        from dllm_core.kernels.masked_ce import token_losses

        batch, scored_BL = corrupted.clean, corrupted.masked_BL
        if not bool(scored_BL.any()):
            return LossOutput(torch.zeros((), device=self.backbone.device, requires_grad=True), {})
        weight_M = (per_row_mean(scored_BL) / max(1.0, totals["sequences"]))[scored_BL]
        losses = token_losses(
            gather_rows(self.run(batch, batch.input_ids_BL), self.predictor_rows(scored_BL)),
            self.backbone.head_weight_VD,
            batch.input_ids_BL[scored_BL],
            ce_M=weight_M,
            blocked_V=self.backbone.blocked_V,
        )
        rows, length = scored_BL.shape
        parts: dict[str, Tensor | float] = {
            "ce_nats": (weight_M * losses.nll_M).sum(),
            "accuracy": (weight_M * losses.correct_M).sum(),
        }
        flops = FORWARD_AND_BACKWARD * self.backbone.flops_forward(rows * length, length, len(weight_M))
        return LossOutput(losses.total, parts, flops=flops, positions=rows * length)

    def token_nll(self, batch: Batch) -> ScoredTokens:
        """Return the exact -log p of the response tokens, in nats, fp32: the token set that the bounds are given on."""
        return self.score(batch, batch.input_ids_BL, batch.response_BL)

    def sample(
        self,
        prompts: Sequence[Tensor],
        request: SamplingRequest,
        on_draft: Callable[[Tensor, Tensor], None] | None = None,
    ) -> GenerationOutput:
        """Decode left to right with a key-value cache; see `Method.sample`. Nothing is drafted."""
        from dllm_core.backbone.ar_decode import decode

        with self.measuring():
            return decode(self.backbone, prompts, request)
