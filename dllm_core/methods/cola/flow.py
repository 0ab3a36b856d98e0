"""Flow matching on latents (arXiv:2210.02747): its times, guidance, and the Euler solver of blocks.

z_t = (1 - t) z_0 + t z_1 with z_1 ~ N(0, I): t = 0 is clean, dz/dt = z_1 - z_0. S rows, N slots, K latent dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(z_t [S, N, K], t [S]) -> dz/dt."""

_EDGE = 1e-6


def logit_normal(u_S: Tensor, location: float, scale: float) -> Tensor:
    """Return sigmoid(location + scale Phi^-1(u)): logit-normal times of uniform draws."""
    return torch.sigmoid(location + scale * torch.special.ndtri(u_S.double().clamp(_EDGE, 1 - _EDGE)))


def linear_slope(t: Tensor) -> Tensor:
    """Return a of the best linear guess a z_t of the velocity, for latents of mean 0 and variance 1."""
    return (2.0 * t - 1.0) / ((1.0 - t).square() + t.square())


def guided(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """Return v_u + scale (v_c - v_u); the conditional one itself at scale 1."""
    if scale == 1.0:
        return conditional

    def velocity(x_SNK: Tensor, t_S: Tensor) -> Tensor:
        without = unconditional(x_SNK, t_S)
        return without + scale * (conditional(x_SNK, t_S) - without)

    return velocity


def steps_of_blocks(num_steps: int, num_blocks: int) -> list[int]:
    """Return the Euler steps of each block: `num_steps` in all, the first blocks one more; at least one each."""
    least, more = divmod(max(num_steps, num_blocks), max(1, num_blocks))
    return [least + (b < more) for b in range(num_blocks)]


def time_grid(steps_S: list[int]) -> Tensor:
    """Return times [S, longest + 1], fp32: each row falls from 1 to 0 in equal steps and stays there.

    A row without steps is all 0.
    """
    longest = max(steps_S, default=0)
    step_SM = torch.arange(longest + 1, dtype=torch.float64)[None] / torch.tensor(steps_S).clamp(min=1)[:, None]
    grid_SM = (1.0 - step_SM).clamp(min=0.0)
    return torch.where(torch.tensor(steps_S)[:, None] > 0, grid_SM, 0.0).float()


def euler(velocity: Velocity, x1_SNK: Tensor, times_SM: Tensor) -> Tensor:
    """Return the latents at the last of the times: x_s = x_t + (s - t) v(x_t, t), row by row.

    Args:
        velocity: dz/dt.
        x1_SNK: latents at the first times.
        times_SM: falling times of each row; a row whose time does not change stands still.
    """
    x_SNK, times_MS = x1_SNK, times_SM.to(x1_SNK.device).unbind(1)
    for t_S, s_S in pairwise(times_MS):
        x_SNK = x_SNK + (s_S - t_S).to(x_SNK.dtype)[:, None, None] * velocity(x_SNK, t_S)
    return x_SNK
