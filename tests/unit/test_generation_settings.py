"""Guidance, falling temperature, stability, history and the self-check: what each setting promises, in closed form."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.samplers import denoisers
from dllm_core.samplers.config import SAMPLERS
from dllm_core.samplers.loop import generate
from dllm_core.samplers.verify import VerificationError
from tests.generation_tools import prompts, same_tokens, settings_of, watch_passes
from tests.tiny import NUM_TOKENS, tiny_backbone

settings = settings_of(max_new_tokens=12, max_denoising_steps=12)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


# -- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_of_zero_reads_no_prompt_and_of_one_reads_nothing_else(backbone: Backbone) -> None:
    """Scale 0 is the unconditional model: a prompt made of mask tokens (as data) decodes to the same response.

    Left to right: all places of a canvas of masks look alike, and rounding would choose among them.
    """
    rows = prompts(5, 8)
    free = generate(backbone, rows, settings(guidance_scale=0, block_size=1))
    masked = [torch.full_like(row, backbone.contract.mask_token_id) for row in rows]
    expected = generate(backbone, masked, settings(block_size=1))
    for found, other, row in zip(free.sequences, expected.sequences, rows, strict=True):
        assert torch.equal(found[len(row) :], other[len(row) :])
        assert torch.equal(found[: len(row)], row)
    assert same_tokens(generate(backbone, rows, settings(guidance_scale=1.0)), generate(backbone, rows, settings()))
    assert not same_tokens(free, generate(backbone, rows, settings(block_size=1)))


def test_guidance_is_one_batched_pass(backbone: Backbone) -> None:
    with watch_passes(backbone) as passes:
        out = generate(backbone, prompts(5, 8), settings(guidance_scale=2))
    assert passes.rows == [4] * 12
    assert out.num_forwards == 12


# -- temperature ----------------------------------------------------------------------------------------------------


def test_temperature_falls_over_the_passes_of_each_block() -> None:
    config = settings(t_max=1.0, t_min=0.2)
    found = [config.temperature_at(left / 4) for left in (4, 3, 2, 1)]
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_a_hardly_falling_temperature_is_a_constant_one(backbone: Backbone) -> None:
    rows = prompts(5, 8)
    falling = generate(backbone, rows, settings(t_max=1.5, t_min=1.5 - 1e-9, block_size=5))
    assert same_tokens(falling, generate(backbone, rows, settings(temperature=1.5, block_size=5)))


# -- stability ------------------------------------------------------------------------------------------------------


def test_stability_saves_passes_and_changes_no_draft() -> None:
    """Every token that was accepted early is the one that had been drafted at each of the passes before."""
    backbone = tiny_backbone(layers=1)
    (prompt,) = prompts(6, seed=7)
    config = settings(stability_threshold=2, record_passes=True)
    out = generate(backbone, [prompt], config)
    assert 3 < out.num_forwards < 12
    assert out.history is not None
    before, *last = [step.drafted_BC[0] for step in out.history[-4:]]
    assert all(torch.equal(out.sequences[0], drafted) for drafted in last)
    assert not torch.equal(before, last[0])
    unsure = generate(backbone, [prompt], replace(config, confidence_threshold=1e-6))
    assert unsure.num_forwards == 12
    assert same_tokens(unsure, generate(backbone, [prompt], settings()))


@pytest.mark.parametrize("rule", SAMPLERS)
def test_rows_come_to_rest_by_themselves(backbone: Backbone, rule: str) -> None:
    rows = prompts(9, 2, 14)
    config = settings(stability_threshold=1, block_size=6, sampler_config=rule)
    together = generate(backbone, rows, config)
    alone = [generate(backbone, [row], config, sample_ids=[i]) for i, row in enumerate(rows)]
    assert all(torch.equal(a.sequences[0], b) for a, b in zip(alone, together.sequences, strict=True))
    assert together.num_forwards == max(a.num_forwards for a in alone)
    assert all(int(s.max()) < NUM_TOKENS for s in together.sequences)


# -- history --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SAMPLERS)
def test_history_leads_from_the_first_canvas_to_the_last(backbone: Backbone, rule: str) -> None:
    rows = prompts(4, 7)
    seen: list[Tensor] = []
    config = settings(sampler_config=rule, block_size=5, temperature=1.0, record_passes=True)
    out = generate(backbone, rows, config, on_draft=lambda drafted, _: seen.append(drafted.clone()))
    assert out.history is not None
    assert len(out.history) == out.num_forwards
    mask = backbone.contract.mask_token_id
    for step, after, drafted in zip(out.history, [*out.history[1:], None], seen, strict=True):
        assert torch.equal(step.drafted_BC, drafted)
        scored = ~step.score_BC.isnan()
        assert not (step.accepted_BC & ~scored).any()
        standing = torch.where(scored & ~step.accepted_BC, mask, step.drafted_BC)
        if after is not None:
            assert torch.equal(standing, after.canvas_BC)
        else:
            assert all(torch.equal(standing[i, : len(s)], s) for i, s in enumerate(out.sequences))
        if rule not in ("p2", "random"):
            for row in range(2):
                rest = step.score_BC[row][scored[row] & ~step.accepted_BC[row]]
                taken = step.score_BC[row][step.accepted_BC[row]]
                assert not len(rest) or not len(taken) or taken.min() >= rest.max()


# -- self-check -----------------------------------------------------------------------------------------------------


def test_verified_decodes_of_every_kind_pass() -> None:
    chooser = random.Random(3)
    for trial, rule in enumerate([*SAMPLERS, *SAMPLERS]):
        block = chooser.choice([None, 4])
        model = tiny_backbone(chooser.choice(["llama", "gpt2", "qwen3"]), model_block=block, seed=trial)
        config = settings(
            sampler_config=rule,
            cache="exact" if block else "none",
            temperature=chooser.choice([0.0, 1.0]),
            block_size=chooser.choice([None, 3]),
            guidance_scale=chooser.choice([1.0, 2.0]),
            stability_threshold=chooser.choice([None, 1]),
            stop_at_eos=chooser.choice([True, False]),
            eos_token_id=tuple(range(0, NUM_TOKENS, 9)),
        )
        rows = prompts(*(chooser.randint(1, 9) for _ in range(chooser.randint(1, 3))), seed=trial)
        out = generate(model, rows, replace(config, verify=True))
        assert same_tokens(out, generate(model, rows, config))
        assert out.history is None


@pytest.mark.parametrize("block", [4, None])
def test_the_first_difference_is_reported_where_it_is(monkeypatch: pytest.MonkeyPatch, block: int | None) -> None:
    """A cache that forgets to write one pass, and a batch in which a row reads another's states."""
    model = tiny_backbone(model_block=block)
    kind = denoisers.CachedCanvas if block else denoisers.FullCanvas
    predict, calls = kind.predict, [0]

    def wrong(self: Any, canvas_BC: Tensor, spans: Any, where_M: Tensor) -> Tensor:
        calls[0] += canvas_BC.shape[0] == 2
        hidden_MD = predict(self, canvas_BC, spans, where_M)
        return hidden_MD.flip(0) if canvas_BC.shape[0] == 2 and calls[0] == 3 else hidden_MD

    monkeypatch.setattr(kind, "predict", wrong)
    config = settings(verify=True, cache="exact" if block else "none")
    with pytest.raises(VerificationError, match=r"Pass 3, row [01], position \d+: the (token|mask) is"):
        generate(model, prompts(5, 6), config)
