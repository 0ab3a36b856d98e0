"""Gaussian paths x_t = alpha(t) x_0 + sigma(t) noise, t = 0 clean, t = 1 noise. B batch, L slots, K latent dimension.

Everything takes a float or a tensor of times and returns the same kind. A path is a pure function of the time: no
tables, no state, no device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)

BETA_LAST_TIME = 0.95


@runtime_checkable
class Path(Protocol):
    """What a sampler needs to know of a corruption."""

    def coefficients(self, t: Time) -> tuple[Time, Time]:
        """Return (alpha, sigma) at the times t: 1, 0 at t = 0 and 0, 1 at t = 1; alpha falls, sigma rises."""

    def time_of_ratio(self, ratio: Time) -> Time:
        """Return the time at which sigma / alpha equals `ratio`, in [0, inf]."""


@dataclass(frozen=True)
class TanSchedule:
    """tan-d: sigma / alpha = d tan(pi t / 2), variance preserving (as in arXiv:2605.07933, d = 3).

    alpha = 1 / sqrt(1 + d^2 tan^2(pi t / 2)) and sigma = sqrt(1 - alpha^2), evaluated as cos / r and d sin / r with
    r = sqrt(cos^2 + d^2 sin^2), the cosine from the distance to t = 1. No difference of nearly equal numbers occurs,
    so that both are exact at t = 0 and t = 1 and good to a few units in the last place between, in fp32 too. A larger
    d moves mass to high noise.

    Attributes:
        d: > 0; sigma / alpha in the middle of the path.
    """

    d: float = 3.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.d) and self.d > 0):
            raise ValueError(f"tan-d needs a finite d > 0, got {self.d}")

    def coefficients(self, t: Time) -> tuple[Time, Time]:
        """Return (alpha, sigma)."""
        cos, scaled_sin = _sin((1 - t) * (math.pi / 2)), _sin(t * (math.pi / 2)) * self.d
        radius = _hypot(cos, scaled_sin)
        return cos / radius, scaled_sin / radius

    def alpha(self, t: Time) -> Time:
        """Return the weight of the clean latent."""
        return self.coefficients(t)[0]

    def sigma(self, t: Time) -> Time:
        """Return the weight of the noise."""
        return self.coefficients(t)[1]

    def log_snr(self, t: Time) -> Time:
        """Return log(alpha^2 / sigma^2), in nats; inf at t = 0, -inf at t = 1."""
        alpha, sigma = self.coefficients(t)
        return (_log(alpha) - _log(sigma)) * 2

    def half_snr_time(self) -> float:
        """Return the time at which alpha^2 = sigma^2 = 1/2."""
        return self.time_of_ratio(1.0)

    def time_of_ratio(self, ratio: Time) -> Time:
        """Return the time at which sigma / alpha equals `ratio`."""
        return _atan(ratio / self.d) * (2 / math.pi)

    def beta(self, t: Time) -> Time:
        """Return -d log(alpha^2) / dt, the rate of the forward SDE, at min(t, .95): it diverges at t = 1.

        pi d^2 tan (1 + tan^2) / (1 + d^2 tan^2), tan of pi t / 2.
        """
        t = _at_most(t, BETA_LAST_TIME)
        cos, sin = _sin((1 - t) * (math.pi / 2)), _sin(t * (math.pi / 2))
        return sin / cos / (cos * cos + sin * sin * self.d**2) * (math.pi * self.d**2)


@dataclass(frozen=True)
class LinearPath:
    """x_t = (1 - t) x_0 + t noise: the straight path of flow matching (arXiv:2210.02747)."""

    def coefficients(self, t: Time) -> tuple[Time, Time]:
        """Return (1 - t, t)."""
        return 1 - t, t

    def time_of_ratio(self, ratio: Time) -> Time:
        """Return the time at which t / (1 - t) equals `ratio`; 1 for inf."""
        if isinstance(ratio, Tensor):
            return 1 / (1 + 1 / ratio)  # 1 / 0 is inf in a tensor, and both ends come out exact
        return 1 / (1 + 1 / ratio) if ratio > 0 else 0.0


def diffuse(x0_BLK: Tensor, noise_BLK: Tensor, t_B: Tensor, schedule: Path) -> Tensor:
    """Return alpha(t) x_0 + sigma(t) noise in the dtype of x_0, each row at its own time.

    Args:
        x0_BLK: clean latents; any number of trailing dimensions. Gradients flow into them.
        noise_BLK: N(0, 1), the same shape.
        t_B: times in [0, 1].
        schedule: the path.
    """
    alpha_B, sigma_B = schedule.coefficients(t_B)
    per_row = (-1,) + (1,) * (x0_BLK.ndim - 1)
    return alpha_B.to(x0_BLK).view(per_row) * x0_BLK + sigma_B.to(x0_BLK).view(per_row) * noise_BLK


def _sin(x: Time) -> Time:
    return torch.sin(x) if isinstance(x, Tensor) else math.sin(x)


def _atan(x: Time) -> Time:
    return torch.atan(x) if isinstance(x, Tensor) else math.atan(x)


def _log(x: Time) -> Time:
    if isinstance(x, Tensor):
        return torch.log(x)
    return math.log(x) if x > 0 else -math.inf


def _hypot(x: Time, y: Time) -> Time:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.hypot(x, y)
    return math.hypot(float(x), float(y))


def _at_most(x: Time, bound: float) -> Time:
    return x.clamp(max=bound) if isinstance(x, Tensor) else min(x, bound)
