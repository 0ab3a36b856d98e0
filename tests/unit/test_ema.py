"""The average of weights against a float64 loop, in bf16 training too, and through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dllm_core.methods.protocol import StepInfo
from dllm_core.training.ema import Ema
from dllm_core.training.settings import TrainSettings
from tests.training_toy import ToyMethod, make_trainer


def _walk(steps: int, size: int, scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(size, generator=generator)
    moves = torch.randn(steps, size, generator=generator) * scale
    return [start, *(start + moves.cumsum(0))]


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, True), (0.999, True), (0.6, False)])
def test_it_is_the_exponential_average(decay: float, warmup: bool) -> None:
    weights = _walk(40, 6, 0.1)
    ema = Ema({"a.b": weights[0]}, decay, warmup)
    oracle = weights[0].double()
    for n, live in enumerate(weights[1:]):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        oracle = d * oracle + (1 - d) * live.double()
        ema.update({"a.b": live, "another": torch.ones(1)})
    torch.testing.assert_close(ema.averages()["a.b"].double(), oracle, rtol=1e-6, atol=1e-6)


def test_warmed_up_it_soon_forgets_where_it_started() -> None:
    ema = Ema({"w": torch.full((1,), 1e6)}, 0.9999)
    for _ in range(20):
        ema.update({"w": torch.ones(1)})
    share = 1.0
    for n in range(20):
        share *= (1 + n) / (10 + n)
    assert share < 1e-7
    assert float(ema.averages()["w"]) == pytest.approx(1 + share * 1e6, rel=1e-4)


def test_it_copies_what_it_starts_from() -> None:
    net = nn.Linear(2, 2)
    ema = Ema(net.named_parameters(), 0.9)
    kept = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1.0)
    assert torch.equal(ema.averages()["weight"], kept)
    assert not any(value.requires_grad for value in ema.averages().values())
    assert list(ema.parameters()) == []


def test_rounded_copies_average_to_within_their_rounding_and_mostly_much_better() -> None:
    still, moving = _walk(300, 4000, 1e-5), _walk(300, 4000, 1e-3)
    for weights, factor in ((still, 1.01), (moving, 0.45)):
        masters, copies = Ema({"w": weights[0]}, 0.98), Ema({"w": weights[0].bfloat16()}, 0.98)
        for live in weights[1:]:
            masters.update({"w": live})
            copies.update({"w": live.bfloat16()})
        average, of_copies = masters.averages()["w"], copies.averages()["w"]
        assert of_copies.dtype == torch.float32
        largest = torch.stack(weights).abs().amax(0)
        assert bool(((of_copies - average).abs() <= 2.0**-8 * largest + 1e-6).all())
        rounding = (weights[-1] - weights[-1].bfloat16().float()).square().mean().sqrt()
        assert (of_copies - average).square().mean().sqrt() < factor * rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_shows_the_averages_and_gives_the_weights_back_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    ema = Ema(dict(net[0].named_parameters(prefix="0")), 0.5, warmup=False)
    net.to(dtype)
    with torch.no_grad():
        net[0].weight.mul_(3.0)
    ema.update(net.named_parameters())
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    places = [p.data_ptr() for p in net.parameters()]

    def evaluate_and_fail() -> None:
        with ema.swapped(net):
            assert torch.equal(net[0].weight, ema.averages()["0.weight"].to(dtype))
            assert torch.equal(net[1].weight, before["1.weight"])
            assert not torch.equal(net[0].weight, before["0.weight"])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        evaluate_and_fail()
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())
    assert [p.data_ptr() for p in net.parameters()] == places
    assert all(p.requires_grad for p in net.parameters())
    ema.copy_to(net)
    assert torch.equal(net[0].weight, ema.averages()["0.weight"].to(dtype))


def test_a_missing_weight_and_a_wrong_decay_are_errors() -> None:
    with pytest.raises(KeyError):
        Ema({"a": torch.ones(1), "b": torch.ones(1)}, 0.9).update({"a": torch.ones(1)})
    with pytest.raises(ValueError, match="decay in"):
        Ema({"a": torch.ones(1)}, 1.0)


class _Averaged(ToyMethod):
    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.average = Ema(self.backbone.named_parameters(), 0.9)

    def on_step_end(self, info: StepInfo) -> None:
        self.average.update(self.backbone.named_parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_has_the_averages_of_an_uninterrupted_one(tmp_path: Path, dtype: str) -> None:
    settings = TrainSettings(steps=9, batch_size=4, lr=0.02, checkpoint_every_s=None, dtype=dtype)
    through = make_trainer(tmp_path / "a", settings, method=_Averaged())
    through.run()
    make_trainer(tmp_path / "b", settings, method=_Averaged()).run(stop_at=4)
    resumed = make_trainer(tmp_path / "b", settings, method=_Averaged())
    resumed.run()
    state, again = through.method.state_dict(), resumed.method.state_dict()
    names = [name for name in state if name.startswith("average.")]
    assert "average.mix/weight" in names
    assert int(again["average.num_updates"]) == 9
    assert all(torch.equal(state[name], again[name]) for name in names)
    assert not torch.equal(state["average.mix/weight"], state["backbone.mix.weight"])
