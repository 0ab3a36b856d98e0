"""All that is random in a training step, drawn for the global batch. B batch, T positions of a row, K latent size."""

from __future__ import annotations

from torch import Tensor

from dllm_core.corruption.adaptive_time import AdaptiveTimes, stratified
from dllm_core.corruption.masks import subset_weights
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.ldlm.options import Options
from dllm_core.methods.protocol import StepInfo

TIME_MIN = 1e-3


def draw(
    batch: Batch, info: StepInfo, noise: NoiseSource, options: Options, times: AdaptiveTimes, latent_dim: int
) -> dict[str, Tensor]:
    """Return the draws of a step, each with leading dimension B, on CPU.

    Returns:
        time_B: noise level of the diffusion, fp32.
        noise_BTK, decoder_noise_BTK: N(0, 1).
        self_condition_B, drop_prompt_B, true_states_B: bool coins.
        token_weight_BT: 0 for tokens that are left out of the token loss, else tokens / tokens drawn.
    """
    u_B = stratified(noise, batch, info.step * info.batch_size, info.batch_size)
    time_B = times.times(u_B) if options.adaptive_times else TIME_MIN + (1 - TIME_MIN) * u_B
    coins_B3 = noise.uniform(batch, "coins", (3,))
    shape = (batch.length, latent_dim)
    return {
        "time_B": time_B.float(),
        "noise_BTK": noise.normal(batch, "diffusion", shape),
        "decoder_noise_BTK": noise.normal(batch, "decoder", shape),
        "self_condition_B": coins_B3[:, 0] < options.self_condition,
        "drop_prompt_B": coins_B3[:, 1] < options.prompt_drop,
        "true_states_B": coins_B3[:, 2] < options.true_states,
        "token_weight_BT": subset_weights(batch.response_BL.cpu(), batch, noise, options.token_fraction, "tokens"),
    }


def weight_totals(response_BT: Tensor, extras: dict[str, Tensor]) -> dict[str, float]:
    """Return the denominators: response tokens, and those whose token loss reads true or decoded states."""
    weight_BT = extras["token_weight_BT"]
    true_BT = extras["true_states_B"][:, None].to(weight_BT.device)
    return {
        "tokens": float(response_BT.sum()),
        "true_tokens": float((weight_BT * true_BT).sum()),
        "decoded_tokens": float((weight_BT * ~true_BT).sum()),
        "samples": float(len(response_BT)),
    }
