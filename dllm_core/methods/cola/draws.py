"""All that is random in a training step, drawn for the global batch. B batch, T positions of a row, K latent size."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_core.corruption.adaptive_time import stratified
from dllm_core.corruption.masks import subset_weights
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.cola.flow import logit_normal
from dllm_core.methods.cola.options import Options
from dllm_core.methods.protocol import StepInfo

VAE, PRIOR = "vae", "prior"


def trains_vae(options: Options, phase: str) -> bool:
    """Return whether the autoencoder's loss is part of a phase."""
    return phase == VAE or options.joint


def draw(batch: Batch, info: StepInfo, noise: NoiseSource, options: Options) -> dict[str, Tensor]:
    """Return the draws of a step, each with leading dimension B, on CPU.

    Returns:
        posterior_BTK: N(0, 1).
        For the autoencoder: masked_BT, response rows that the masked view hides; masked_posterior_BTK, its noise;
        token_weight_BT, 0 for tokens left out of the token loss, else tokens / tokens drawn.
        For the prior: time_B; flow_BTK, z_1; known_BT, slots at t = 0 (prompts, and the beginnings of chosen blocks);
        alone_BT, slots of blocks that do not see what comes before.
    """
    shape = (batch.length, options.sizes.latent_dim)
    response_BT = batch.response_BL.cpu()
    found = {"posterior_BTK": noise.normal(batch, "posterior", shape)}
    if trains_vae(options, info.phase):
        found["token_weight_BT"] = subset_weights(response_BT, batch, noise, options.token_fraction, "tokens")
        if options.masked_weight:
            found["masked_BT"] = response_BT & (noise.uniform(batch, "masked", shape[:1]) < options.masked_share)
            found["masked_posterior_BTK"] = noise.normal(batch, "masked posterior", shape)
    if info.phase == PRIOR:
        u_B = stratified(noise, batch, info.step * info.batch_size, info.batch_size)
        found["time_B"] = logit_normal(u_B, options.time_location, options.time_scale).float()
        found["flow_BTK"] = noise.normal(batch, "flow", shape)
        found |= block_draws(batch, noise, options)
    return found


def block_draws(batch: Batch, noise: NoiseSource, options: Options) -> dict[str, Tensor]:
    """Return known_BT and alone_BT: one coin a block, and the length of its known beginning, 1 to block_size - 1."""
    position_BT, size = batch.position_BL.cpu(), options.block_size
    inside_BT = position_BT % size
    first_BT = (torch.arange(batch.length) - inside_BT).clamp(min=0)  # where in the row the block begins
    coins_BT3 = noise.uniform(batch, "blocks", (batch.length, 3))
    chosen, length, dropped = (coins_BT3[..., i].gather(1, first_BT) for i in range(3))
    prefix_BT = (chosen < options.clean_prefix) & (inside_BT < 1 + (length * (size - 1)).floor()) & (size > 1)
    return {"known_BT": prefix_BT | ~batch.response_BL.cpu(), "alone_BT": dropped < options.prefix_drop}
