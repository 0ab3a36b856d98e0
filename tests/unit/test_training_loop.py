"""The trainer against independent oracles: unsplit batches, hand-made AdamW, uninterrupted runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dllm_core.data.order import SampleOrder
from dllm_core.errors import DllmError
from dllm_core.methods.protocol import LossOutput
from dllm_core.training.loop import Callbacks
from dllm_core.training.metrics_log import MetricsLog
from tests.training_toy import LENGTH, NUM, PROMPT, SETTINGS, ToyMethod, make_trainer, weights


def _gradients(tmp_path: Path, micro: int | None, dtype: str = "fp32") -> dict[str, torch.Tensor]:
    trainer = make_trainer(tmp_path, replace(SETTINGS, batch_size=8, micro_batch_size=micro, dtype=dtype))
    seen: dict[str, torch.Tensor] = {}
    begin = trainer.begin
    trainer.begin = lambda resume_from=None: 0  # type: ignore[method-assign]  # it is done here, before the spy
    begin()
    step = trainer.optimiser.step

    def spy(scale: float) -> float:
        seen.update({k: v.clone() for k, v in trainer.optimiser.gradients().items()})
        return step(scale)

    trainer.optimiser.step = spy  # type: ignore[method-assign]
    trainer.run(stop_at=1)
    return seen


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_accumulation_equals_the_unsplit_batch(tmp_path: Path, micro: int) -> None:
    whole, split = _gradients(tmp_path / "a", None), _gradients(tmp_path / "b", micro)
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        assert gradient.dtype == torch.float32
        assert gradient.abs().max() > 0
        torch.testing.assert_close(split[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_bf16_gradients_accumulate_in_fp32(tmp_path: Path) -> None:
    """Each micro-batch's bf16 gradient is exact in fp32; their sum must not be rounded to bf16 again."""
    split = _gradients(tmp_path / "b", 1, "bf16")
    assert any((g != g.bfloat16().float()).any() for g in split.values())
    reference = _gradients(tmp_path / "c", None)
    for name, gradient in reference.items():
        assert split[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(split[name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_metrics_hold_global_means_and_counters(tmp_path: Path) -> None:
    rows: list[dict] = []
    settings = replace(SETTINGS, micro_batch_size=3)
    result = make_trainer(tmp_path, settings, callbacks=rows.append).run()
    unsplit: list[dict] = []
    make_trainer(tmp_path / "other", SETTINGS, callbacks=unsplit.append).run()
    assert [r["step"] for r in rows] == list(range(1, 11))
    for split, whole in zip(rows, unsplit, strict=True):
        assert math.isclose(split["train/loss"], whole["train/loss"], rel_tol=1e-4)
        assert split["train/mdm"] == split["train/loss"]
        assert math.isclose(split["train/grad_norm"], whole["train/grad_norm"], rel_tol=1e-3)
    tokens = 10 * 4 * (LENGTH - PROMPT)
    assert result.response_tokens == rows[-1]["train/response_tokens"] == tokens
    assert result.positions == 10 * 4 * LENGTH
    assert result.flops == 10.0 * result.positions
    assert result.teacher_flops == 1.0 * result.positions
    assert math.isclose(result.final_losses["mdm"], sum(r["train/mdm"] for r in rows) / 10, rel_tol=1e-6)
    assert result.finished
    assert result.distinct_samples == NUM
    assert result.tokens_per_s == pytest.approx(tokens / result.wall_s)
    mfu = rows[0]["train/mfu"]
    assert mfu == pytest.approx(10.0 * 4 * LENGTH / rows[0]["train/step_s"] / 1e9)


def test_samples_are_taken_in_the_common_order(tmp_path: Path) -> None:
    method = ToyMethod()
    chosen: list[tuple[int, int]] = []
    select = method.select_samples
    method.select_samples = lambda order, info: chosen.extend(r := select(order, info)) or r  # type: ignore
    make_trainer(tmp_path, method=method).run(stop_at=5)
    order = SampleOrder(NUM, 0)
    assert chosen[:20] == [order[i] for i in range(20)]


def test_phases_follow_their_shares(tmp_path: Path) -> None:
    method = ToyMethod(shares=(0.25, 0.35, 0.4))
    rows: list[dict] = []
    make_trainer(tmp_path, replace(SETTINGS, steps=10), method=method, callbacks=rows.append).run()
    # starts: 0, 2.5 -> 3 (halves up), 6
    assert [r["phase"] for r in rows] == ["phase 0"] * 3 + ["phase 1"] * 3 + ["phase 2"] * 4
    infos = method.seen
    assert [i.phase_step for i in infos] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert [i.phase_start for i in infos] == [0] * 3 + [3] * 3 + [6] * 4
    assert {(i.phase, i.phase_steps) for i in infos} == {("phase 0", 3), ("phase 1", 3), ("phase 2", 4)}


def test_phase_starts_can_be_given(tmp_path: Path) -> None:
    method = ToyMethod(shares=(0.5, 0.5))
    settings = replace(SETTINGS, phase_starts=(0, 2))
    make_trainer(tmp_path, settings, method=method).run()
    assert [i.phase for i in method.seen] == ["phase 0"] * 2 + ["phase 1"] * 8
    with pytest.raises(DllmError, match="does not fit"):
        make_trainer(tmp_path, replace(SETTINGS, phase_starts=(0, 11)), method=ToyMethod(shares=(0.5, 0.5)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_text_samples_and_logging_leave_training_alone(tmp_path: Path, dtype: str) -> None:
    plain = make_trainer(tmp_path / "a", replace(SETTINGS, dtype=dtype), method=ToyMethod(dropout=0.3))
    plain.run()
    drafts: list[tuple[int, int]] = []
    progress: list[int] = []
    callbacks = Callbacks(
        on_sample=lambda step, sequences: drafts.append((step, len(sequences[0]))),
        on_progress=lambda row: progress.append(row["step"]),
    )
    settings = replace(SETTINGS, dtype=dtype, sample_every_steps=4, sample_tokens=6, checkpoint_every_s=0.0)
    prompts = [torch.tensor([1, 2, 3])]
    other = make_trainer(
        tmp_path / "b", settings, method=ToyMethod(dropout=0.3), callbacks=callbacks, sample_prompts=prompts
    )
    other.run()
    assert drafts == [(4, 9), (8, 9)]
    assert progress == [10]  # the clock never came round; the last step always reports
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(other)[name]), name


def test_frozen_parts_stay_as_they_were(tmp_path: Path) -> None:
    before = ToyMethod()
    trainer = make_trainer(tmp_path, replace(SETTINGS, freeze=("mlp",), dtype="bf16"))
    result = trainer.run()
    after, start = weights(trainer), before.state_dict()
    assert torch.equal(after["backbone.mix.weight"], start["backbone.mix.weight"])
    assert after["backbone.mix.weight"].dtype == torch.float32  # and not rounded by bf16 compute
    assert not torch.equal(after["backbone.table.weight"], start["backbone.table.weight"])
    assert result.trainable_params == sum(p.numel() for p in before.parameters()) - 8 * 8 - 8


def test_divergence_is_an_error_that_names_the_step(tmp_path: Path) -> None:
    method = ToyMethod()
    loss = method.loss

    def poisoned(corrupted, totals, info, resources) -> LossOutput:  # type: ignore[no-untyped-def]
        out = loss(corrupted, totals, info, resources)
        return replace(out, loss=out.loss * float("nan")) if info.step == 3 else out

    method.loss = poisoned  # type: ignore[method-assign]
    with pytest.raises(DllmError, match="diverged at step 4") as error:
        make_trainer(tmp_path, method=method).run()
    assert "train.lr" in error.value.remedy


def test_a_batch_without_masked_tokens_is_no_failure(tmp_path: Path) -> None:
    method = ToyMethod()
    method.loss = lambda *_: LossOutput(torch.zeros(()), {"mdm": 0.0})  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, method=method)
    assert trainer.run().final_losses == {"loss": 0.0, "mdm": 0.0}


def test_metrics_log_rewinds_and_forgets_a_cut_off_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        log.write({"step": step, "train/loss": 1.0 / step})
    with log.path.open("a") as file:
        file.write('{"step": 5, "tra')
    log.rewind(3)
    assert [r["step"] for r in log.rows()] == [1, 2, 3]
    log.write({"step": 4, "train/loss": 0.0})
    assert [r["train/loss"] for r in log.rows()] == [1.0, 0.5, 1 / 3, 0.0]
    branch = MetricsLog(tmp_path / "branch.jsonl")
    branch.rewind(2, source=log.path)
    assert [r["step"] for r in branch.rows()] == [1, 2]
