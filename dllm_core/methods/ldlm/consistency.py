"""Self-trajectory consistency for few steps (arXiv:2608.02602).

S segments, L slots, K latent dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from dllm_core.corruption.gaussian import TanSchedule
from dllm_core.layers.dit import Prefix
from dllm_core.methods.ldlm.networks import LatentNetworks
from dllm_core.methods.ldlm.objective import Inputs, Terms, squared_error
from dllm_core.training.ema import Ema

GRID = 16
"""Points of the grid on (0, 1] whose next one the prediction is held to."""


def next_time(t_S: Tensor) -> Tensor:
    """Return the largest multiple of 1 / 16 below t; 0 for times up to 1 / 16."""
    return ((t_S * GRID).ceil() - 1).clamp(min=0) / GRID


def gap(
    networks: LatentNetworks, ema: Ema, inputs: Inputs, found: Terms, prefix: Prefix | None, schedule: TanSchedule
) -> Tensor:
    """Return per segment the squared distance of x0_hat(x_t) from the averaged weights' x0_hat(x_s), summed over slots.

    x_s is where a deterministic step with the prediction at hand leads; s = 0 gives that prediction itself and no gap.
    The target carries no gradient.
    """
    time_S, padding_SL = inputs.time_S, inputs.padding_SL
    earlier_S = next_time(time_S)
    with torch.no_grad():
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.coefficients(time_S), schedule.coefficients(earlier_S)
        x0_SLK = found.x0_hat_SLK.detach()
        noise_SLK = (found.noisy_SLK - _wide(alpha_t, x0_SLK) * x0_SLK) / _wide(sigma_t, x0_SLK)
        x_s_SLK = _wide(alpha_s, x0_SLK) * x0_SLK + _wide(sigma_s, x0_SLK) * noise_SLK
        dtype = x0_SLK.dtype
        averages = {n: a.to(dtype) for n, a in ema.averages().items() if n.startswith("denoiser.")}
        target_SLK = functional_call(
            _Denoise(networks),
            {f"networks.{name}": average for name, average in averages.items()},
            (x_s_SLK, earlier_S, x0_SLK, prefix, padding_SL),
        )
        at_once_S = earlier_S == 0
        target_SLK = torch.where(at_once_S[:, None, None], x0_SLK, target_SLK)
    return squared_error(found.x0_hat_SLK, target_SLK, inputs.real_SL)


class _Denoise(torch.nn.Module):
    def __init__(self, networks: LatentNetworks) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, x: Tensor, t: Tensor, before: Tensor, prefix: Prefix | None, real: Tensor | None) -> Tensor:
        return self.networks.denoise(x, t, before, prefix, real)


def _wide(values_S: Tensor, like: Tensor) -> Tensor:
    return values_S.to(like)[:, None, None]
