"""The loss of a micro-batch: L = L_diff + L_h + w L_w (arXiv:2605.07933, Eq. 2 and 5).

S segments, L slots, K latent dimension, D width of the frozen states, M tokens of the token loss, V vocabulary.

    z      = E_z(h)                                          h: frozen states, standardised per dimension
    L_h    = |D_z(z + sigma_dec eps) - h|^2 / D                    trains E_z and D_z
    z~     = sg(z) + gamma (z - sg(z))                             gamma rises from about 0 to 1
    L_diff = |z~ - x_theta(alpha z~ + sigma eps, t, x_sc)|^2 / K   trains the denoiser, and E_z as gamma lets it
    L_w    = CE(w, D_w(sg(h or decoded h)))                        trains D_w (and a token head of its own) alone

Every mean is over the response tokens of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_core.corruption.gaussian import TanSchedule, diffuse
from dllm_core.layers.dit import Prefix
from dllm_core.methods.ldlm.networks import LatentNetworks
from dllm_core.training.gradient_gate import scale_gradient

if TYPE_CHECKING:
    from dllm_core.kernels.masked_ce import TokenLosses


@dataclass
class Inputs:
    """A micro-batch as the networks see it.

    Attributes:
        states_SLD: standardised states, 0 in padding.
        ids_SL: tokens.
        real_SL: bool; slots that are no padding.
        prompt_SPD: what the prompt encoder reads; None without prompts.
        visible_SP: bool; prompt tokens that this step may see.
        time_S: noise level.
        noise_SLK, decoder_noise_SLK: N(0, 1).
        self_condition_S, true_states_S: bool coins.
        token_weight_SL: weight in the token loss.
        gamma: gate of the gradient into the encoder.
    """

    states_SLD: Tensor
    ids_SL: Tensor
    real_SL: Tensor
    prompt_SPD: Tensor | None
    visible_SP: Tensor | None
    time_S: Tensor
    noise_SLK: Tensor
    decoder_noise_SLK: Tensor
    self_condition_S: Tensor
    true_states_S: Tensor
    token_weight_SL: Tensor
    gamma: float

    @property
    def padding_SL(self) -> Tensor | None:
        """`real_SL` for the networks: None where nothing is padding."""
        return None if bool(self.real_SL.all()) else self.real_SL


@dataclass
class Terms:
    """What the loss is made of; sums over real slots, not yet divided.

    Attributes:
        diffusion_S, states_S: per segment, summed over slots, mean over dimensions.
        tokens: token losses in nats.
        correct_M, true_M: bool, of the tokens in the token loss: predicted; from true states.
        weight_M: their weights.
        x0_hat_SLK: prediction, with gradient.
        noisy_SLK: what it was predicted from.
        latents_SLK: z, detached.
    """

    diffusion_S: Tensor
    states_S: Tensor
    tokens: TokenLosses
    correct_M: Tensor
    true_M: Tensor
    weight_M: Tensor
    x0_hat_SLK: Tensor
    noisy_SLK: Tensor
    latents_SLK: Tensor


def squared_error(a_SLX: Tensor, b_SLX: Tensor, real_SL: Tensor) -> Tensor:
    """Return per segment the sum over real slots of the mean squared difference over dimensions, fp32."""
    per_slot_SL = (a_SLX.float() - b_SLX.float()).square().mean(-1)
    return (per_slot_SL * real_SL).sum(1)


def predict(
    networks: LatentNetworks, inputs: Inputs, noisy_SLK: Tensor, prefix: Prefix | None, padding_SL: Tensor | None
) -> Tensor:
    """Return the denoiser's x0_hat; where the coin says so, with a first prediction of its own at hand."""
    before_SLK = torch.zeros_like(noisy_SLK)
    (chosen_R,) = inputs.self_condition_S.nonzero(as_tuple=True)
    if len(chosen_R):
        with torch.no_grad():
            first_RLK = networks.denoise(
                noisy_SLK[chosen_R],
                inputs.time_S[chosen_R],
                None,
                None if prefix is None else prefix.select(chosen_R),
                None if padding_SL is None else padding_SL[chosen_R],
            )
        before_SLK = before_SLK.index_copy(0, chosen_R, first_RLK)
    return networks.denoise(noisy_SLK, inputs.time_S, before_SLK, prefix, padding_SL)


def token_loss(
    networks: LatentNetworks, inputs: Inputs, decoded_SLD: Tensor, head_VD: Tensor, denominator: float
) -> tuple[TokenLosses, Tensor, Tensor]:
    """Return (losses whose total is the weighted mean, true_M, weight_M) of the tokens that are drawn."""
    from dllm_core.kernels.masked_ce import token_losses

    read_SLD = torch.where(inputs.true_states_S[:, None, None], inputs.states_SLD, decoded_SLD.detach())
    outputs_SLD = networks.token_decoder(read_SLD, inputs.padding_SL)
    chosen_SL = inputs.token_weight_SL > 0
    weight_M = inputs.token_weight_SL[chosen_SL]
    true_M = inputs.true_states_S[:, None].expand_as(chosen_SL)[chosen_SL]
    losses = token_losses(
        outputs_SLD[chosen_SL], head_VD, inputs.ids_SL[chosen_SL], ce_M=weight_M / max(1.0, denominator)
    )
    return losses, true_M, weight_M


def terms(
    networks: LatentNetworks,
    inputs: Inputs,
    head_VD: Tensor,
    schedule: TanSchedule,
    decoder_noise: float,
    denominator: float,
) -> tuple[Terms, Prefix | None]:
    """Run everything forward.

    Args:
        networks: what is trained.
        inputs: a micro-batch.
        head_VD: rows along which tokens are read out.
        schedule: of the diffusion.
        decoder_noise: sigma_dec.
        denominator: response tokens of the global batch.
    """
    padding_SL, real_SL = inputs.padding_SL, inputs.real_SL
    z_SLK = networks.encode(inputs.states_SLD, padding_SL)
    decoded_SLD = networks.latent_decoder(z_SLK + decoder_noise * inputs.decoder_noise_SLK, padding_SL)
    tokens, true_M, weight_M = token_loss(networks, inputs, decoded_SLD, head_VD, denominator)

    target_SLK = scale_gradient(z_SLK, inputs.gamma)
    noisy_SLK = diffuse(target_SLK, inputs.noise_SLK, inputs.time_S, schedule)
    prefix = networks.prompt(inputs.prompt_SPD, inputs.visible_SP)
    x0_hat_SLK = predict(networks, inputs, noisy_SLK, prefix, padding_SL)
    found = Terms(
        diffusion_S=squared_error(target_SLK, x0_hat_SLK, real_SL),
        states_S=squared_error(decoded_SLD, inputs.states_SLD, real_SL),
        tokens=tokens,
        correct_M=tokens.correct_M,
        true_M=true_M,
        weight_M=weight_M,
        x0_hat_SLK=x0_hat_SLK,
        noisy_SLK=noisy_SLK,
        latents_SLK=z_SLK.detach(),
    )
    return found, prefix
