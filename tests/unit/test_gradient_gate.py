"""The gate into the latent encoder: published values, and the gradient it lets through."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dllm_core.corruption.gaussian import TanSchedule, diffuse
from dllm_core.training.gradient_gate import encoder_gate, scale_gradient


@pytest.mark.parametrize(
    ("part", "gamma"),
    [(0.0, 0.001), (0.25, 0.005), (0.5, 0.054), (0.6, 0.136), (0.7, 0.306), (0.776, 0.5), (0.9, 0.830)],
)
def test_published_values(part: float, gamma: float) -> None:
    assert encoder_gate(round(part * 10_000), 10_000) == pytest.approx(gamma, abs=6e-4)


def test_the_gate_opens_steadily_and_stays_open() -> None:
    gates = [encoder_gate(step, 200) for step in range(260)]
    assert gates[0] == 1e-3
    assert all(a < b for a, b in pairwise(gates[:201]))
    assert gates[199] < 1.0
    assert set(gates[200:]) == {1.0}
    assert encoder_gate(0, 0) == 1.0
    assert encoder_gate(0, 10, floor=0.25) == 0.25


def test_values_pass_unchanged_and_gradients_scaled() -> None:
    x = torch.tensor([1e-30, -3.7, 12345.678], requires_grad=True)
    y = scale_gradient(x, 0.3)
    assert torch.equal(y, x)
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.3, 0.6, 0.9]))


def test_the_diffusion_loss_reaches_the_encoder_through_input_and_target_and_is_gated_once() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    t_B = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def gradient(gamma: float, sources: str) -> torch.Tensor:
        z = start.clone().requires_grad_()
        gated = z.detach() + gamma * (z - z.detach()) if sources == "formula" else scale_gradient(z, gamma)
        x_t = diffuse(gated.detach() if sources == "target" else gated, noise, t_B, TanSchedule(3.0))
        target = gated.detach() if sources == "input" else gated
        loss = ((target - torch.tanh(x_t @ weight)) ** 2).mean()
        return torch.autograd.grad(loss, z)[0]

    both = gradient(1.0, "both")
    torch.testing.assert_close(gradient(0.05, "both"), 0.05 * both)
    torch.testing.assert_close(gradient(0.05, "both"), gradient(0.05, "formula"))
    torch.testing.assert_close(gradient(1.0, "input") + gradient(1.0, "target"), both)
    assert gradient(1.0, "input").abs().max() > 1e-3
    assert gradient(1.0, "target").abs().max() > 1e-3
