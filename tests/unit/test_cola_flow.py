"""Closed forms: times, Euler on linear fields with guidance, KL, the ELBO of a toy, the linear guess."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from dllm_core.corruption.gaussian import LinearPath
from dllm_core.methods.cola import objective
from dllm_core.methods.cola.flow import euler, guided, linear_slope, logit_normal, steps_of_blocks, time_grid
from dllm_core.methods.cola.health import linear_error
from dllm_core.methods.cola.networks import ColaNetworks, Posterior
from dllm_core.methods.cola.options import Options
from dllm_core.methods.cola.shapes import Shape
from dllm_core.samplers.continuous import solve


def test_times_are_logit_normal():
    u = (torch.arange(20_000).double() + 0.5) / 20_000
    t = logit_normal(u, 1.0, 0.7)
    logit = torch.logit(t)
    assert float(logit.mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(logit.std()) == pytest.approx(0.7, abs=1e-2)
    assert float(t.median()) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-4)
    edges = logit_normal(torch.tensor([0.0, 1.0]), 0.0, 1.0)
    assert bool(((edges > 0) & (edges < 1)).all())


@pytest.mark.parametrize(
    ("steps", "blocks", "wanted"), [(8, 3, [3, 3, 2]), (2, 4, [1] * 4), (4, 4, [1] * 4), (5, 1, [5])]
)
def test_requested_steps_are_those_of_the_whole_response(steps, blocks, wanted):
    assert steps_of_blocks(steps, blocks) == wanted
    assert sum(wanted) == max(steps, blocks)


def test_rows_with_fewer_steps_arrive_early_and_stay():
    grid = time_grid([4, 2, 0])
    assert grid.tolist() == [[1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.5, 0.0, 0.0, 0.0], [0.0] * 5]


def test_euler_is_the_shared_solver_row_by_row():
    x1 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()

    def velocity(x, t):
        return torch.sin(x) + t.double()[:, None, None]

    found = euler(velocity, x1, time_grid([5, 2]).double())
    for row, steps in ((0, 5), (1, 2)):
        times = [1 - k / steps for k in range(steps + 1)]
        wanted = solve(lambda x, t, _: velocity(x, t), x1[row : row + 1], times, "euler", LinearPath())
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("steps", [1, 7, 2000])
def test_guided_euler_on_a_linear_field_has_its_closed_form(scale, steps):
    """v_c = a x + b and v_u = a' x + b': guidance gives A x + B, and Euler (1 - A / n)^n (x + B / A) - B / A."""
    a, b, c, d = 0.8, -0.3, 0.2, 0.5
    rate, offset = c + scale * (a - c), d + scale * (b - d)
    x1 = torch.linspace(-2, 2, 5).double()[None, :, None]
    field = guided(lambda x, _: a * x + b, lambda x, _: c * x + d, scale)
    found = euler(field, x1, time_grid([steps]).double())
    shrink = (1 - rate / steps) ** steps
    torch.testing.assert_close(found, shrink * (x1 + offset / rate) - offset / rate, rtol=1e-4, atol=1e-5)
    if steps == 2000:
        limit = math.exp(-rate) * (x1 + offset / rate) - offset / rate
        torch.testing.assert_close(found, limit, rtol=1e-3, atol=1e-3)


def test_guidance_of_one_never_asks_without_the_prefix():
    field = guided(lambda x, _: x, lambda *_: pytest.fail("asked"), 1.0)
    assert torch.equal(field(torch.ones(1), torch.ones(1)), torch.ones(1))


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_euler_on_the_true_velocity_recovers_a_gaussian(std):
    """z_0 ~ N(m, s^2): v = E[z_1 - z_0 | z_t] is linear in z_t, and the flow carries N(0, 1) to N(m, s^2)."""
    mean, x1 = 0.4, torch.randn(1, 20_000, 1, generator=torch.Generator().manual_seed(0)).double()

    def velocity(x, t):
        t = t.double()[:, None, None]
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean

    errors = []
    for steps in (8, 256):
        found = euler(velocity, x1, time_grid([steps]).double())
        errors.append(abs(float(found.std()) - std * float(x1.std())))
        assert float(found.mean()) == pytest.approx(mean, abs=0.02)
    assert errors[1] < 0.01
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_linear_guess_is_the_best_of_all_linear_ones(t):
    generator = torch.Generator().manual_seed(1)
    z0, z1 = torch.randn(2, 200_000, generator=generator).double()
    x, v = (1 - t) * z0 + t * z1, z1 - z0
    slope = (x * v).mean() / x.square().mean()
    assert float(linear_slope(torch.tensor(t))) == pytest.approx(float(slope), abs=0.02)
    assert float((v - slope * x).square().mean()) == pytest.approx(linear_error(t), rel=0.02)


def test_kl_is_that_of_torch():
    mean, other = torch.randn(2, 4, 3, 5)
    log_variance, other_log = torch.randn(2, 4, 3, 5)
    q, r = Posterior(mean, log_variance), Posterior(other, other_log)
    of_q, of_r = Normal(mean, (0.5 * log_variance).exp()), Normal(other, (0.5 * other_log).exp())
    standard = Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(objective.kl_to_standard(q), kl_divergence(of_q, standard))
    torch.testing.assert_close(objective.kl_between(q, r), kl_divergence(of_q, of_r), rtol=1e-5, atol=1e-5)
    assert not objective.kl_between(q, q).any()


def test_the_loss_is_the_negative_elbo_of_a_toy_model():
    """beta = K makes the mean over dimensions the sum: loss = -ELBO = -log p(x) + KL(q || p(z | x)), integrated."""
    torch.manual_seed(0)
    hidden, latent, vocab, draws = 4, 2, 5, 200_000
    shape = Shape(
        latent_dim=latent,
        encoder_width=4,
        encoder_depth=1,
        decoder_width=4,
        decoder_depth=1,
        prior_width=4,
        prior_depth=1,
        head_width=4,
    )
    networks = ColaNetworks(shape, hidden, 4, log_variance=-0.7)
    for parameter in networks.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    head, state, token = torch.randn(vocab, hidden), torch.randn(1, 1, hidden), 3
    grid = torch.linspace(-7, 7, 281)
    z = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).view(-1, 1, latent)
    cell = float(grid[1] - grid[0]) ** latent
    with torch.no_grad():
        q = networks.encoder(state)
        log_x = Categorical(logits=networks.decoder(z)[:, 0] @ head.T).logits[:, token].double()
        log_z = Normal(0.0, 1.0).log_prob(z).sum((1, 2)).double()
        of_q = Normal(q.mean[0, 0], (0.5 * q.log_variance[0, 0]).exp())
        log_q = of_q.log_prob(z[:, 0]).sum(1).double()
        evidence = float(((log_x + log_z).exp() * cell).sum().log())
        gap = float((log_q.exp() * (log_q - (log_x + log_z - evidence)) * cell).sum())
        inputs = objective.VaeInputs(
            states_STD=state.expand(draws, 1, hidden),
            ids_ST=torch.full((draws, 1), token),
            response_ST=torch.ones(draws, 1, dtype=torch.bool),
            noise_STK=torch.randn(draws, 1, latent),
            weight_ST=torch.ones(draws, 1),
            masked_ST=None,
            masked_noise_STK=None,
        )
        options = Options(shape=shape, beta=float(latent), masked_weight=0.0)
        loss, _, _ = objective.vae_loss(networks, inputs, head, {"tokens": float(draws)}, options, moves=True)
    assert gap > 0.02  # the bound is not tight, so that it can be told from the evidence
    assert float(loss) == pytest.approx(-evidence + gap, rel=5e-3)
