"""MasterAdamW against AdamW written out in float64, and the schedule against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dllm_core.training.optimiser import MasterAdamW
from dllm_core.training.schedule import learning_rate_scale, phase_starts, share_of_steps
from dllm_core.training.settings import TrainSettings


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.extra = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.linear(self.table(ids_BL)) @ self.extra))


def _optimiser(net: Net, **settings) -> MasterAdamW:  # type: ignore[no-untyped-def]
    own = [net.extra]
    rest = [p for p in net.parameters() if p is not net.extra]
    groups = [{"params": own, "lr_scale": 3.0, "weight_decay": 0.0}, {"params": [*rest, net.head.weight]}]
    names = {p: n for n, p in net.named_parameters()}
    defaults = {"steps": 5, "lr": 0.01, "weight_decay": 0.1, "clip_norm": 0.5}
    return MasterAdamW(groups, names, TrainSettings(**{**defaults, **settings}))


def _loss(net: Net, step: int) -> torch.Tensor:
    ids_BL = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(net(ids_BL).float().transpose(1, 2), ids_BL.roll(1, 1)) * (1 + 4 * step)


def _oracle(weights, gradients, moments, step, s, scale):  # type: ignore[no-untyped-def]
    """One step of clipped AdamW in float64, all parameters by name."""
    total = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
    factor = min(1.0, s.clip_norm / (total + 1e-6)) if total > s.clip_norm else 1.0
    for name, w in weights.items():
        g = gradients[name].double() * factor
        m, v = moments.setdefault(name, (torch.zeros_like(w), torch.zeros_like(w)))
        m, v = s.betas[0] * m + (1 - s.betas[0]) * g, s.betas[1] * v + (1 - s.betas[1]) * g * g
        moments[name] = (m, v)
        lr = s.lr * scale * (3.0 if name == "extra" else 1.0)
        decay = 0.0 if name == "extra" or w.ndim < 2 else s.weight_decay
        m_hat, v_hat = m / (1 - s.betas[0] ** (step + 1)), v / (1 - s.betas[1] ** (step + 1))
        weights[name] = w * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + s.eps)
    return total


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_masters_follow_adamw_in_float64(dtype: str) -> None:
    net = Net()
    optimiser = _optimiser(net, dtype=dtype)
    weights = {n: m.detach().double() for n, m in optimiser.masters.items()}
    moments: dict = {}
    for step, scale in enumerate([0.5, 1.0, 0.8, 0.3]):
        _loss(net, step).backward()
        gradients = {n: g.clone() for n, g in optimiser.gradients().items()}
        norm = optimiser.step(scale)
        assert norm == pytest.approx(_oracle(weights, gradients, moments, step, optimiser.settings, scale), rel=1e-5)
        for name, expected in weights.items():
            torch.testing.assert_close(optimiser.masters[name].double(), expected, rtol=1e-5, atol=1e-6, msg=name)
            compute = torch.bfloat16 if dtype == "bf16" else torch.float32
            assert torch.equal(optimiser.parameters[name], optimiser.masters[name].to(compute))
    assert not optimiser.gradients()


def test_tied_weights_count_once_and_get_both_gradients() -> None:
    plain, net = Net(), Net()
    _loss(plain, 0).backward()
    optimiser = _optimiser(net, dtype="bf16")
    assert sum(m.numel() for m in optimiser.masters.values()) == sum(p.numel() for p in plain.parameters())
    _loss(net, 0).backward()
    both = optimiser.gradients()["table.weight"]
    assert net.table.weight.grad is None  # freed as soon as it was taken
    torch.testing.assert_close(both, plain.table.weight.grad, rtol=0.1, atol=0.02)


def test_bf16_keeps_updates_that_bf16_weights_would_lose() -> None:
    net = Net()
    optimiser = _optimiser(net, dtype="bf16", lr=1e-5, weight_decay=0.0)
    before = {n: m.clone() for n, m in optimiser.masters.items()}
    for step in range(3):
        _loss(net, step).backward()
        optimiser.step(1.0)
    moved = [(optimiser.masters[n] - before[n]).abs().max().item() for n in before]
    assert min(moved) > 1e-6
    optimiser.restore_fp32()
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert torch.equal(net.table.weight, optimiser.masters["table.weight"])
    assert net.head.weight is net.table.weight


def test_a_parameter_without_gradient_is_left_alone() -> None:
    for dtype in ("fp32", "bf16"):
        net = Net()
        optimiser = _optimiser(net, dtype=dtype)
        (net.table.weight.float().sum() * 2).backward()
        before = net.linear.weight.clone()
        optimiser.step(1.0)
        assert torch.equal(net.linear.weight, before)


def test_an_infinite_gradient_updates_nothing() -> None:
    net = Net()
    optimiser = _optimiser(net)
    (_loss(net, 0) * float("inf")).backward()
    before = {n: m.clone() for n, m in optimiser.masters.items()}
    assert not math.isfinite(optimiser.step(1.0))
    assert all(torch.equal(m, before[n]) for n, m in optimiser.masters.items())


def test_schedule_closed_form() -> None:
    scales = [learning_rate_scale(s, 20, warmup_ratio=0.2, min_lr_ratio=0.1) for s in range(20)]
    assert scales[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 20):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 15)) / 2
        assert scales[step] == pytest.approx(expected)
    assert scales[-1] == pytest.approx(0.1)
    assert learning_rate_scale(0, 1, warmup_ratio=0.0, min_lr_ratio=0.1) == 1.0


def test_shares_are_rounded_alike_for_phases_and_prefixes() -> None:
    from dllm_core.methods.protocol import Phase

    for steps in range(1, 200):
        starts = phase_starts([Phase("a", 0.4), Phase("b", 0.6)], steps)
        assert starts == (0, share_of_steps(0.4, steps))
    assert phase_starts([Phase("a", 1 / 3)] * 3, 10) == (0, 3, 7)
