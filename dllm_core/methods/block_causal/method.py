"""Block-causal masked diffusion. B batch, L length, R predicted rows, W columns of the layout, D hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dllm_core.corruption.masks import subset_weights
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.block_causal.draws import block_masks, block_starts, bound_weights
from dllm_core.methods.block_causal.layout import Layout
from dllm_core.methods.block_causal.options import Options
from dllm_core.methods.protocol import (
    Corrupted,
    LossOutput,
    Resources,
    StepInfo,
)
from dllm_core.methods.repr_align.alignment import alignment_loss
from dllm_core.methods.repr_align.method import Method as ReprAlignMethod
from dllm_core.methods.requirements import RoomOptions
from dllm_core.methods.single_network import FORWARD_AND_BACKWARD
from dllm_core.methods.token_space import View

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone


class Method(ReprAlignMethod):
    """Diffusion inside blocks of fixed size, autoregressive between them (BD3-LM, arXiv:2503.09573).

    `L = L_mdm + w_path * L_path (+ lambda * L_align)`, where L_mdm is the block-wise bound per token: in every block
    k of its n response tokens are masked, predicted from the rest of the block and from the clean blocks before it, and
    weighted n / k; the blocks of a sequence are summed and divided by its response tokens, sequences are averaged over
    the global batch. All blocks of a sequence are predicted in one pass over [clean | noisy].

    Under the shifted alignment the first token of a block is predicted from the last clean row before it: what decoding
    with a cache has at hand. No token of the block has touched that row, so this prediction stays the same however much
    of the block is visible, and enters the bound as that of an autoregressive model.

    L_align holds clean rows close to the frozen model's at the same row: the clean rows are what later blocks read, so
    this keeps the context in the form in which the model learnt to use it. Aligned are the rows that a later block of
    the document reads and whose next token is a response token. (The noisy rows could be compared with the same teacher
    as `repr_align` does; but inside a block they know less than it does, and their states are nobody's context.)

    Cost: a forward and backward over the clean part and one noisy part (two with `complementary`).
    """

    options: Options

    def __init__(self, backbone: Backbone, options: Options) -> None:
        super().__init__(backbone, options)
        # decoding reads off the contract how far a token sees, also before anything is saved
        backbone.contract = backbone.contract.model_copy(update=self.contract_fields(options))

    @classmethod
    def contract_fields(cls, options: RoomOptions) -> dict[str, Any]:
        """Return block size, the attention between blocks and how token losses are weighted."""
        assert isinstance(options, Options)
        return {"block_size": options.block_size, "attention": "block_causal", "weighting": "block_bound"}

    # -- the network ------------------------------------------------------------------------------------------------

    def layout(self, batch: Batch, views: int = 1) -> Layout:
        """Return the columns that are forwarded to predict the response tokens of a batch that has some."""
        return Layout.of(batch, self.options.block_size, views)

    def run(self, batch: Batch, input_ids_BL: Tensor) -> Tensor:
        """Return the states that predict, [B, L, D], each where `predictor_rows` looks for it.

        Args:
            batch: the clean tokens; only its response tokens can be predicted afterwards.
            input_ids_BL: the same tokens, some of them masked.
        """
        return self.run_views(batch, [input_ids_BL])[0]

    def run_views(self, batch: Batch, noisy: list[Tensor]) -> list[Tensor]:
        """Return what `run` does for several maskings of the same tokens, in one pass that shares the clean part."""
        layout = self.layout(batch, len(noisy))
        some = batch.rows(0, 1) if batch.is_plain else batch
        hidden_BWD = self.backbone.hidden(
            layout.joined(batch.input_ids_BL, noisy),
            causal=False,
            position_BL=layout.joined(batch.position_BL, [batch.position_BL] * len(noisy)),
            attention_mask_B1LM=layout.attention_mask(some.document_BL, some.position_BL),
        )
        flat_WD = hidden_BWD.flatten(0, 1)
        row_B1 = torch.arange(len(batch), device=flat_WD.device)[:, None] * layout.width
        found = []
        for view in range(len(noisy)):
            column_BL = layout.predictors(batch.position_BL, view, shifted=self.is_shifted)
            found.append(flat_WD.index_select(0, (row_B1 + column_BL).flatten()).view(*column_BL.shape, -1))
        return found

    # -- training ---------------------------------------------------------------------------------------------------

    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        """Draw the mask of every block, and the clean rows to align.

        With `complementary` every response token is predicted, in one of two views: `masked_BL` holds them all, and
        `noisy_BL` is the first view.
        """
        options, device = self.options, batch.input_ids_BL.device
        first_BL = block_masks(batch, options.block_size, noise, complementary=options.complementary).to(device)
        extras = {"first_BL": first_BL}
        if options.weight:
            aligned_BL = self.aligned_rows(batch)
            weight_BL = subset_weights(aligned_BL.cpu(), batch, noise, options.token_fraction, "align").to(device)
            extras |= {"aligned_BL": aligned_BL, "align_BL": weight_BL}
        masked_BL = batch.response_BL if options.complementary else first_BL
        return Corrupted(batch, self.mask(batch, first_BL), masked_BL, extras)

    def aligned_rows(self, batch: Batch) -> Tensor:
        """Return bool [B, L]: rows of the clean part that are compared with the frozen model."""
        predicts_BL = torch.zeros_like(batch.response_BL)
        predicts_BL[:, :-1] = batch.response_BL[:, 1:]
        block_BL = batch.position_BL // self.options.block_size
        document_BL = batch.document_BL.clamp(min=0)
        last_BL = torch.zeros_like(block_BL).scatter_reduce_(
            1, document_BL, block_BL.masked_fill(~batch.response_BL, 0), "amax"
        )
        return predicts_BL & (block_BL < last_BL.gather(1, document_BL))

    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        """Return the sequences that carry a loss and the rows that could be aligned."""
        totals = {"sequences": float(corrupted.clean.response_BL.any(1).sum())}
        if self.options.weight:
            totals["aligned"] = float(corrupted.extras["aligned_BL"].sum())
        return totals

    def view(self, corrupted: Corrupted, totals: dict[str, float]) -> View:
        """Return what is predicted: the rows of the micro-batch, with `complementary` once more for the second view."""
        clean, first_BL, options = corrupted.clean, corrupted.extras["first_BL"], self.options
        masks = [first_BL, clean.response_BL & ~first_BL] if options.complementary else [first_BL]
        start_BL = block_starts(clean.position_BL, options.block_size)
        sequences = max(1.0, totals["sequences"])
        ce_RL = torch.cat(
            [bound_weights(m_BL, clean.response_BL, start_BL, complementary=options.complementary) for m_BL in masks]
        )
        batch = clean if len(masks) == 1 else clean.select([*range(len(clean))] * len(masks))
        masked_RL = torch.cat(masks)
        # of two views together every response token is predicted once: their plain mean
        log_RL = masked_RL / batch.response_BL.sum(1, keepdim=True).clamp(min=1) if len(masks) > 1 else ce_RL
        return View(
            batch=batch,
            source_R=torch.arange(len(clean)).repeat(len(masks)),
            noisy_RL=self.mask(batch, masked_RL),
            masked_RL=masked_RL,
            ce_RL=ce_RL / sequences,
            path_RL=options.path_weight * ce_RL / sequences if options.path_weight else None,
            log_RL=log_RL / sequences,
        )

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        """Return this micro-batch's contribution to the loss; one pass over [clean | noisy]."""
        clean = corrupted.clean
        if not bool(clean.response_BL.any()):
            return self.empty_loss()
        view = self.view(corrupted, totals)
        noisy = list(view.noisy_RL.split(len(clean)))
        with self.backbone.capture(self.layers if self.options.weight else ()) as states:
            hidden_RLD = torch.cat(self.run_views(clean, noisy))
        losses, parts = self.token_terms(view, hidden_RLD)
        loss, teacher_flops = losses.total, 0.0
        if self.options.weight:
            align, teacher_flops = self.clean_align_term(corrupted, totals, states, resources)
            loss = loss + self.options.weight * align
            parts["align"] = align.detach()
        width = self.layout(clean, len(noisy)).width
        positions = len(clean) * width
        flops = FORWARD_AND_BACKWARD * self.backbone.flops_forward(positions, width, int(view.masked_RL.sum()))
        return LossOutput(loss, parts, flops=flops + teacher_flops, teacher_flops=teacher_flops, positions=positions)

    def clean_align_term(
        self, corrupted: Corrupted, totals: dict[str, float], states: dict[str, Tensor], resources: Resources
    ) -> tuple[Tensor, float]:
        """Return (alignment of clean rows, lambda left out; operations spent on a live teacher).

        Args:
            corrupted: the micro-batch.
            totals: of the global batch.
            states: layer -> states [B, W, D] of the pass; the clean part's columns come first and are the row's own.
            resources: holds the anchor store unless the teacher is live.
        """
        weight_BL = corrupted.extras["align_BL"] / max(1.0, totals["aligned"])
        row_M, place_M = (weight_BL > 0).nonzero(as_tuple=True)
        if not len(row_M):
            return torch.zeros((), device=weight_BL.device), 0.0
        teacher, flops = self.teacher_states(corrupted.clean, (row_M, place_M), resources)
        return alignment_loss(states, (row_M, place_M), teacher, weight_BL[row_M, place_M]), flops
