"""Masked diffusion aligned with the frozen model it came from. B batch, L length, R forwarded rows, D hidden."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from dllm_core.corruption.masks import subset_weights
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.errors import DllmError
from dllm_core.methods.layer_rule import layer_names
from dllm_core.methods.protocol import Corrupted, LossOutput, Resources, StepInfo
from dllm_core.methods.random_mask.method import Method as RandomMaskMethod
from dllm_core.methods.repr_align.alignment import alignment_loss, read_anchors
from dllm_core.methods.repr_align.options import Options
from dllm_core.methods.requirements import RoomOptions
from dllm_core.methods.single_network import gather_rows
from dllm_core.methods.token_space import View

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone


class Method(RandomMaskMethod):
    """`L = L_mdm + w_path * L_path + lambda * L_align` (arXiv:2605.06885).

    L_align = 1 - cos(student state, frozen teacher state), averaged over all aligned positions of the global batch and
    over the layers, every position and layer alike (not first within a sequence, unlike L_mdm). Aligned are the
    positions whose next token is masked; the teacher is the starting checkpoint, causal, on clean tokens. With
    `token_fraction` < 1 a keyed subset of each sequence's positions is drawn anew each step and weighted up by
    (positions / drawn), which is unbiased.

    Under the same-position alignment the student's state at a masked token j is compared with the teacher's at j - 1:
    in both alignments the two states are those that predict token j.

    Cost: with cached teacher states one forward and backward; a live teacher adds one forward.
    """

    options: Options

    def __init__(self, backbone: Backbone, options: Options) -> None:
        super().__init__(backbone, options)
        self.layers = layer_names(options.layers, backbone.num_layers)
        # kept out of the module tree: it is no part of the model, its optimiser or its checkpoints
        self._teacher: tuple[Backbone, ...] = ()
        if options.teacher == "live" and options.weight > 0:
            self._teacher = (copy.deepcopy(backbone).eval().requires_grad_(False),)

    @classmethod
    def from_pretrained(
        cls, directory: Path, options: RoomOptions, *, dtype: torch.dtype, device: torch.device | str
    ) -> Self:
        """Load a trained model. It has no live teacher: that is the *starting* checkpoint, not this one."""
        method = super().from_pretrained(directory, options, dtype=dtype, device=device)
        method._teacher = ()
        return method

    def corrupt(self, batch: Batch, info: StepInfo, noise: NoiseSource) -> Corrupted:
        """Draw the masks and the positions to align."""
        corrupted = super().corrupt(batch, info, noise)
        weight_BL = subset_weights(corrupted.masked_BL.cpu(), batch, noise, self.options.token_fraction, "align")
        corrupted.extras["align_BL"] = weight_BL.to(batch.input_ids_BL.device)
        return corrupted

    def totals(self, corrupted: Corrupted) -> dict[str, float]:
        """Return the sequences that carry a loss and the positions that could be aligned."""
        return {**super().totals(corrupted), "aligned": float(corrupted.masked_BL.sum())}

    def view(self, corrupted: Corrupted, totals: dict[str, float]) -> View:
        """Return the random-masked view with the alignment weights."""
        view = super().view(corrupted, totals)
        view.align_RL = corrupted.extras["align_BL"] / max(1.0, totals["aligned"])
        return view

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        """Return this micro-batch's contribution to the loss."""
        view = self.view(corrupted, totals)
        return self.aligned_loss(corrupted.clean, view, resources)

    def aligned_loss(self, batch: Batch, view: View, resources: Resources) -> LossOutput:
        """Return the token terms of a view plus lambda times its alignment term.

        Args:
            batch: the sequences of the micro-batch, once each; `view.source_R` points into it.
            view: what is forwarded.
            resources: holds the anchor store unless the teacher is live.
        """
        if not bool(view.masked_RL.any()):
            return self.empty_loss()
        aligning = self.options.weight > 0 and view.align_RL is not None
        with self.backbone.capture(self.layers if aligning else ()) as states:
            hidden_RLD = self.run(view.batch, view.noisy_RL)
        losses, parts = self.token_terms(view, hidden_RLD)
        loss, teacher_flops = losses.total, 0.0
        if aligning:
            align, teacher_flops = self.align_term(batch, view, states, resources)
            loss = loss + self.options.weight * align
            parts["align"] = align.detach()
        flops = self.training_flops(view) + teacher_flops
        return LossOutput(loss, parts, flops=flops, teacher_flops=teacher_flops, positions=view.masked_RL.numel())

    def align_term(
        self, batch: Batch, view: View, states: dict[str, Tensor], resources: Resources
    ) -> tuple[Tensor, float]:
        """Return (weighted alignment of a view, lambda left out; operations spent on a live teacher)."""
        assert view.align_RL is not None
        aligned_RL = view.align_RL > 0
        row_M, token_M = aligned_RL.nonzero(as_tuple=True)
        teacher_rows = (view.source_R.to(row_M.device)[row_M], token_M - 1)
        teacher, flops = self.teacher_states(batch, teacher_rows, resources)
        student_rows = self.predictor_rows(aligned_RL)
        return alignment_loss(states, student_rows, teacher, view.align_RL[aligned_RL]), flops

    def teacher_states(
        self, batch: Batch, rows: tuple[Tensor, Tensor], resources: Resources
    ) -> tuple[dict[str, Tensor], float]:
        """Return (layer -> clean causal states [M, D] at `rows`, without gradient; operations spent here).

        Raises:
            DllmError: neither an anchor store nor a live teacher is there.
            StoreError: the store lacks a row, or belongs to something else.
        """
        if self._teacher:
            return self._live_states(batch, rows)
        if resources.anchors is None:
            raise DllmError(
                "Alignment needs the frozen teacher's states, and no anchor store was given.",
                "Pass Resources(anchors=...), or set the option teacher: live on a freshly converted model.",
            )
        return read_anchors(resources.anchors, batch.sequence_keys, self.layers, rows), 0.0

    def _live_states(self, batch: Batch, rows: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], float]:
        teacher = self._teacher[0].to(device=self.backbone.device, dtype=self.backbone.embedding_weight_VD.dtype)
        document_BL = None if batch.is_plain else batch.document_BL
        with torch.no_grad(), teacher.capture(self.layers) as states:
            teacher.hidden(batch.input_ids_BL, causal=True, document_BL=document_BL, position_BL=batch.position_BL)
        sequences, length = batch.input_ids_BL.shape
        flops = teacher.flops_forward(sequences * length, length, 0)
        return {layer: gather_rows(states_BLD, rows) for layer, states_BLD in states.items()}, flops
