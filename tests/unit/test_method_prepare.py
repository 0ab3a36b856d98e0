"""Statistics that a method takes before its first step: taken once, kept by every checkpoint, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dllm_core.data.order import SampleOrder
from dllm_core.data.sequences import SequenceSet
from dllm_core.errors import DllmError
from dllm_core.methods.protocol import Corrupted, LossOutput, Resources, StepInfo
from dllm_core.training.checkpoint import checkpoint_path, read_checkpoint
from tests.training_toy import NUM, SETTINGS, VOCAB, ToyMethod, make_trainer, weights


class PreparedToy(ToyMethod):
    """Its loss is scaled by a buffer and a frozen parameter that `prepare` fills from the data; a weight moves too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("scale", torch.ones(()))
        self.frequency = nn.Parameter(torch.zeros(VOCAB), requires_grad=False)
        self.untouched = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)
        self.prepared: list[list[int]] = []

    def prepare(self, sequences: SequenceSet, samples: Sequence[int], resources: Resources) -> None:
        self.prepared.append(list(samples))
        ids = sequences.batch_of(samples).input_ids_BL
        self.scale.fill_(float(ids.float().mean()) / 7.0)
        counts = torch.bincount(ids.flatten(), minlength=VOCAB).float()
        self.frequency.copy_(counts / counts.sum() + 1e-3 * torch.rand(VOCAB))
        self.backbone.norm.weight.mul_(1.5)  # type: ignore[union-attr]

    def loss(self, corrupted: Corrupted, totals: dict[str, float], info: StepInfo, resources: Resources) -> LossOutput:
        out = super().loss(corrupted, totals, info, resources)
        return replace(out, loss=out.loss * self.scale * (1.0 + self.frequency.float().amax()))


class Killed(BaseException):
    """Stands for the end of a process."""


def _kill_after(step: int) -> Any:
    def kill(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Killed

    return kill


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_prepare_sees_the_samples_of_the_run_in_the_order_of_presentation(tmp_path: Path) -> None:
    method = PreparedToy()
    trainer = make_trainer(tmp_path, replace(SETTINGS, steps=3), method=method)
    trainer.run()
    order = SampleOrder(NUM, SETTINGS.seed)
    assert method.prepared == [[order[i][0] for i in range(12)]]
    longer = PreparedToy()
    make_trainer(tmp_path / "longer", replace(SETTINGS, steps=9), method=longer).run()
    (samples,) = longer.prepared
    assert sorted(samples) == list(range(NUM)), "nobody twice, in the second epoch either"


def test_masters_are_taken_from_prepared_weights(tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        trainer = make_trainer(tmp_path / dtype, replace(SETTINGS, dtype=dtype), method=PreparedToy())
        assert trainer.begin() == 0
        norm = trainer.optimiser.masters["backbone.norm.weight"]
        assert torch.equal(norm, torch.full_like(norm, 1.5))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_killed_run_goes_on_with_the_prepared_state_and_ends_at_the_same_bits(tmp_path: Path, dtype: str) -> None:
    settings = replace(SETTINGS, dtype=dtype)
    straight = make_trainer(tmp_path / "a", settings, method=PreparedToy(dropout=0.2))
    straight.run()
    first = make_trainer(
        tmp_path / "b", settings, method=PreparedToy(dropout=0.2), callbacks=_kill_after(6), checkpoint_at=(4,)
    )
    with pytest.raises(Killed):
        first.run()
    # a process of its own starts from other random weights, and must not prepare again
    method = PreparedToy(dropout=0.2, seed=9)
    rows: list[dict[str, Any]] = []
    second = make_trainer(tmp_path / "b", settings, method=method, callbacks=rows.append)
    second.run()
    assert [r["step"] for r in rows] == [5, 6, 7, 8, 9, 10]
    assert method.prepared == []
    assert not torch.equal(method.frequency, torch.zeros(VOCAB))
    assert method.frequency.dtype == torch.float32
    _equal(weights(straight), weights(second))


def test_a_branch_takes_the_preparation_of_its_prefix(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", method=PreparedToy())
    whole.run()
    make_trainer(tmp_path / "prefix", method=PreparedToy()).run(stop_at=4)
    method = PreparedToy(seed=9)
    branch = make_trainer(tmp_path / "branch", method=method)
    branch.run(resume_from=checkpoint_path(tmp_path / "prefix" / "checkpoints", 4))
    assert method.prepared == []
    _equal(weights(whole), weights(branch))


def test_checkpoints_hold_the_frozen_parameters_that_were_prepared_and_no_others(tmp_path: Path) -> None:
    make_trainer(tmp_path, replace(SETTINGS, dtype="bf16"), method=PreparedToy()).run(stop_at=2)
    tensors = read_checkpoint(checkpoint_path(tmp_path / "checkpoints", 2)).tensors()
    assert [n for n in tensors if n.startswith("frozen/")] == ["frozen/frequency"]
    assert tensors["frozen/frequency"].dtype == torch.float32
    assert {"state/scale", "state/ema"} <= tensors.keys()


def test_preparation_draws_the_same_numbers_whatever_was_drawn_before(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = PreparedToy()
    make_trainer(tmp_path / "one", method=one).begin()
    torch.rand(3)
    two = PreparedToy()
    before = torch.get_rng_state()
    make_trainer(tmp_path / "two", method=two).begin()
    assert torch.equal(one.frequency, two.frequency)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_method_without_a_backbone_has_nothing_to_freeze(tmp_path: Path) -> None:
    method = PreparedToy()
    method.network = method.backbone
    method.backbone = None
    with pytest.raises(DllmError, match=r"train\.freeze") as caught:
        make_trainer(tmp_path, replace(SETTINGS, freeze=("mlp",)), method=method)
    assert len(str(caught.value).splitlines()) == 2
    make_trainer(tmp_path, replace(SETTINGS, activation_checkpointing=True), method=method)  # memory alone: no error
    assert method.device == torch.device("cpu")
