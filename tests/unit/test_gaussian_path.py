"""Gaussian paths against the textbook formula in float64, finite differences and loops."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_core.corruption.gaussian import LinearPath, Path, TanSchedule, diffuse

INNER = [0.01, 0.1, 0.3, 0.5, 0.77, 0.9, 0.99]


def _textbook(t: float, d: float) -> tuple[float, float]:
    alpha = 1 / math.sqrt(1 + d**2 * math.tan(math.pi * t / 2) ** 2)
    return alpha, math.sqrt(1 - alpha**2)


@pytest.mark.parametrize("d", [0.5, 3.0, 9.0])
@pytest.mark.parametrize("t", INNER)
def test_tan_d_is_the_published_formula(d: float, t: float) -> None:
    schedule = TanSchedule(d)
    assert schedule.coefficients(t) == pytest.approx(_textbook(t, d), rel=1e-12)
    assert (schedule.alpha(t), schedule.sigma(t)) == schedule.coefficients(t)
    assert schedule.log_snr(t) == pytest.approx(-2 * math.log(d * math.tan(math.pi * t / 2)), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("path", [TanSchedule(3.0), TanSchedule(0.1), LinearPath()])
def test_the_ends_are_exact(path: Path) -> None:
    assert path.coefficients(0.0) == (1.0, 0.0)
    assert path.coefficients(1.0) == (0.0, 1.0)
    for dtype in (torch.float32, torch.float64):
        alpha, sigma = path.coefficients(torch.tensor([0.0, 1.0], dtype=dtype))
        assert alpha.tolist() == [1.0, 0.0]
        assert sigma.tolist() == [0.0, 1.0]


def test_log_snr_is_infinite_at_the_ends() -> None:
    assert TanSchedule(3.0).log_snr(torch.tensor([0.0, 1.0])).tolist() == [math.inf, -math.inf]
    assert (TanSchedule(3.0).log_snr(0.0), TanSchedule(3.0).log_snr(1.0)) == (math.inf, -math.inf)


def test_fp32_keeps_its_precision_next_to_both_ends() -> None:
    near = torch.tensor([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
    t_T = torch.cat([near, 0.5 + near, 1 - near[near > 6e-8]])
    schedule = TanSchedule(3.0)
    single, double = schedule.coefficients(t_T), schedule.coefficients(t_T.double())
    for value, exact in zip(single, double, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=6e-7, atol=0)
    # the float64 values themselves, from the first term of the series
    assert schedule.sigma(1e-9) == pytest.approx(3.0 * math.pi * 1e-9 / 2, rel=1e-12)
    assert schedule.alpha(1 - 2.0**-30) == pytest.approx(math.pi * 2.0**-30 / 6, rel=1e-12)


def test_half_snr_time_is_where_signal_and_noise_weigh_the_same() -> None:
    for d, time in ((3.0, 0.205), (9.0, 0.070)):
        schedule = TanSchedule(d)
        assert schedule.half_snr_time() == pytest.approx(time, abs=5e-4)
        assert schedule.alpha(schedule.half_snr_time()) ** 2 == pytest.approx(0.5, rel=1e-12)
    assert TanSchedule(3.0).time_of_ratio(3.0) == pytest.approx(0.5)  # sigma_dec = d is the middle of the path


@pytest.mark.parametrize("path", [TanSchedule(3.0), LinearPath()])
def test_time_of_ratio_inverts_the_ratio(path: Path) -> None:
    for t in [*INNER, 1e-6]:
        alpha, sigma = path.coefficients(t)
        assert path.time_of_ratio(sigma / alpha) == pytest.approx(t, rel=1e-9)
    ratios = torch.tensor([0.0, 0.2, math.inf], dtype=torch.float64)
    times = path.time_of_ratio(ratios)
    assert times[[0, 2]].tolist() == [0.0, 1.0]
    assert [path.time_of_ratio(float(r)) for r in ratios] == pytest.approx(times.tolist())


def test_beta_is_the_slope_of_log_alpha_squared() -> None:
    schedule, step = TanSchedule(3.0), 1e-6
    for t in (0.05, 0.3, 0.6, 0.94):
        slope = -2 * (math.log(schedule.alpha(t + step)) - math.log(schedule.alpha(t - step))) / (2 * step)
        assert schedule.beta(t) == pytest.approx(slope, rel=1e-6)
    assert schedule.beta(0.99) == schedule.beta(1.0) == schedule.beta(0.95)
    assert schedule.beta(torch.tensor([0.3, 1.0])).tolist() == pytest.approx(
        [schedule.beta(0.3), schedule.beta(1.0)], rel=1e-6
    )


@pytest.mark.parametrize("path", [TanSchedule(2.0), LinearPath()])
def test_each_row_is_diffused_at_its_own_time(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 4, 5, generator=generator)
    t_B = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    got = diffuse(x0, noise, t_B, path)
    assert got.dtype == torch.float32
    for b, t in enumerate(t_B.tolist()):
        alpha, sigma = path.coefficients(t)
        for i in range(4):
            for j in range(5):
                assert float(got[b, i, j]) == pytest.approx(alpha * float(x0[b, i, j]) + sigma * float(noise[b, i, j]))
    assert torch.equal(got[0], x0[0])
    assert torch.equal(got[2], noise[2])


def test_the_gradient_into_the_clean_latent_is_alpha() -> None:
    x0 = torch.zeros(2, 3, requires_grad=True)
    diffuse(x0, torch.ones(2, 3), torch.tensor([0.2, 0.8]), TanSchedule(3.0)).sum().backward()
    assert x0.grad is not None
    expected = TanSchedule(3.0).alpha(torch.tensor([0.2, 0.8]))
    torch.testing.assert_close(x0.grad, expected[:, None].expand(2, 3))


@pytest.mark.parametrize("d", [0.0, -1.0, math.inf, math.nan])
def test_a_d_that_makes_no_path_is_refused(d: float) -> None:
    with pytest.raises(ValueError, match="d > 0"):
        TanSchedule(d)
