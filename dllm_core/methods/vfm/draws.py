"""All that is random in a training step, drawn for the global batch on CPU. B batch, L positions, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_core.corruption.adaptive_time import stratified
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.protocol import StepInfo
from dllm_core.methods.vfm.options import Options

TIME_MIN = 1e-3


def times_of(u_B: Tensor, at_one: float, power: float) -> Tensor:
    """Return times of uniform draws: t = 1 with probability `at_one`, otherwise density (1 + power) t^power.

    P(t <= x) = (1 - at_one) x^(1 + power) for x < 1. Nearest-embedding decoding is right up to high noise, so what
    there is to learn lies near t = 1.
    """
    continuous = 1.0 - at_one
    inside_B = (u_B / max(continuous, 1e-12)).clamp(max=1.0) ** (1.0 / (1.0 + power))
    return torch.where(u_B < continuous, inside_B, 1.0).clamp(min=TIME_MIN).float()


def maskable_prompt(batch: Batch) -> Tensor:
    """Return bool [B, L], CPU: prompt tokens that something can predict, all but a document's first."""
    batch = batch.to("cpu")
    return (batch.document_BL >= 0) & ~batch.response_BL & (batch.position_BL > 0)


def masked_prompts(batch: Batch, noise: NoiseSource, chosen_B: Tensor, *, all_of_it: bool) -> Tensor:
    """Return bool [B, L]: prompt tokens to hide for L_obs, each with r ~ U(0, 1) of the row, or all of them.

    Rows in which nothing was hidden draw again; rows not chosen, or without such a token, hide nothing.
    """
    allowed_BL = maskable_prompt(batch)
    hidden_BL = torch.zeros_like(allowed_BL)
    for row, (sample_id, epoch) in enumerate(zip(batch.sample_ids, batch.epochs, strict=True)):
        if not bool(chosen_B[row]) or not bool(allowed_BL[row].any()):
            continue
        generator = noise.generator(sample_id, epoch, "observed")
        hidden_BL[row] = allowed_BL[row] if all_of_it else False
        while not bool(hidden_BL[row].any()):
            ratio = torch.rand((), generator=generator)
            hidden_BL[row] = allowed_BL[row] & (torch.rand(batch.length, generator=generator) < ratio)
    return hidden_BL


def draw(
    batch: Batch, info: StepInfo, noise: NoiseSource, options: Options, width: int, *, paired: bool
) -> dict[str, Tensor]:
    """Return the draws of a step, each with leading dimension B.

    Args:
        batch: the global batch.
        info: where training stands.
        noise: the run's source.
        options: shares and densities.
        width: D.
        paired: the second phase.

    Returns:
        time_B: fp32; 1 for samples that are trained on the sampler's own tokens.
        noise_BLD: N(0, 1), the noise itself or what the adapter scales and shifts.
        adapter_B, paired_B: bool coins.
        observed_BL: bool; prompt tokens hidden and predicted in L_obs.
    """
    u_B = stratified(noise, batch, info.step * info.batch_size, info.batch_size)
    coins_B3 = noise.uniform(batch, "coins", (3,))
    adapter_B = coins_B3[:, 0] < options.adapter_fraction
    paired_B = (coins_B3[:, 2] < options.paired_fraction) & paired
    observes_B = adapter_B & (coins_B3[:, 1] < options.observe_fraction)
    # t = 1 on data teaches marginals, on the sampler's tokens it teaches modes: in the second phase only the latter
    at_one = 0.0 if paired else options.time_at_one
    time_B = torch.where(paired_B, 1.0, times_of(u_B, at_one, options.time_power))
    return {
        "time_B": time_B,
        "noise_BLD": noise.normal(batch, "z", (batch.length, width)),
        "adapter_B": adapter_B,
        "paired_B": paired_B,
        "observed_BL": masked_prompts(batch, noise, observes_B, all_of_it=options.prompt == "hidden"),
    }
