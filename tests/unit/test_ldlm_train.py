"""LDLM through the trainer on anchors of a tiny model: resume, precision, micro-batches, a loop over few sequences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.order import SampleOrder
from dllm_core.data.sequences import SequenceSet
from dllm_core.methods.ldlm.method import Method
from dllm_core.methods.protocol import Resources
from dllm_core.training.ema import Ema
from dllm_core.training.loop import Callbacks, Trainer
from dllm_core.training.settings import TrainSettings
from tests.ldlm_tools import extracted_anchors, refusal, tiny_ldlm
from tests.method_tools import step_info
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone

SETTINGS = TrainSettings(steps=12, batch_size=4, lr=3e-3, checkpoint_every_s=None)
OPTIONS: dict[str, Any] = {"adaptive_refresh": 0.25, "consistency": 0.1, "gate_warmup": 0.5}


@pytest.fixture(scope="module")
def anchored(tmp_path_factory: pytest.TempPathFactory) -> tuple[SequenceSet, Resources]:
    """Return sequences, and a real store with their states on response rows alone."""
    data = random_sequences(10, 14, 5, NUM_TOKENS)
    return data, extracted_anchors(tmp_path_factory.mktemp("anchors"), data, tiny_ldlm().options)


def _trainer(
    workdir: Path,
    anchored: tuple[SequenceSet, Resources],
    method: Method | None = None,
    callbacks: Any = None,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    data, resources = anchored
    return Trainer(
        method or _method(),
        data,
        SampleOrder(len(data), 0),
        replace(SETTINGS, **settings),
        resources,
        NoiseSource(0),
        workdir,
        callbacks,
        peak_flops=1e9,
        **(more or {}),
    )


def _method(move: float = 0.0, seed: int = 0, **options: Any) -> Method:
    """Return a method whose time density adapts to the few samples of a test."""
    method = tiny_ldlm(move=move, seed=seed, **{**OPTIONS, **options})
    method.times.pool = 2.0
    return method


class Killed(BaseException):
    """Stands for the end of a process."""


def _state(method: Method) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_killed_run_continues_bit_for_bit(anchored, tmp_path, dtype):
    """Weights, averages, time density and statistics; the resumed method starts from other random weights."""
    rows: dict[str, list[dict]] = {"whole": [], "resumed": []}
    whole = _trainer(tmp_path / "a", anchored, callbacks=rows["whole"].append, dtype=dtype)
    whole.run()

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 9:
            raise Killed

    with pytest.raises(Killed):
        _trainer(tmp_path / "b", anchored, callbacks=kill, more={"checkpoint_at": {7}}, dtype=dtype).run()
    resumed = _trainer(
        tmp_path / "b",
        anchored,
        _method(move=0.1, seed=9),
        callbacks=rows["resumed"].append,
        dtype=dtype,
    )
    resumed.run()
    expected, found = _state(whole.method), _state(resumed.method)
    assert expected.keys() == found.keys()
    assert {"mean_D", "std_D", "times.cdf", "ema.num_updates"} <= expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert int(found["ema.num_updates"]) == 12
    assert not torch.equal(found["times.cdf"], tiny_ldlm().times.cdf.to(found["times.cdf"]))
    timed = ("time", "train/step_s", "train/tokens_per_s", "train/mfu", "train/memory_gb")
    for a, b in zip(rows["whole"][7:], rows["resumed"], strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_losses_fall_in_either_precision(anchored, tmp_path, dtype):
    rows: list[dict] = []
    method = tiny_ldlm(move=0.0, start="random")
    _trainer(tmp_path, anchored, method, rows.append, dtype=dtype, steps=60, lr=1e-2).run()
    for part in ("diffusion_mse", "state_mse", "token_nats"):
        values = [row[f"train/{part}"] for row in rows]
        assert all(math.isfinite(v) for v in values)
        assert sum(values[-5:]) < 0.95 * sum(values[:5]), part
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    assert method.mean_D.dtype == torch.float32
    assert rows[-1]["train/flops"] == pytest.approx(
        60 * method.options.step_flops(method.base.shape, 4 * 9, 4 * 5, sequences=4)
    )
    with_look = [row["step"] for row in rows if "train/reconstruction_accuracy" in row]
    assert with_look[0] == 1
    assert with_look[-1] == 60


def test_micro_batches_train_the_same_weights(anchored, tmp_path):
    weights = []
    for size in (None, 1, 3):
        trainer = _trainer(tmp_path / str(size), anchored, micro_batch_size=size, steps=5)
        trainer.run()
        weights.append(_state(trainer.method))
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=2e-3, atol=2e-5, msg=name)


def test_statistics_come_before_the_first_step_and_only_once(anchored, tmp_path, monkeypatch):
    prepared = []
    original = Method.prepare
    monkeypatch.setattr(Method, "prepare", lambda self, *a: (prepared.append(list(a[1])), original(self, *a))[1])
    trainer = _trainer(tmp_path, anchored)
    trainer.run(stop_at=3)
    order = SampleOrder(10, 0)
    assert prepared == [[order[i][0] for i in range(10)]]
    _trainer(tmp_path, anchored).run()
    assert len(prepared) == 1


def test_the_averages_follow_the_weights_step_by_step(anchored, tmp_path):
    """Against an average computed here from the weights after every step."""
    method = tiny_ldlm(move=0.0, ema_decay=0.6)
    seen: list[dict[str, Tensor]] = []
    original = method.on_step_end

    def note(info: Any) -> None:
        seen.append({n: p.detach().double().clone() for n, p in method.networks.named_parameters()})
        original(info)

    method.on_step_end = note  # type: ignore[method-assign]
    data, resources = anchored
    twin = tiny_ldlm(move=0.0, ema_decay=0.6)
    twin.prepare(data, [SampleOrder(10, 0)[i][0] for i in range(10)], resources)
    _trainer(tmp_path, anchored, method, steps=6).run()
    assert isinstance(method.ema, Ema)
    for name, parameter in twin.networks.named_parameters():
        average = parameter.detach().double()
        for n, weights in enumerate(seen):
            decay = min(0.6, (1 + n) / (10 + n))
            average = decay * average + (1 - decay) * weights[name]
        torch.testing.assert_close(method.ema.averages()[name].double(), average, rtol=1e-4, atol=1e-6, msg=name)


def test_the_time_density_is_refreshed_as_often_as_the_run_is_long(anchored, tmp_path):
    method = _method(adaptive_refresh=0.25)
    trainer = _trainer(tmp_path, anchored, method)
    changes, last = [], None
    for step in range(12):
        if step == 0:
            trainer.begin()
        trainer.step(step)
        now = method.times.cdf.clone()
        if last is not None and not torch.equal(now, last):
            changes.append(step + 1)
        last = now
    assert changes
    assert set(changes) <= {3, 6, 9, 12}
    assert method.times.refresh_every == 3
    assert float(method.times.loss_count.sum()) == pytest.approx(sum(4 * (2 / 3) ** k for k in range(12)))


def test_few_anchored_sequences_are_looped_over(anchored, tmp_path):
    data, _ = anchored
    order = SampleOrder(10, 0)
    first = [order[i][0] for i in range(6)]
    options = {**OPTIONS, "anchor_sequences": 6}
    method = tiny_ldlm(move=0.0, **options)
    few = data.select(first)
    resources = extracted_anchors(tmp_path / "few", few, method.options)
    presented = [method.select_samples(order, step_info(step=s)) for s in range(4)]
    assert [p for step in presented for p in step] == [(first[i % 6], i // 6) for i in range(16)]
    result = _trainer(tmp_path / "run", (data, resources), method).run()
    assert result.finished
    assert result.distinct_samples == 6


def test_text_samples_while_training_change_nothing(anchored, tmp_path):
    quiet = _trainer(tmp_path / "a", anchored)
    quiet.run()
    texts: list[Any] = []
    callbacks = Callbacks(on_sample=lambda step, text: texts.append((step, text)))
    prompts = {"sample_prompts": [torch.tensor([4, 5, 6])]}
    talking = _trainer(
        tmp_path / "b", anchored, callbacks=callbacks, more=prompts, sample_every_steps=5, sample_tokens=6
    )
    talking.run()
    assert [step for step, _ in texts] == [5, 10]
    assert all(len(text[0]) == 9 for _, text in texts)
    found = _state(talking.method)
    for name, value in _state(quiet.method).items():
        assert torch.equal(value, found[name]), name


# -- what is refused ------------------------------------------------------------------------------------------------


def test_missing_anchors_are_named(anchored, tmp_path):
    data, resources = anchored
    problem, remedy = refusal(lambda: _trainer(tmp_path / "a", (data, Resources())).run())
    assert "no anchor store" in problem
    assert "layer 2" in remedy
    other = random_sequences(10, 14, 5, NUM_TOKENS, seed=8)
    problem, remedy = refusal(lambda: _trainer(tmp_path / "b", (other, resources)).run())
    assert other.keys[SampleOrder(10, 0)[0][0]][:12] in problem or "are not in" in problem
    assert "Run again" in remedy
    deeper = tiny_ldlm(move=0.0, layer=-2)
    problem, _ = refusal(lambda: _trainer(tmp_path / "c", anchored, deeper).run())
    assert "hold layers 2, not '3'" in problem
    wide = tiny_ldlm(move=0.0, prompt_encoder="backbone")
    problem, _ = refusal(lambda: _trainer(tmp_path / "d", anchored, wide).run())
    assert "row 0 is read" in problem


def test_states_of_another_model_are_refused(anchored, tmp_path):
    data, resources = anchored
    method = tiny_ldlm(move=0.0)
    wide = extracted_anchors(
        tmp_path / "wide", data, method.options, tiny_backbone("llama", layers=4, hidden=48, seed=1)
    )
    problem, remedy = refusal(lambda: _trainer(tmp_path / "a", (data, wide), method).run())
    assert "48 wide" in problem
    assert "32" in problem
    assert remedy
    store = type(resources.anchors)(resources.anchors.files.root, "another teacher", "fp32")
    problem, _ = refusal(lambda: _trainer(tmp_path / "b", (data, Resources(anchors=store)), method).run())
    assert "another" in problem


def test_parts_that_are_not_there_cannot_be_frozen(anchored, tmp_path):
    problem, _ = refusal(lambda: _trainer(tmp_path, anchored, freeze=("mlp",)))
    assert "train.freeze" in problem
