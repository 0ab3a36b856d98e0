"""The loss of a micro-batch: L = L_data / (2 tau^2) + L_obs / (2 sigma^2) + beta KL (arXiv:2603.07276, Eq. 19).

S segments (one document's response each), B rows, L slots or positions, M tokens with a loss, D width.

    z      = mu(y) + std(y) eps for a fraction alpha of the samples, else eps           y: prompt, eps ~ N(0, 1)
    x_t    = (1 - t) x_0 + t z                                                x_0: unit-RMS embeddings of the response
    L_data = CE(response | f(x_t, t, y));  second phase, paired samples: CE(K-step sampler's tokens of z | f(z, 1, y))
    L_obs  = CE(hidden prompt tokens | f(z, 1, prompt with masks))            of the adapter's samples
    KL     = KL(q(z | y) || N(0, 1)), mean over dimensions and slots          of the adapter's samples

Both cross-entropies are nats per token, KL is nats per dimension. L_data is a mean over each sequence's response
tokens, then over the sequences of the global batch; L_obs and KL are means over the tokens of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.kernels import token_stats
from dllm_core.methods.protocol import Corrupted, LossOutput, Resources, StepInfo
from dllm_core.methods.segments import Segments, segments_of
from dllm_core.methods.single_network import FORWARD_AND_BACKWARD, gather_rows
from dllm_core.methods.vfm.adapter import Posterior
from dllm_core.methods.vfm.flow_map import unit_embeddings
from dllm_core.methods.vfm.shapes import adapter_flops

if TYPE_CHECKING:
    from dllm_core.data.batch import Batch
    from dllm_core.methods.vfm.method import Method


@dataclass
class Inputs:
    """A micro-batch cut into segments.

    Attributes:
        batch: the clean rows.
        cut: where the slots are.
        ids_SL: tokens to predict; data, or what the sampler made of the same noise.
        time_S: times.
        z_SLD: noise, fp32.
        posterior: of the adapter's segments; None if there is none.
        chosen_S: bool; the adapter's segments.
        observed_BL: bool; prompt tokens hidden for L_obs.
        hidden_BL: bool; prompt tokens that the map does not see in any case; None: it sees all.
    """

    batch: Batch
    cut: Segments
    ids_SL: Tensor
    time_S: Tensor
    z_SLD: Tensor
    posterior: Posterior | None
    chosen_S: Tensor
    observed_BL: Tensor
    hidden_BL: Tensor | None


def batch_totals(corrupted: Corrupted) -> dict[str, float]:
    """Return the denominators: sequences (all, at t = 1 on data, paired), the adapter's slots, hidden prompt tokens."""
    extras, response_BL = corrupted.extras, corrupted.masked_BL
    some_B = response_BL.any(1)
    paired_B = extras["paired_B"] & some_B
    return {
        "sequences": float(some_B.sum()),
        "paired": float(paired_B.sum()),
        "at_one": float((some_B & ~paired_B & (extras["time_B"] >= 1.0)).sum()),
        "adapter_slots": float(response_BL[extras["adapter_B"]].sum()),
        "observed": float((extras["observed_BL"] & some_B[:, None]).sum()),
    }


def prepare_inputs(method: Method, corrupted: Corrupted, resources: Resources) -> Inputs:
    """Cut the rows and draw z from the adapter where the coins say so."""
    batch, extras = corrupted.clean, corrupted.extras
    cut = segments_of(batch)
    z_SLD = cut.slots(extras["noise_BLD"]).float()
    chosen_S = cut.of_rows(extras["adapter_B"])
    posterior = None
    if bool(chosen_S.any()):
        rows = chosen_S.nonzero(as_tuple=True)[0]
        posterior = method.posterior(batch, cut, resources, rows)
        z_SLD = z_SLD.index_copy(0, rows, posterior.sample(z_SLD[rows]))
    return Inputs(
        batch=batch,
        cut=cut,
        ids_SL=cut.slots(batch.input_ids_BL),
        time_S=cut.of_rows(extras["time_B"]),
        z_SLD=z_SLD,
        posterior=posterior,
        chosen_S=chosen_S,
        observed_BL=extras["observed_BL"],
        hidden_BL=method.hidden_prompt(batch),
    )


@torch.no_grad()
def roll_out(method: Method, inputs: Inputs, paired_B: Tensor) -> float:
    """Replace the targets of paired rows by the most probable tokens of the teacher's K-step sampler from the same z.

    Returns:
        Operations spent.
    """
    rows = (paired_B & inputs.batch.response_BL.any(1)).nonzero(as_tuple=True)[0]
    if len(rows) == 0:
        return 0.0
    batch = inputs.batch.select(rows.tolist())
    cut = segments_of(batch)
    of_S = paired_B[inputs.cut.row_S].nonzero(as_tuple=True)[0]
    hidden_BL = None if inputs.hidden_BL is None else inputs.hidden_BL[rows]
    steps, slots = method.options.rollout_steps, cut.real_SL.shape[1]
    with method.measuring(), method.teacher.in_place_of(method.map_parameters()):
        rows_MD = method.flow.sample(
            method.backbone, batch, cut, inputs.z_SLD[of_S, :slots], steps, method.shift, hidden_BL
        )
        found = token_stats.stats(rows_MD, method.backbone.head_weight_VD, method.backbone.blocked_V, second=False)
    targets_SL = inputs.ids_SL[of_S]
    targets_SL[:, :slots][cut.real_SL] = found.argmax_M
    inputs.ids_SL = inputs.ids_SL.index_copy(0, of_S, targets_SL)
    positions, scored = batch.input_ids_BL.numel(), len(rows_MD)
    heads = (2 * steps - 1) * scored  # softmax . E is as large a product as the logits
    return steps * method.backbone.flops_forward(positions, batch.length, 0) + heads * method.head_flops


def slot_weights(inputs: Inputs, sequences: float) -> Tensor:
    """Return weight_SL: 1 / (response tokens of the row) / sequences of the global batch."""
    tokens_B = inputs.batch.response_BL.sum(1).clamp(min=1)
    weight_S = 1.0 / (inputs.cut.of_rows(tokens_B).float() * max(1.0, sequences))
    return weight_S[:, None].expand(inputs.cut.real_SL.shape)


def data_terms(
    method: Method, inputs: Inputs, totals: dict[str, float], paired_S: Tensor
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Return (contribution to L_data, parts to log)."""
    from dllm_core.kernels.masked_ce import token_losses

    cut, real_SL = inputs.cut, inputs.cut.real_SL
    x0_SLD = unit_embeddings(method.backbone.embedding_weight_VD, inputs.ids_SL)
    t_S11 = inputs.time_S[:, None, None]
    x_SLD = (1.0 - t_S11) * x0_SLD + t_S11 * inputs.z_SLD
    hidden_BLD, gate_SD = method.flow(method.backbone, inputs.batch, cut, x_SLD, inputs.time_S, inputs.hidden_BL)
    rows_MD = method.flow.rows(hidden_BLD, gate_SD, cut, x_SLD, method.shift)
    weight_M = slot_weights(inputs, totals["sequences"])[real_SL]
    losses = token_losses(
        rows_MD,
        method.backbone.head_weight_VD,
        inputs.ids_SL[real_SL],
        ce_M=weight_M,
        blocked_V=method.backbone.blocked_V,
    )
    paired_M = paired_S[:, None].expand(real_SL.shape)[real_SL]
    one_M = (inputs.time_S >= 1.0)[:, None].expand(real_SL.shape)[real_SL] & ~paired_M
    weighed_M, sequences = weight_M * losses.nll_M, max(1.0, totals["sequences"])
    flow = max(1.0, totals["sequences"] - totals["paired"]) / sequences
    parts: dict[str, Tensor | float] = {
        "ce_nats": weighed_M[~paired_M].sum() / flow,
        "accuracy": (weight_M * losses.correct_M)[~paired_M].sum() / flow,
    }
    if totals["at_one"]:
        parts["ce_one_pass_nats"] = weighed_M[one_M].sum() * sequences / totals["at_one"]
    if totals["paired"]:
        share = sequences / totals["paired"]
        parts["paired_nats"] = weighed_M[paired_M].sum() * share
        parts["paired_accuracy"] = (weight_M * losses.correct_M)[paired_M].sum() * share
    return losses.total, parts


def observed_term(method: Method, inputs: Inputs, totals: dict[str, float]) -> tuple[Tensor, float] | None:
    """Return (contribution to L_obs, operations), None where no prompt token is hidden for it."""
    from dllm_core.kernels.masked_ce import token_losses

    (rows,) = (inputs.observed_BL.any(1) & inputs.batch.response_BL.any(1)).nonzero(as_tuple=True)
    if len(rows) == 0:
        return None
    batch, masked_BL = inputs.batch.select(rows.tolist()), inputs.observed_BL[rows]
    cut = segments_of(batch)
    of_S = torch.isin(inputs.cut.row_S, rows).nonzero(as_tuple=True)[0]
    z_SLD = inputs.z_SLD[of_S, : cut.real_SL.shape[1]]
    hidden_BL = masked_BL if inputs.hidden_BL is None else masked_BL | inputs.hidden_BL[rows]
    one_S = torch.ones(len(cut), device=z_SLD.device)
    hidden_BLD, _ = method.flow(method.backbone, batch, cut, z_SLD, one_S, hidden_BL)
    losses = token_losses(
        gather_rows(hidden_BLD, method.predictor_rows(masked_BL)),
        method.backbone.head_weight_VD,
        batch.input_ids_BL[masked_BL],
        ce_M=torch.full((int(masked_BL.sum()),), 1.0 / totals["observed"], device=z_SLD.device),
        blocked_V=method.backbone.blocked_V,
    )
    positions = batch.input_ids_BL.numel()
    flops = method.backbone.flops_forward(positions, batch.length, int(masked_BL.sum()))
    return losses.total, FORWARD_AND_BACKWARD * flops


def kl_weight(method: Method, info: StepInfo) -> float:
    """Return beta: a linear rise from 0 over the first part of the run."""
    warmup = method.options.kl_warmup * info.total_steps
    return method.options.kl_weight * (min(1.0, info.step / warmup) if warmup else 1.0)


def loss(
    method: Method, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources
) -> LossOutput:
    """Return a micro-batch's contribution to the loss of either phase."""
    options, backbone = method.options, method.backbone
    if not bool(corrupted.masked_BL.any()):
        return LossOutput(torch.zeros((), device=method.device, requires_grad=True), {})
    inputs = prepare_inputs(method, corrupted, resources)
    batch, slots = inputs.batch, int(inputs.cut.real_SL.sum())
    paired_B = corrupted.extras["paired_B"]
    flops = roll_out(method, inputs, paired_B)
    data, parts = data_terms(method, inputs, totals, inputs.cut.of_rows(paired_B))
    flops += FORWARD_AND_BACKWARD * backbone.flops_forward(batch.input_ids_BL.numel(), batch.length, slots)
    total = data / (2.0 * options.tau**2)
    parts["data_nats"] = data.detach()
    observed = observed_term(method, inputs, totals)
    if observed is not None:
        total = total + observed[0] / (2.0 * options.sigma**2)
        parts["observed_nats"] = observed[0].detach()
        flops += observed[1]
    if inputs.posterior is not None:
        real_SL = inputs.cut.real_SL[inputs.chosen_S]
        kl = inputs.posterior.kl_SL()[real_SL].sum() / max(1.0, totals["adapter_slots"])
        total = total + kl_weight(method, info) * kl
        parts["kl_nats_per_dim"] = kl.detach()
        ratio = batch.input_ids_BL.numel() / max(1, slots) - 1.0
        own = adapter_flops(options.sizes, backbone.hidden_size, ratio, inputs.cut.num_keys)
        flops += FORWARD_AND_BACKWARD * own * int(real_SL.sum())
    return LossOutput(total, parts, flops=flops, positions=batch.input_ids_BL.numel())
