"""The losses of Cola DLM (arXiv:2605.06548). Every mean is over tokens of the global batch.

S spans, T slots, N noisy slots, K latent dimension, D width of the frozen states, V vocabulary, M tokens.

    z       = mu(h) + sigma(h) eps                                  h: frozen states, standardised per dimension
    L_vae   = CE(x, Dec(z)) + beta KL / K + lambda CE(x_m, Dec(z(h without rows m)))
    c       = (sg(z) - shift) / scale                               statistics of the first phase's end, frozen
    L_flow  = |v(c_t of block b, t; c of blocks < b) - (eps - c)|^2 / K,  c_t = (1 - t) c + t eps
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_core.corruption.gaussian import LinearPath, diffuse
from dllm_core.methods.cola.networks import ColaNetworks, Decoder, Posterior, Prior
from dllm_core.methods.cola.options import Options

Parts = dict[str, Tensor | float]


def kl_to_standard(q: Posterior) -> Tensor:
    """Return KL(q || N(0, I)) per slot and dimension, in nats, fp32: (mu^2 + sigma^2 - 1 - log sigma^2) / 2."""
    mean, log_variance = q.mean.float(), q.log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)


def kl_between(q: Posterior, r: Posterior) -> Tensor:
    """Return KL(q || r) per slot and dimension, in nats, fp32."""
    difference = q.log_variance.float() - r.log_variance.float()
    shift = (q.mean.float() - r.mean.float()).square() * (-r.log_variance.float()).exp()
    return 0.5 * (shift + difference.exp() - 1.0 - difference)


def mean_over(per_slot_ST: Tensor, chosen_ST: Tensor, denominator: float) -> Tensor:
    """Return the sum over chosen slots, divided."""
    return (per_slot_ST * chosen_ST).sum() / max(1.0, denominator)


def read_tokens(
    decoder: Decoder, z_STK: Tensor, ids_ST: Tensor, weight_ST: Tensor, head_VD: Tensor, denominator: float
) -> tuple[Tensor, Tensor]:
    """Return (weighted mean cross-entropy with gradient, weighted share of tokens that are predicted)."""
    from dllm_core.kernels.masked_ce import token_losses

    outputs_STD = decoder(z_STK)
    chosen_ST = weight_ST > 0
    weight_M = weight_ST[chosen_ST] / max(1.0, denominator)
    losses = token_losses(outputs_STD[chosen_ST], head_VD, ids_ST[chosen_ST], ce_M=weight_M)
    return losses.total, (weight_M * losses.correct_M).sum()


@dataclass(frozen=True)
class VaeInputs:
    """What the autoencoder's loss reads of a micro-batch.

    Attributes:
        states_STD: standardised states.
        ids_ST: tokens.
        response_ST: bool; response tokens.
        noise_STK: of the posterior.
        weight_ST: weight in the token loss.
        masked_ST, masked_noise_STK: hidden rows of the masked view and its noise; None without one.
    """

    states_STD: Tensor
    ids_ST: Tensor
    response_ST: Tensor
    noise_STK: Tensor
    weight_ST: Tensor
    masked_ST: Tensor | None
    masked_noise_STK: Tensor | None


def vae_loss(
    networks: ColaNetworks,
    inputs: VaeInputs,
    head_VD: Tensor,
    totals: dict[str, float],
    options: Options,
    *,
    moves: bool,
) -> tuple[Tensor, Parts, Posterior]:
    """Return (loss, what is logged, the posterior).

    Args:
        networks: what is trained.
        inputs: a micro-batch.
        head_VD: rows along which tokens are read out.
        totals: denominators of the global batch.
        options: weights.
        moves: False keeps the encoder as it is; the decoder alone learns.
    """
    tokens, response_ST = totals["tokens"], inputs.response_ST
    with torch.set_grad_enabled(moves and torch.is_grad_enabled()):
        q = networks.encoder(inputs.states_STD)
        z_STK = q.sample(inputs.noise_STK)
    nats, correct = read_tokens(networks.decoder, z_STK, inputs.ids_ST, inputs.weight_ST, head_VD, tokens)
    kl = mean_over(kl_to_standard(q).mean(-1), response_ST, tokens)
    loss = nats + options.beta * kl
    parts: Parts = {
        "reconstruction_nats": nats.detach(),
        "reconstruction_accuracy": correct,
        "kl_per_dimension": kl.detach(),
        "posterior_mean_square": mean_over(q.mean.detach().float().square().mean(-1), response_ST, tokens),
        "posterior_variance": mean_over(q.log_variance.detach().float().exp().mean(-1), response_ST, tokens),
    }
    if inputs.masked_ST is not None and inputs.masked_noise_STK is not None:
        with torch.set_grad_enabled(moves and torch.is_grad_enabled()):
            hidden_STK = networks.encoder(inputs.states_STD, inputs.masked_ST).sample(inputs.masked_noise_STK)
        weight_ST, count = inputs.masked_ST.float(), totals["masked_tokens"]
        masked, found = read_tokens(networks.decoder, hidden_STK, inputs.ids_ST, weight_ST, head_VD, count)
        loss = loss + options.masked_weight * masked
        parts |= {"masked_nats": masked.detach(), "masked_accuracy": found}
    return loss, parts, q


@dataclass(frozen=True)
class FlowInputs:
    """What the flow loss reads of a micro-batch: T slots, of which the noisy half holds those from `first` on.

    Attributes:
        latents_STK: standardised, without gradient.
        noise_STK: N(0, 1).
        time_S: of each span.
        real_ST: bool; slots that are no padding.
        known_ST: bool; slots at t = 0, without loss.
        alone_ST: bool; slots of blocks without what comes before.
        num_clean: C, slots of the clean half.
        first: first slot of the noisy half.
    """

    latents_STK: Tensor
    noise_STK: Tensor
    time_S: Tensor
    real_ST: Tensor
    known_ST: Tensor
    alone_ST: Tensor
    num_clean: int
    first: int


def velocities(prior: Prior, inputs: FlowInputs) -> tuple[Tensor, Tensor]:
    """Return (predicted, true) velocities [S, N, K] in the [clean | noisy] layout."""
    clean_STK, first = inputs.latents_STK.detach(), inputs.first
    slot_ST = torch.arange(clean_STK.shape[1], device=clean_STK.device).expand(clean_STK.shape[:2])
    context = None
    if inputs.num_clean:
        c = slice(0, inputs.num_clean)
        context = prior.clean(clean_STK[:, c], slot_ST[:, c], inputs.real_ST[:, c])
    noisy_STK = diffuse(clean_STK, inputs.noise_STK, inputs.time_S, LinearPath())
    noisy_STK = torch.where(inputs.known_ST[..., None], clean_STK, noisy_STK)
    predicted_SNK = prior.velocity(
        noisy_STK[:, first:],
        inputs.time_S,
        slot_ST[:, first:],
        inputs.real_ST[:, first:],
        context,
        inputs.known_ST[:, first:],
        inputs.alone_ST[:, first:],
    )
    return predicted_SNK, (inputs.noise_STK - clean_STK)[:, first:]


def flow_error(prior: Prior, inputs: FlowInputs) -> tuple[Tensor, Tensor]:
    """Return (squared error [S, N], a mean over dimensions, fp32; slots that count, bool)."""
    predicted_SNK, true_SNK = velocities(prior, inputs)
    error_SN = (predicted_SNK.float() - true_SNK.float()).square().mean(-1)
    return error_SN, (inputs.real_ST & ~inputs.known_ST)[:, inputs.first :]
