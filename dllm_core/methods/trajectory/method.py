"""Trajectory distillation on an aligned student. B batch, L length, R forwarded rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dllm_core.corruption.masks import (
    choose_blocks,
    complementary_views,
    kept_in_block,
    ranks_in_block,
    subset_weights,
    uniform_masks,
)
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.errors import DllmError
from dllm_core.methods.protocol import Corrupted, LossOutput, Phase, Resources, StepInfo
from dllm_core.methods.repr_align.method import Method as ReprAlignMethod
from dllm_core.methods.requirements import RoomOptions
from dllm_core.methods.token_space import View, per_row_mean
from dllm_core.methods.trajectory.options import Options
from dllm_core.methods.trajectory.subset import looped, subset

if TYPE_CHECKING:
    from dllm_core.data.order import SampleOrder

STUDENT = "student"
TRAJECTORY = "trajectory"
VIEW_SHARE = 0.25
"""Each of CE, CE_rev, w_e H and w_e H_rev enters with one quarter."""
ALIGN_SCALE = 2 * VIEW_SHARE
"""lambda' / lambda: the two cross-entropies together weigh one half, where repr_align has one whole."""


class Method(ReprAlignMethod):
    """First `repr_align`, then denoising in the order in which a student would commit (after arXiv:2601.07568).

    In the trajectory phase one block of k response tokens is trained per sequence and document: clean before it,
    fully masked after it (no loss there). Inside, with rho ~ U(rho_cur, ratio_max), the tokens of commit rank
    >= floor((1 - rho) k) are masked in view one and the others in view two; ranks are taken anew inside the block. Per
    sequence

        (CE + CE_rev + w_e (H + H_rev)) / 4 + lambda' L_align,

    then the mean over the sequences of the global batch. CE is the mean over a view's masked tokens; H the entropy at
    temperature T over those that are already predicted right, divided by the number of masked ones; an empty view
    contributes 0. lambda' = lambda / 2 keeps CE : alignment as in `repr_align`. L_align covers the block's positions,
    each in the view that masks it, and is a mean over all positions of the global batch. A share of the sequences
    keeps the `repr_align` objective; the two kinds weigh as their numbers of sequences.

    Curriculum: rho_cur rises linearly from 0 to `ratio_max` over the phase, k steps through `block_sizes`. The last
    block of a response may be ragged; it is as likely as any other.

    Cost: two forwards and backwards per trajectory sequence, run as one doubled micro-batch.
    """

    options: Options

    @classmethod
    def contract_fields(cls, options: RoomOptions) -> dict[str, Any]:
        """Return the largest training block."""
        assert isinstance(options, Options)
        return {"block_size": max(options.block_sizes)}

    def phases(self) -> tuple[Phase, ...]:
        """Return the shared prefix and the trajectory phase."""
        share = self.options.prefix_share
        return Phase(STUDENT, share), Phase(TRAJECTORY, 1.0 - share)

    def select_samples(self, order: SampleOrder, info: StepInfo) -> list[tuple[int, int]]:
        """Return the common order before the branch; after it, the fixed subset with known commit orders, looped."""
        if info.phase != TRAJECTORY:
            return super().select_samples(order, info)
        chosen = subset(order, info.phase_start * info.batch_size, self.options.responses)
        return looped(chosen, info.phase_step * info.batch_size, info.batch_size)

    def block_size(self, info: StepInfo) -> int:
        """Return the training block size k at this step."""
        sizes = self.options.block_sizes
        return sizes[min(int(info.progress * len(sizes)), len(sizes) - 1)]

    def ratio_floor(self, info: StepInfo) -> float:
        """Return rho_cur at this step."""
        return self.options.ratio_max * info.progress

    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        """Draw blocks and ratios. Which tokens of a block fall into which view needs the store and is left to `loss`.

        In the trajectory phase `masked_BL` holds the whole block of a trajectory sequence: every one of its tokens is
        predicted in exactly one of the two views, and `noisy_BL` masks the block and all that follows.
        """
        if info.phase != TRAJECTORY:
            return super().corrupt(batch, info, noise)
        device, options = batch.input_ids_BL.device, self.options
        batch_cpu = batch.to("cpu")
        random_B = noise.uniform(batch, "kind") < options.random_mask_fraction
        floor = self.ratio_floor(info)
        ratio_B = floor + noise.uniform(batch, "ratio").double() * (options.ratio_max - floor)
        blocks = choose_blocks(
            batch_cpu.response_BL,
            batch_cpu.document_BL,
            self.block_size(info),
            noise.uniform(batch, "block", (batch.length,)),
        )
        masked_BL = torch.where(random_B[:, None], uniform_masks(batch_cpu, noise), blocks.block_BL)
        after_BL = blocks.after_BL & ~random_B[:, None]
        extras = {
            "random_B": random_B,
            "after_BL": after_BL,
            "kept_BL": kept_in_block(blocks.size_BL, ratio_B),
            "align_BL": subset_weights(masked_BL, batch_cpu, noise, options.token_fraction, "align"),
        }
        extras = {name: tensor.to(device) for name, tensor in extras.items()}
        masked_BL = masked_BL.to(device)
        return Corrupted(batch, self.mask(batch, masked_BL | extras["after_BL"]), masked_BL, extras)

    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        """Return sequences with a loss and alignable positions, in the trajectory phase also by kind."""
        totals = super().totals(corrupted)
        if "random_B" in corrupted.extras:
            random_B, masked_BL = corrupted.extras["random_B"], corrupted.masked_BL
            totals["random_sequences"] = float((masked_BL.any(1) & random_B).sum())
            totals["random_aligned"] = float(masked_BL[random_B].sum())
        return totals

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        """Return this micro-batch's contribution to the loss.

        Raises:
            DllmError: no trajectory store was given.
            StoreError: it lacks one of the sequences, or belongs to other ones.
        """
        if "random_B" not in corrupted.extras:
            return super().loss(corrupted, totals, info, resources)
        view = self.trajectory_view(corrupted, totals, self._ranks(corrupted, resources))
        return self.aligned_loss(corrupted.clean, view, resources)

    def _ranks(self, corrupted: Corrupted, resources: Resources) -> Tensor:
        """Return rank_BL inside each training block; -1 elsewhere, and in random-mask sequences."""
        random_B, masked_BL = corrupted.extras["random_B"].cpu(), corrupted.masked_BL.cpu()
        document_BL = corrupted.clean.document_BL.cpu()
        rank_BL = torch.full_like(document_BL, -1)
        (rows,) = (~random_B).nonzero(as_tuple=True)
        if len(rows) == 0:
            return rank_BL
        if resources.trajectories is None:
            raise DllmError(
                "The trajectory phase needs commit orders, and no trajectory store was given.",
                "Extract them first and pass Resources(trajectories=...).",
            )
        keys = tuple(corrupted.clean.sequence_keys[row] for row in rows.tolist())
        steps_BL = resources.trajectories.read(keys, corrupted.clean.response_BL.cpu()[rows]).cpu()
        rank_BL[rows] = ranks_in_block(steps_BL, masked_BL[rows], document_BL[rows])
        return rank_BL

    def trajectory_view(self, corrupted: Corrupted, totals: dict[str, float], rank_BL: Tensor) -> View:
        """Return the rows to forward: random-mask sequences once, the others once per view that masks something."""
        options, extras, clean = self.options, corrupted.extras, corrupted.clean
        device = corrupted.masked_BL.device
        random_B = extras["random_B"]
        late_BL, early_BL = complementary_views(rank_BL.to(device), corrupted.masked_BL, extras["kept_BL"])
        views = ((corrupted.masked_BL, random_B), (late_BL, ~random_B), (early_BL, ~random_B))
        picked = [(masked_BL.any(1) & of_kind_B).nonzero(as_tuple=True)[0] for masked_BL, of_kind_B in views]
        source_R = torch.cat(picked)
        masked_RL = torch.cat([masked_BL[rows] for (masked_BL, _), rows in zip(views, picked, strict=True)])
        batch = clean.select(source_R.tolist())
        random_R1 = random_B[source_R][:, None].float()
        sequences = max(1.0, totals["sequences"])
        mean_RL = per_row_mean(masked_RL) / sequences
        ce_RL = mean_RL * (random_R1 + (1.0 - random_R1) * VIEW_SHARE)
        entropy_RL = options.entropy_weight * VIEW_SHARE * mean_RL * (1.0 - random_R1)
        block_mean_BL = per_row_mean(corrupted.masked_BL) / sequences
        align_RL = extras["align_BL"][source_R] * masked_RL
        return View(
            batch=batch,
            source_R=source_R,
            noisy_RL=self.mask(batch, masked_RL | extras["after_BL"][source_R]),
            masked_RL=masked_RL,
            ce_RL=ce_RL,
            log_RL=block_mean_BL[source_R] * masked_RL,
            path_RL=options.path_weight * mean_RL * random_R1 if options.path_weight else None,
            entropy_RL=entropy_RL if options.entropy_weight else None,
            entropy_temperature=options.entropy_temperature,
            align_RL=align_RL * _align_shares(random_R1, totals),
        )


def _align_shares(random_R1: Tensor, totals: dict[str, float]) -> Tensor:
    """Return the weight per aligned position: each kind's mean, by its share of sequences; lambda' / lambda for one."""
    sequences = max(1.0, totals["sequences"])
    random_share = totals["random_sequences"] / sequences / max(1.0, totals["random_aligned"])
    others, positions = totals["sequences"] - totals["random_sequences"], totals["aligned"] - totals["random_aligned"]
    trajectory_share = ALIGN_SCALE * others / sequences / max(1.0, positions)
    return random_R1 * random_share + (1.0 - random_R1) * trajectory_share
