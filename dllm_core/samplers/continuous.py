"""Solvers for denoisers of continuous latents on a Gaussian path. t -> s is one step, s < t; t = 1 is noise.

Every solver is a linear rule whose numbers are known on the host before the first forward,

    x_s = c_x x_t + c_x0 x0_hat + c_before x0_before + c_noise eps,

so that a loop is a few fused operations and can be captured as a graph. B batch; latents have any trailing shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dllm_core.corruption.gaussian import Path

Solver = Literal["ddim", "ddpm", "sde", "euler"]
"""ddim: the probability-flow ODE with x0_hat held over a step (arXiv:2010.02502, eta 0); deterministic.
ddpm: ancestral sampling from q(x_s | x_t, x0_hat) (arXiv:2006.11239). The same rule is SDE-DPM-Solver++(1).
sde: SDE-DPM-Solver++(2M), an exponential integrator of the reverse SDE with x0_hat extrapolated linearly in
log(alpha / sigma) from this prediction and the one before (arXiv:2211.01095).
euler: x_s = x_t + (s - t) v for models that predict the velocity v = dx/dt; v stands where x0_hat stands."""

SOLVERS: tuple[str, ...] = get_args(Solver)
STOCHASTIC = frozenset({"ddpm", "sde"})

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class StepCoefficients(NamedTuple):
    """The numbers of one step.

    Attributes:
        c_x: of the latent at t.
        c_x0: of the prediction at t.
        c_noise: of fresh N(0, 1) noise.
        c_before: of the prediction one step earlier; 0 but for `sde`.
    """

    c_x: float
    c_x0: float
    c_noise: float
    c_before: float = 0.0


def coefficients(kind: Solver, t: float, s: float, path: Path, before: float | None = None) -> StepCoefficients:
    """Return the numbers of the step from t to s.

    Args:
        kind: the solver.
        t: time of the latent and the prediction, in (0, 1].
        s: time to go to, in [0, t).
        path: alpha and sigma.
        before: time of the prediction before this one, for `sde`; None (or no earlier prediction, or an end at which
            alpha or sigma vanishes) makes the step first order.
    """
    if not 0.0 <= s < t <= 1.0:
        raise ValueError(f"a step goes from t to s with 0 <= s < t <= 1, got t={t} and s={s}")
    if kind == "euler":
        return StepCoefficients(1.0, s - t, 0.0)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coefficients(t), path.coefficients(s)
    shrink = sigma_s / sigma_t
    if kind == "ddim":
        return StepCoefficients(shrink, alpha_s - alpha_t * shrink, 0.0)
    if kind not in STOCHASTIC:
        raise ValueError(f"solver {kind!r}; known: {', '.join(SOLVERS)}")
    # exp(-h) with h the rise of log(alpha / sigma); 1 - exp(-2h) is the share of sigma_t^2 that was added after s
    decay = shrink * alpha_t / alpha_s
    added = (1.0 - decay) * (1.0 + decay)
    extrapolation = _extrapolation(decay, t, before, path) if kind == "sde" else 0.0
    return StepCoefficients(
        c_x=shrink * decay,
        c_x0=alpha_s * added * (1.0 + extrapolation),
        c_noise=sigma_s * math.sqrt(added),
        c_before=-alpha_s * added * extrapolation,
    )


def _extrapolation(decay: float, t: float, before: float | None, path: Path) -> float:
    """Return h / (2 h_before), the weight of (x0_hat - x0_before); 0 where one of the two is infinite."""
    if before is None or decay == 0.0:
        return 0.0
    (alpha_t, sigma_t), (alpha_b, sigma_b) = path.coefficients(t), path.coefficients(before)
    if alpha_b == 0.0:
        return 0.0
    return -math.log(decay) / (2.0 * math.log(sigma_b * alpha_t / (alpha_b * sigma_t)))


def plan(kind: Solver, times: Sequence[float], path: Path) -> list[StepCoefficients]:
    """Return the numbers of all steps along `times`, which fall from 1; len(times) - 1 of them."""
    earlier = [None, *times[:-2]]
    return [coefficients(kind, t, s, path, b) for t, s, b in zip(times[:-1], times[1:], earlier, strict=True)]


def step(
    numbers: StepCoefficients,
    x: Tensor,
    x0_hat: Tensor,
    noise: Tensor | None = None,
    x0_before: Tensor | None = None,
) -> Tensor:
    """Return x_s.

    Args:
        numbers: of this step.
        x: latent at t.
        x0_hat: prediction at t (the velocity for `euler`).
        noise: fresh N(0, 1); needed where `c_noise` is not 0.
        x0_before: prediction one step earlier; needed where `c_before` is not 0.
    """
    result = numbers.c_x * x + numbers.c_x0 * x0_hat
    if numbers.c_before:
        assert x0_before is not None, "this step extrapolates and needs the prediction before"
        result = result + numbers.c_before * x0_before
    if numbers.c_noise:
        assert noise is not None, "this step is stochastic and needs noise"
        result = result + numbers.c_noise * noise
    return result


def solve(
    predict: Predict,
    x1: Tensor,
    times: Sequence[float] | Tensor,
    kind: Solver,
    path: Path,
    noise: Callable[[int], Tensor] | None = None,
    self_condition: bool = True,
) -> Tensor:
    """Go from noise to a clean latent; the reference loop that faster ones are compared with.

    S = len(times) - 1 forwards, at times[0] to times[S - 1]. What comes out is the last prediction: a step of any
    solver to t = 0 would return just that, so the last step is not taken. `euler` has no prediction of x_0 and returns
    its latent at times[S].

    Args:
        predict: (x, t_B fp32, previous prediction) -> x0_hat (velocity for `euler`).
        x1: N(0, 1) noise [B, ...].
        times: S + 1 falling times, the first is 1.
        kind: the solver.
        path: the path that the model was trained on.
        noise: k -> the N(0, 1) noise of step k, shaped as x1, for stochastic solvers; keyed per sample by the caller,
            so that a batch equals its samples one at a time.
        self_condition: hand each prediction to the next forward; otherwise, and at the first, zeros.
    """
    moments = times.tolist() if isinstance(times, Tensor) else list(times)
    steps = plan(kind, moments, path)
    x, before, nothing = x1, None, torch.zeros_like(x1)
    for k, numbers in enumerate(steps):
        t_B = torch.full((len(x),), moments[k], dtype=torch.float32, device=x.device)
        shown = before if self_condition and before is not None else nothing
        predicted = predict(x, t_B, shown)
        if k == len(steps) - 1 and kind != "euler":
            return predicted
        eps = noise(k) if noise is not None and numbers.c_noise else None
        x, before = step(numbers, x, predicted, eps, before), predicted
    return x
