"""The variant with a frozen base: soft masks in place of noise ("VFM-lite": no noise, no KL, no observation term).

S segments, B rows, L slots or positions, M masked tokens, D width.

A slot that is not yet decided shows E[mask] + g s mu(prompt), with g = exp(.) > 0 a learned gate and s the RMS of the
embedding table; decided tokens show their own embedding and prompts are never touched. Training decides a random part
of the response, so that decoding may take several passes: each one decides the most confident slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.corruption.masks import uniform_masks
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.protocol import Corrupted, LossOutput, Resources
from dllm_core.methods.segments import Segments, segments_of
from dllm_core.methods.single_network import FORWARD_AND_BACKWARD, gather_rows
from dllm_core.methods.token_space import per_row_mean
from dllm_core.methods.vfm.flow_map import place, run
from dllm_core.methods.vfm.shapes import adapter_flops

if TYPE_CHECKING:
    from dllm_core.methods.vfm.method import Method

FROZEN_BACKWARD = 2.0
"""A forward, and a backward that makes no gradients of weights."""


def corrupt(batch: Batch, noise: NoiseSource) -> Corrupted:
    """Draw which response tokens are undecided: r ~ U(0, 1) of a row's own."""
    masked_BL = uniform_masks(batch, noise).to(batch.input_ids_BL.device)
    return Corrupted(batch, batch.input_ids_BL, masked_BL)


def hidden_states(method: Method, batch: Batch, cut: Segments, mean_SLD: Tensor, masked_BL: Tensor) -> Tensor:
    """Return hidden_BLD with soft masks at `masked_BL` and the batch's own tokens elsewhere."""
    backbone = method.backbone
    table = backbone.model.get_input_embeddings()
    hidden_BL = method.hidden_prompt(batch)
    ids_BL = batch.input_ids_BL
    if hidden_BL is not None:
        ids_BL = ids_BL.masked_fill(hidden_BL, backbone.contract.mask_token_id)
    embedded_BLD = table(ids_BL)
    mask_D = backbone.embedding_weight_VD[backbone.contract.mask_token_id]
    soft_SLD = mask_D + (method.gate * method.flow.scale * mean_SLD).to(mask_D.dtype)
    soft_BLD = place(soft_SLD, cut, torch.zeros_like(embedded_BLD))
    embedded_BLD = torch.where(masked_BL[..., None], soft_BLD, embedded_BLD)
    return run(backbone, batch, embedded_BLD, causal=method.causal)


def loss(method: Method, corrupted: Corrupted, totals: dict[str, float], resources: Resources) -> LossOutput:
    """Return a micro-batch's contribution: mean CE over undecided tokens of a sequence, then over the sequences."""
    from dllm_core.kernels.masked_ce import token_losses

    batch, masked_BL, backbone = corrupted.clean, corrupted.masked_BL, method.backbone
    if not bool(masked_BL.any()):
        return LossOutput(torch.zeros((), device=method.device, requires_grad=True), {})
    cut = segments_of(batch)
    mean_SLD = method.posterior(batch, cut, resources).mean_SLD
    hidden_BLD = hidden_states(method, batch, cut, mean_SLD, masked_BL)
    weight_M = (per_row_mean(masked_BL) / max(1.0, totals["sequences"]))[masked_BL]
    losses = token_losses(
        gather_rows(hidden_BLD, method.predictor_rows(masked_BL)),
        backbone.head_weight_VD,
        batch.input_ids_BL[masked_BL],
        ce_M=weight_M,
        blocked_V=backbone.blocked_V,
    )
    positions, slots = batch.input_ids_BL.numel(), int(cut.real_SL.sum())
    prompt = positions / max(1, slots) - 1.0
    own = adapter_flops(method.options.sizes, backbone.hidden_size, prompt, cut.num_keys, spread=False)
    flops = FROZEN_BACKWARD * backbone.flops_forward(positions, batch.length, len(weight_M))
    parts: dict[str, Tensor | float] = {
        "ce_nats": (weight_M * losses.nll_M).sum(),
        "accuracy": (weight_M * losses.correct_M).sum(),
        "gate": float(method.gate.detach()) * float((per_row_mean(masked_BL).sum()) / totals["sequences"]),
    }
    return LossOutput(
        losses.total / (2.0 * method.options.tau**2),
        parts,
        flops=flops + FORWARD_AND_BACKWARD * own * slots,
        positions=positions,
    )


@torch.no_grad()
def decide(score_BL: Tensor, open_BL: Tensor, passes_left: int) -> Tensor:
    """Return bool [B, L]: the ceil(open / passes_left) open slots of a row with the highest score, ties by position."""
    score_BL = score_BL.masked_fill(~open_BL, -torch.inf)
    order_BL = torch.argsort(score_BL, dim=1, descending=True, stable=True)
    rank_BL = torch.empty_like(order_BL).scatter_(
        1, order_BL, torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    )
    count_B = torch.ceil(open_BL.sum(1).double() / passes_left).long()
    return open_BL & (rank_BL < count_B[:, None])
