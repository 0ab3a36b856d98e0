"""Adaptive times: a known loss curve gives the known density, and nothing depends on how a batch was split."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dllm_core.corruption.adaptive_time import UNIFORM_SHARE, AdaptiveTimes, _pooled, stratified
from dllm_core.corruption.gaussian import TanSchedule
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from tests.sequences import random_sequences

UNIT = torch.linspace(0, 1, 1001, dtype=torch.float64)


def _even(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def _batch(count: int) -> Batch:
    return random_sequences(count, 6, 2, 11).batch([(i, 0) for i in range(count)])


def _gaussian_loss(t: Tensor) -> Tensor:
    """Posterior variance of unit Gaussian data under tan-3, above a floor."""
    alpha, sigma = TanSchedule(3.0).coefficients(t)
    return 0.02 + 0.9 * sigma**2 / (alpha**2 + sigma**2)


def _learned(loss: Callable[[Tensor], Tensor], steps: int, batch: int, refresh: int, spread: float) -> AdaptiveTimes:
    """Train on keyed noise: stratified draws, losses that fall threefold while the model learns."""
    generator = torch.Generator().manual_seed(0)
    times = AdaptiveTimes(refresh)
    for step in range(steps):
        u_B = (torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(batch) / batch).frac()
        t_B = times.times(u_B)
        noisy_B = loss(t_B.double()) * (1 + spread * torch.randn(batch, generator=generator))
        times.observe(t_B, noisy_B * (1 + 2 * math.exp(-8 * step / steps)))
        times.end_step()
    return times


def _nonlinearity(times: AdaptiveTimes, loss: Callable[[Tensor], Tensor]) -> float:
    """Largest distance of the expected loss from a straight line in u, relative to its rise."""
    value = loss(times.times(UNIT).double())
    return float(((value - value[0]) / (value[-1] - value[0]) - UNIT).abs().max())


def test_before_the_first_refresh_times_are_uniform() -> None:
    times = AdaptiveTimes(5, t_min=0.2)
    times.observe(_even(10_000), _even(10_000) ** 2)
    for _ in range(4):
        times.end_step()
    torch.testing.assert_close(times.times(UNIT).double(), 0.2 + 0.8 * UNIT, rtol=0, atol=1e-7)
    times.end_step()
    assert (times.times(UNIT).double() - (0.2 + 0.8 * UNIT)).abs().max() > 0.1


def test_a_quadratic_loss_gives_the_density_2t() -> None:
    times = AdaptiveTimes(1, t_min=0.0)
    t_B = _even(20_000)
    times.observe(t_B, t_B**2)
    times.end_step()
    # F = t^2 but for the share that stays uniform
    expected = (1 - UNIFORM_SHARE) * UNIT**2 + UNIFORM_SHARE * UNIT
    torch.testing.assert_close(times.quantiles(UNIT), expected, rtol=0, atol=1e-3)
    density = times.cdf.diff() * 100
    torch.testing.assert_close(density[1:-1], (0.99 * 2 * _even(100) + 0.01)[1:-1], rtol=0.01, atol=0.0)


def test_it_finds_the_density_from_its_own_draws() -> None:
    times = _learned(_gaussian_loss, 1500, 64, 100, 0.1)
    assert _nonlinearity(times, _gaussian_loss) < 0.04
    assert _nonlinearity(AdaptiveTimes(1), _gaussian_loss) > 0.4  # uniform times are far from it


def test_a_short_noisy_run_does_not_take_noise_for_slope() -> None:
    times = _learned(_gaussian_loss, 400, 16, 40, 0.3)
    assert _nonlinearity(times, _gaussian_loss) < 0.15
    assert float(times.cdf.diff().max()) * 100 < 4.5  # the true density peaks at 3.2


def test_a_loss_that_falls_everywhere_alike_leaves_the_density_alone() -> None:
    steady, falling = AdaptiveTimes(8), AdaptiveTimes(8)
    t_B = _even(1000)
    for step in range(8):
        steady.observe(t_B, t_B**3)
        falling.observe(t_B, t_B**3 * 2.0**-step)
        steady.end_step()
        falling.end_step()
    torch.testing.assert_close(steady.cdf, falling.cdf, rtol=1e-12, atol=0)


def test_dips_are_passed_over_and_get_the_uniform_share_alone() -> None:
    times = AdaptiveTimes(1, bins=4, pool=1, t_min=0.0)
    times.observe(_even(4), torch.tensor([1.0, 3.0, 2.0, 5.0]))
    times.end_step()
    # running max 1 3 3 5; at the edges 0 2 3 4 6; rises 2 1 1 2 of 6
    rises = torch.tensor([2.0, 1.0, 1.0, 2.0], dtype=torch.float64) / 6
    torch.testing.assert_close(times.cdf.diff(), 0.99 * rises + 0.01 / 4)


def test_running_losses_are_bias_corrected_averages_over_steps() -> None:
    times = AdaptiveTimes(100, bins=3, memory=4, t_min=0.0)
    generator = torch.Generator().manual_seed(3)
    seen: list[list[tuple[int, float]]] = [[], [], []]
    for step in range(7):
        t_B = torch.rand(5, generator=generator) * 2 / 3  # the last bin is never visited
        loss_B = torch.rand(5, generator=generator)
        times.observe(t_B, loss_B)
        times.end_step()
        for t, loss in zip(t_B.tolist(), loss_B.tolist(), strict=True):
            seen[int(t * 3)].append((step, loss))
    for value, entries in zip(times.bin_losses().tolist()[:2], seen[:2], strict=True):
        weights = [0.75 ** (6 - step) for step, _ in entries]
        mean = sum(w * loss for w, (_, loss) in zip(weights, entries, strict=True)) / sum(weights)
        assert value == pytest.approx(mean, rel=1e-12)
    assert math.isnan(times.bin_losses()[2])


def test_neighbours_are_pooled_and_the_remainder_joins_the_last_group() -> None:
    times = AdaptiveTimes(1, bins=4, pool=3, t_min=0.0)
    # bins hold 2, 1, 3 and 1 samples: groups {0, 1} and {2, 3}, with centres in bins and means worked out by hand
    t_B = torch.tensor([0.1, 0.1, 0.3, 0.6, 0.6, 0.6, 0.9])
    loss_B = torch.tensor([1.0, 2.0, 3.0, 6.0, 6.0, 6.0, 10.0])
    times.observe(t_B, loss_B)
    times.end_step()
    (x0, y0), (x1, y1) = ((0.5 + 0.5 + 1.5) / 3, 6 / 3), ((3 * 2.5 + 3.5) / 4, 28 / 4)
    assert (x0, y0, x1, y1) == pytest.approx((2.5 / 3, 2.0, 2.75, 7.0))
    # two groups make one straight line, hence an even density
    torch.testing.assert_close(times.cdf.diff(), torch.full((4,), 0.25, dtype=torch.float64))
    places, means = _pooled(times.loss_sum, times.loss_count, 3.0)
    assert places.tolist() == pytest.approx([x0, x1])
    assert means.tolist() == pytest.approx([y0, y1])


def test_unseen_bins_take_what_lies_between_their_neighbours() -> None:
    full, gappy = AdaptiveTimes(1, bins=10, pool=1), AdaptiveTimes(1, bins=10, pool=1)
    t_B = 1e-3 + (1 - 1e-3) * _even(10)
    full.observe(t_B, 3 * t_B)
    gappy.observe(t_B[[0, 3, 8]], 3 * t_B[[0, 3, 8]])
    for times in (full, gappy):
        times.end_step()
    torch.testing.assert_close(gappy.cdf, full.cdf)


def test_one_visited_bin_or_a_flat_loss_changes_nothing() -> None:
    for t_B, loss_B in ((torch.full((9,), 0.5), torch.rand(9)), (_even(1000), torch.ones(1000))):
        times = AdaptiveTimes(1, pool=1)
        times.observe(t_B, loss_B)
        times.end_step()
        torch.testing.assert_close(times.cdf, torch.linspace(0, 1, 101, dtype=torch.float64))


def test_times_rise_with_u_and_quantiles_invert_them() -> None:
    times = _learned(_gaussian_loss, 80, 32, 40, 0.3)
    t = times.times(UNIT)
    assert t.dtype == torch.float32
    assert bool((t.diff() > 0).all())
    assert (float(t[0]), float(t[-1])) == (pytest.approx(1e-3), 1.0)
    torch.testing.assert_close(times.quantiles(t), UNIT, rtol=0, atol=1e-5)
    shuffled = torch.randperm(1001, generator=torch.Generator().manual_seed(0))
    assert torch.equal(times.times(UNIT[shuffled]), t[shuffled])


def test_splitting_and_reordering_a_batch_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    t_B, loss_B = torch.rand(48, generator=generator), torch.rand(48, generator=generator)
    whole, parts = AdaptiveTimes(2, pool=4), AdaptiveTimes(2, pool=4)
    order = torch.randperm(48, generator=generator)
    for _ in range(2):
        whole.observe(t_B, loss_B)
        for rows in order.split(7):
            parts.observe(t_B[rows], loss_B[rows])
        whole.end_step()
        parts.end_step()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-13, atol=1e-15)
    assert not torch.equal(whole.cdf, torch.linspace(0, 1, 101, dtype=torch.float64))


@pytest.mark.parametrize("stop", [7, 10])
def test_a_restored_state_goes_on_as_if_nothing_had_happened(stop: int) -> None:
    def advance(times: AdaptiveTimes, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            t_B = times.times(torch.rand(40, generator=generator, dtype=torch.float64))
            times.observe(t_B, t_B**2 + torch.rand(40, generator=generator))
            times.end_step()

    through, before, after = (AdaptiveTimes(5) for _ in range(3))
    advance(through, 0, 22)
    advance(before, 0, stop)
    after.load_state_dict(before.state_dict())
    advance(after, stop, 22)
    assert through.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in through.state_dict().items())


def test_grids_fall_from_one_to_the_last_time() -> None:
    times = _learned(_gaussian_loss, 80, 32, 40, 0.1)
    for steps in (1, 2, 7, 50):
        even, by_loss = times.grid(steps, "t"), times.grid(steps, "u", t_min=0.02)
        assert (float(even[0]), float(even[-1])) == (1.0, 0.01)
        assert (float(by_loss[0]), float(by_loss[-1])) == (1.0, 0.02)
        assert len(even) == len(by_loss) == steps + 1
        torch.testing.assert_close(even.diff(), torch.full((steps,), -0.99 / steps, dtype=torch.float64))
        u = times.quantiles(by_loss)
        torch.testing.assert_close(u.diff(), ((u[-1] - 1) / steps).expand(steps), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at least one step"):
        times.grid(0)


def test_the_density_is_not_rounded_when_the_network_is() -> None:
    times = AdaptiveTimes(1)
    times.observe(_even(1000), _even(1000) ** 2)
    times.end_step()
    kept = times.cdf.clone()
    holder = torch.nn.ModuleDict({"times": times, "net": torch.nn.Linear(1, 1)}).bfloat16()
    assert holder["net"].weight.dtype == torch.bfloat16
    assert torch.equal(times.cdf, kept)


def test_strata_put_one_draw_in_every_interval_whoever_holds_the_rows() -> None:
    noise, batch = NoiseSource(7), _batch(8)
    first, second = stratified(noise, batch, 0), stratified(noise, batch, 8)
    for u_B in (first, second):
        assert sorted((u_B * 8).floor().int().tolist()) == list(range(8))
        torch.testing.assert_close((u_B - torch.arange(8) / 8 - u_B[0]) % 1, torch.zeros(8).double(), rtol=0, atol=1e-9)
    assert not torch.equal(first, second)
    assert not torch.equal(first, stratified(NoiseSource(8), batch, 0))
    parts = [stratified(noise, batch.rows(i, j), 8 + i, batch_size=8) for i, j in ((0, 3), (3, 4), (4, 8))]
    assert torch.equal(torch.cat(parts), second)
    with pytest.raises(ValueError, match="one batch of 8"):
        stratified(noise, batch.rows(0, 4), 6, batch_size=8)


def test_every_place_of_the_batch_is_uniform_over_steps() -> None:
    batch = _batch(4)
    u_SB = torch.stack([stratified(NoiseSource(0), batch, 4 * step) for step in range(600)])
    for b in range(4):
        gap = (u_SB[:, b].sort().values - _even(600)).abs().max()
        assert gap < 1.63 / math.sqrt(600)  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize("wrong", [{"refresh_every": 0}, {"bins": 1}, {"t_min": 1.0}, {"memory": -1}])
def test_settings_that_make_no_sampler_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="adaptive times need"):
        AdaptiveTimes(**{"refresh_every": 3, **wrong})  # type: ignore[arg-type]
