"""Solvers against posteriors worked out by hand and against Gaussian data, whose best denoiser is linear.

With a linear denoiser the sample is a linear function of the starting noise and of each step's fresh noise. Sending
unit vectors through the real loop reads off those weights, so that variances are exact and not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dllm_core.corruption.gaussian import LinearPath, Path, TanSchedule
from dllm_core.corruption.noise import NoiseSource
from dllm_core.samplers.continuous import Solver, coefficients, plan, solve, step

TAN = TanSchedule(3.0)
PREDICTORS: tuple[Solver, ...] = ("ddim", "ddpm", "sde")


def _times(steps: int, last: float = 0.01) -> list[float]:
    return torch.linspace(1, last, steps + 1, dtype=torch.float64).tolist()


def _posterior_mean(std: float, path: Path) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """E[x_0 | x_t] for x_0 ~ N(0, std^2)."""

    def predict(x: Tensor, t_B: Tensor, before: Tensor) -> Tensor:
        alpha_B, sigma_B = path.coefficients(t_B.double())
        return (alpha_B * std**2 / (alpha_B**2 * std**2 + sigma_B**2))[:, None] * x

    return predict


def _sample_std(kind: Solver, std: float, steps: int, path: Path = TAN) -> float:
    sources = torch.eye(steps + 1, dtype=torch.float64)[:, :, None]  # which noise, row of weights, 1
    weights = solve(_posterior_mean(std, path), sources[0], _times(steps), kind, path, lambda k: sources[k + 1])
    return float(weights.norm())


def _last_prediction_std(std: float, times: list[float]) -> float:
    """Spread of E[x_0 | x_t] at the last forward when x_t is right: less than that of x_0."""
    alpha, sigma = TAN.coefficients(times[-2])
    return std**2 / math.sqrt(std**2 + (sigma / alpha) ** 2)


@pytest.mark.parametrize("kind", PREDICTORS)
@pytest.mark.parametrize("std", [1.0, 0.3])
@pytest.mark.parametrize("path", [TAN, LinearPath()])
def test_gaussian_data_come_back_as_steps_grow(kind: Solver, std: float, path: Path) -> None:
    errors = [abs(_sample_std(kind, std, steps, path) / std - 1) for steps in (10, 100, 800)]
    assert errors[2] < 0.05
    assert errors[2] < 0.7 * errors[1] < 0.7 * errors[0] or errors[2] < 0.005


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_the_second_order_solver_needs_fewer_steps(std: float) -> None:
    for steps in (16, 50):
        reachable = _last_prediction_std(std, _times(steps))
        errors = [abs(_sample_std(kind, std, steps) - reachable) for kind in ("sde", "ddpm")]
        assert errors[0] < 0.6 * errors[1]


def test_the_error_left_is_that_of_the_last_prediction() -> None:
    times = _times(2000, 0.05)
    one = torch.ones(1, 1, dtype=torch.float64)  # deterministic, so one unit of starting noise is enough
    got = float(solve(_posterior_mean(0.3, TAN), one, times, "ddim", TAN))
    assert got == pytest.approx(_last_prediction_std(0.3, times), rel=5e-3)
    assert got < 0.25


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.7, 0.3), (0.31, 0.3), (0.02, 1e-4)])
def test_ddpm_is_the_posterior_of_the_forward_process(t: float, s: float) -> None:
    abar_t, abar_s = TAN.alpha(t) ** 2, TAN.alpha(s) ** 2
    beta = 1 - abar_t / abar_s
    numbers = coefficients("ddpm", t, s, TAN)
    assert numbers.c_x0 == pytest.approx(math.sqrt(abar_s) * beta / (1 - abar_t), rel=1e-9)
    assert numbers.c_x == pytest.approx(math.sqrt(1 - beta) * (1 - abar_s) / (1 - abar_t), rel=1e-6, abs=1e-12)
    assert numbers.c_noise**2 == pytest.approx((1 - abar_s) / (1 - abar_t) * beta, rel=1e-6)
    # the same from conditioning the joint Gaussian of (x_s, x_t) given x_0, in which cov = alpha_t/alpha_s sigma_s^2
    if t < 1.0:
        cov = math.sqrt(abar_t / abar_s) * (1 - abar_s)
        assert numbers.c_x == pytest.approx(cov / (1 - abar_t), rel=1e-6)
        assert numbers.c_noise**2 == pytest.approx(1 - abar_s - cov**2 / (1 - abar_t), rel=1e-6)


@pytest.mark.parametrize("kind", PREDICTORS)
@pytest.mark.parametrize("path", [TAN, LinearPath()])
def test_given_the_true_x0_every_step_keeps_the_marginals(kind: Solver, path: Path) -> None:
    for before, t, s in ((None, 1.0, 0.8), (1.0, 0.8, 0.5), (0.9, 0.6, 0.55), (0.3, 0.1, 0.01), (0.2, 0.1, 0.0)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coefficients(t), path.coefficients(s)
        c = coefficients(kind, t, s, path, before)
        assert c.c_x * alpha_t + c.c_x0 + c.c_before == pytest.approx(alpha_s, rel=1e-12)
        assert c.c_x**2 * sigma_t**2 + c.c_noise**2 == pytest.approx(sigma_s**2, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", PREDICTORS)
@pytest.mark.parametrize("path", [TAN, LinearPath()])
def test_a_step_to_clean_returns_the_prediction(kind: Solver, path: Path) -> None:
    assert tuple(coefficients(kind, 0.4, 0.0, path, 0.6)) == (0.0, 1.0, 0.0, 0.0)


def test_sde_is_the_published_multistep_rule() -> None:
    before, t, s = 0.8, 0.55, 0.37
    (a_t, s_t), (a_s, s_s), (a_b, s_b) = (TAN.coefficients(time) for time in (t, s, before))
    lam_t, lam_s, lam_b = math.log(a_t / s_t), math.log(a_s / s_s), math.log(a_b / s_b)
    h, r = lam_s - lam_t, (lam_t - lam_b) / (lam_s - lam_t)
    x, d0, d1, eps = 0.7, -1.3, 0.4, 2.1
    expected = s_s / s_t * math.exp(-h) * x + a_s * (1 - math.exp(-2 * h)) * d0
    expected += 0.5 * a_s * (1 - math.exp(-2 * h)) * (d0 - d1) / r + s_s * math.sqrt(1 - math.exp(-2 * h)) * eps
    numbers = coefficients("sde", t, s, TAN, before)
    got = step(numbers, *(torch.tensor(v, dtype=torch.float64) for v in (x, d0, eps, d1)))
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_sde_starts_at_first_order() -> None:
    first, second = plan("sde", [1.0, 0.9, 0.8], TAN)
    assert first == coefficients("ddpm", 1.0, 0.9, TAN)
    assert second == coefficients("ddpm", 0.9, 0.8, TAN)  # log(alpha / sigma) is infinite at t = 1
    assert plan("sde", [0.95, 0.9, 0.8], TAN)[1].c_before < 0


def test_euler_on_the_straight_path_is_ddim_on_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, generator=generator, dtype=torch.float64)
    x0_hat = torch.randn(5, generator=generator, dtype=torch.float64)
    for t, s in ((1.0, 0.7), (0.4, 0.1), (0.2, 0.0)):
        by_velocity = step(coefficients("euler", t, s, LinearPath()), x, (x - x0_hat) / t)
        by_prediction = step(coefficients("ddim", t, s, LinearPath()), x, x0_hat)
        torch.testing.assert_close(by_velocity, by_prediction)
        torch.testing.assert_close(by_prediction, s / t * x + (1 - s / t) * x0_hat)


def test_euler_integrates_the_velocity_of_gaussian_data() -> None:
    # v = E[noise - x_0 | x_t]; the flow maps N(0, 1) to N(0, .3^2)
    def velocity(x: Tensor, t_B: Tensor, before: Tensor) -> Tensor:
        t = t_B.double()[:, None]
        return (t - (1 - t) * 0.09) / (t**2 + (1 - t) ** 2 * 0.09) * x

    one = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(float(solve(velocity, one, _times(n, 0.0), "euler", LinearPath())) - 0.3) for n in (20, 200)]
    assert errors[1] < 0.003
    assert errors[1] < 0.2 * errors[0]


def _stub(seen: list[tuple[float, Tensor]]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def predict(x: Tensor, t_B: Tensor, before: Tensor) -> Tensor:
        seen.append((float(t_B[0]), before.clone()))
        return torch.tanh(x * 1.5 + 0.3 * before) * (1 - 0.5 * t_B[:, None, None])

    return predict


@pytest.mark.parametrize("kind", [*PREDICTORS, "euler"])
def test_the_loop_equals_its_steps_written_out(kind: Solver) -> None:
    generator = torch.Generator().manual_seed(1)
    x1 = torch.randn(2, 3, 4, generator=generator)
    fresh = [torch.randn(2, 3, 4, generator=generator) for _ in range(5)]
    times = _times(5)
    seen: list[tuple[float, Tensor]] = []
    got = solve(_stub(seen), x1, torch.tensor(times, dtype=torch.float64), kind, TAN, lambda k: fresh[k])
    assert [t for t, _ in seen] == pytest.approx(times[:-1])  # five forwards, none at the last time
    x, before, predicted = x1, None, torch.zeros_like(x1)
    for k, (t, shown) in enumerate(seen):
        assert torch.equal(shown, predicted)  # zeros, then what was said before
        earlier, predicted = before, _stub([])(x, torch.full((2,), t), predicted)
        before = predicted
        c = coefficients(kind, times[k], times[k + 1], TAN, times[k - 1] if k else None)
        x = c.c_x * x + c.c_x0 * predicted + (0 if earlier is None else c.c_before * earlier) + c.c_noise * fresh[k]
    torch.testing.assert_close(got, x if kind == "euler" else predicted)


def test_without_self_conditioning_every_forward_sees_zeros() -> None:
    seen: list[tuple[float, Tensor]] = []
    solve(_stub(seen), torch.ones(1, 2, 2), _times(4), "ddim", TAN, self_condition=False)
    assert len(seen) == 4
    assert all(not shown.any() for _, shown in seen)


def test_ddim_takes_no_noise_and_the_others_insist_on_it() -> None:
    def forbidden(k: int) -> Tensor:
        raise AssertionError("a deterministic solver drew noise")

    x1 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    once, again = (solve(_stub([]), x1, _times(6), "ddim", TAN, noise) for noise in (forbidden, None))
    assert torch.equal(once, again)
    for kind in ("ddpm", "sde"):
        with pytest.raises(AssertionError, match="needs noise"):
            solve(_stub([]), x1, _times(6), kind, TAN)


@pytest.mark.parametrize("kind", PREDICTORS)
def test_a_batch_equals_its_samples_one_at_a_time(kind: Solver) -> None:
    source = NoiseSource(3)

    def draw(sample_ids: list[int], stream: str) -> Tensor:
        return torch.stack([torch.randn(3, 4, generator=source.generator(i, 0, stream)) for i in sample_ids])

    def run(sample_ids: list[int]) -> Tensor:
        x1 = draw(sample_ids, "start")
        return solve(_stub([]), x1, _times(8), kind, TAN, lambda k: draw(sample_ids, f"step {k}"))

    together = run([4, 9, 2])
    for row, sample in enumerate([4, 9, 2]):
        torch.testing.assert_close(run([sample])[0], together[row])
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("kind", [*PREDICTORS, "euler"])
def test_latents_keep_their_dtype(kind: Solver) -> None:
    x = torch.ones(1, 2, 2, dtype=torch.bfloat16)
    assert step(coefficients(kind, 0.5, 0.4, TAN, 0.6), x, x, x, x).dtype == torch.bfloat16


def test_a_step_that_goes_nowhere_and_an_unknown_solver_are_refused() -> None:
    for t, s in ((0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError, match="0 <= s < t <= 1"):
            coefficients("ddim", t, s, TAN)
    with pytest.raises(ValueError, match="known: ddim, ddpm, sde, euler"):
        coefficients("heun", 0.5, 0.4, TAN)  # type: ignore[arg-type]
