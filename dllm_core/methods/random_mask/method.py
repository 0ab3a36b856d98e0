"""Masked diffusion with an independent random mask. B batch, L length, R forwarded rows."""

from __future__ import annotations

import torch

from dllm_core.corruption.masks import uniform_masks
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.protocol import Corrupted, LossOutput, Resources, StepInfo
from dllm_core.methods.random_mask.options import Options
from dllm_core.methods.token_space import TokenSpaceMethod, View, per_row_mean


class Method(TokenSpaceMethod):
    """`L = L_mdm + w_path * L_path` over masks with r ~ U(0, 1) per sequence.

    L_mdm is the mean cross-entropy over the masked tokens of a sequence, then the mean over the sequences of the
    global batch; its expectation is the bound on -log p per token (arXiv:2406.07524, arXiv:2406.04329). L_path puts
    sg(p) * CE in place of CE, p the probability of the true token (the path term of the baseline recipe,
    after arXiv:2502.03540); with it the total is no bound.
    """

    options: Options

    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        """Draw the mask of every sequence; response tokens only."""
        masked_BL = uniform_masks(batch, noise).to(batch.input_ids_BL.device)
        return Corrupted(batch, self.mask(batch, masked_BL), masked_BL)

    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        """Return the number of sequences that carry a loss."""
        return {"sequences": float(corrupted.masked_BL.any(1).sum())}

    def view(self, corrupted: Corrupted, totals: dict[str, float]) -> View:
        """Return the one view of a random-masked micro-batch, weighted for the global means."""
        mean_BL = per_row_mean(corrupted.masked_BL) / max(1.0, totals["sequences"])
        path_BL = self.options.path_weight * mean_BL if self.options.path_weight else None
        return View(
            batch=corrupted.clean,
            source_R=torch.arange(len(corrupted.clean)),
            noisy_RL=corrupted.noisy_BL,
            masked_RL=corrupted.masked_BL,
            ce_RL=mean_BL,
            path_RL=path_BL,
            log_RL=mean_BL,
        )

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        """Return this micro-batch's contribution to the loss; one forward, head on masked rows only."""
        view = self.view(corrupted, totals)
        if not bool(view.masked_RL.any()):
            return self.empty_loss()
        losses, parts = self.token_terms(view, self.run(view.batch, view.noisy_RL))
        return LossOutput(losses.total, parts, flops=self.training_flops(view), positions=view.masked_RL.numel())
