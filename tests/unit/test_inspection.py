"""The inspector against decodes of other models, against counts done by hand, and its table."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import schedule
from dllm_core.backbone.conversion import convert
from dllm_core.errors import DllmError
from dllm_core.samplers.config import ADAPTIVE_SAMPLERS, SAMPLERS, DiffusionGenerationConfig
from dllm_core.samplers.inspection import Inspection, planned, watched
from dllm_core.samplers.loop import generate
from tests.tiny import NUM_TOKENS, tiny_backbone, write_source

SCHEDULED = sorted(set(SAMPLERS) - ADAPTIVE_SAMPLERS)


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, NUM_TOKENS, (n,), generator=generator) for n in lengths]


def settings(**options: Any) -> DiffusionGenerationConfig:
    return DiffusionGenerationConfig(
        **{"max_new_tokens": 13, "max_denoising_steps": 8, "stop_at_eos": False, **options}
    )


@pytest.mark.parametrize("rule", SCHEDULED)
def test_what_is_planned_is_what_a_real_model_does(family: str, rule: str) -> None:
    """Counts from a decode of another model: the record of its passes, a hook on its first block, its output."""
    chooser = random.Random(f"{family} {rule}")
    for trial in range(4):
        model_block = chooser.choice([None, None, 4])
        alignment = chooser.choice(["shifted", "same_position"])
        backbone = tiny_backbone(family, seed=trial, alignment=alignment, model_block=model_block)
        lengths = [chooser.randint(1, 12) for _ in range(chooser.randint(1, 3))]
        kinds = ["none", "exact"] if model_block else ["none", "prefix", "dual", "delayed"]
        config = settings(
            sampler_config=rule,
            max_denoising_steps=chooser.randint(7, 15),
            block_size=chooser.choice([3, 5]),
            cache=chooser.choice(kinds),
            guidance_scale=chooser.choice([1.0, 2.0]),
            record_passes=True,
            record_history=True,
        )
        tokens: list[int] = []
        handle = backbone.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, tokens=tokens: tokens.append(
                (args[0] if args else kwargs["hidden_states"]).shape[:2].numel()
            ),
            with_kwargs=True,
        )
        out = generate(backbone, prompts(*lengths, seed=trial), config)
        handle.remove()
        found = planned(config, lengths, alignment=alignment, model_block=model_block)
        assert found.num_forwards == out.num_forwards == len(tokens)
        assert [p.network_tokens for p in found.passes] == tokens
        assert found.tokens_per_forward == pytest.approx(out.tokens_per_forward)
        assert out.history is not None
        halves = 1 if config.guidance_scale == 1 else 2
        assert [p.head_rows for p in found.passes] == [
            halves * int((~step.score_BC.isnan()).sum()) for step in out.history
        ]
        mask, places = backbone.contract.mask_token_id, 13 * len(lengths)
        canvases = [*(step.canvas_BC for step in out.history[1:]), torch.zeros(1)]
        standing = [places - int((canvas == mask).sum()) for canvas in canvases]
        assert [p.standing for p in found.passes] == standing
        assert [p.tokens for p in found.passes] == [b - a for a, b in zip([0, *standing], standing, strict=False)]
        if rule != "p2":
            assert out.commit_step is not None
            commits = torch.cat(out.commit_step)
            assert [p.tokens for p in found.passes] == [
                int((commits == number).sum()) for number in range(1, found.num_forwards + 1)
            ]


@pytest.mark.parametrize("rule", sorted(ADAPTIVE_SAMPLERS))
def test_what_is_watched_is_what_happened(rule: str) -> None:
    easy = {"threshold": 0.08, "factor": 2.4, "entropy_bound": 4.0, "entropy_threshold": 4.1}
    config = settings(
        sampler_config={"name": rule, rule: easy[rule]},
        max_denoising_steps=13,
        block_size=4,
        multi_block={},
        record_history=True,
    )
    rows = prompts(5, 3)
    out = generate(tiny_backbone(), rows, config)
    found = watched(tiny_backbone(), rows, config)
    assert out.commit_step is not None
    commits = torch.cat(out.commit_step)
    assert [p.tokens for p in found.passes] == [
        int((commits == number).sum()) for number in range(1, out.num_forwards + 1)
    ]
    assert found.tokens_per_forward == pytest.approx(out.tokens_per_forward)
    assert found.num_forwards < 13, "the rule does accept several at once"
    assert any(p.last_block > p.first_block for p in found.passes), "blocks do join in"
    assert max(p.last_block for p in found.passes) == 4
    assert {p.network_tokens for p in found.passes} == {2 * 18}


def test_an_early_end_and_infilling_are_watched() -> None:
    backbone = tiny_backbone()
    ending = settings(stop_at_eos=True, eos_token_id=list(range(0, NUM_TOKENS, 2)), block_size=2)
    out = generate(backbone, prompts(5), ending)
    found = watched(backbone, prompts(5), ending)
    assert (found.num_forwards, found.new_tokens) == (out.num_forwards, out.new_tokens[0])
    assert found.new_tokens < 13
    assert planned(ending, [5]).num_forwards == 8, "known beforehand is the text that does not end"
    (row,) = prompts(9)
    holes = torch.tensor([False, True, False, False, True, True, False, True, False])
    filled = watched(backbone, [row], settings(max_denoising_steps=3), infill_mask=[holes])
    assert [p.tokens for p in filled.passes] == [2, 1, 1]
    assert [p.head_rows for p in filled.passes] == [4, 2, 1]
    assert filled.canvas_tokens == 9


def test_verification_and_drift_are_left_out() -> None:
    backbone = tiny_backbone()
    plain = watched(backbone, prompts(5), settings(block_size=5, cache="dual"))
    assert watched(backbone, prompts(5), settings(block_size=5, cache="dual", measure_drift=True)) == plain
    assert watched(backbone, prompts(5), settings(verify=True)) == watched(backbone, prompts(5), settings())


def test_planning_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    planned(settings(), [4])
    assert torch.equal(torch.rand(2), expected)


def test_counts_by_hand() -> None:
    """12 new tokens in blocks of 4 behind 3 given, 5 steps, the first block in 2 of them, keys of both sides kept."""
    found = planned(settings(max_new_tokens=12, max_denoising_steps=5, block_size=4, cache="dual"), [3])
    assert [p.tokens for p in found.passes] == [2, 2, 2, 2, 4]
    assert [p.standing for p in found.passes] == [2, 4, 6, 8, 12]
    assert [p.head_rows for p in found.passes] == [4, 2, 4, 2, 4]
    assert [p.network_tokens for p in found.passes] == [15, 5, 15, 5, 15]
    assert [(p.first_block, p.last_block) for p in found.passes] == [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3)]
    assert (found.total("head_rows"), found.total("network_tokens")) == (16, 55)


def test_the_table_folds_passes_that_are_alike() -> None:
    found = planned(settings(max_new_tokens=12, max_denoising_steps=6), [3])
    assert found.table().splitlines() == [
        "pass  blocks  tokens  standing  head rows  network tokens",
        "1..6       1       2     2..12      12..2              15",
        "6 passes (NFE), 12 tokens, 2.00 per row and pass",
        "head: 42 rows (47 % of all); network: 90 tokens (100 % of whole canvases)",
    ]
    lines = found.table(every_pass=True).splitlines()
    assert len(lines) == 1 + 6 + 2
    assert lines[6].split() == ["6", "1", "2", "12", "2", "15"]


@pytest.mark.parametrize("rule", sorted(ADAPTIVE_SAMPLERS))
def test_scores_are_not_guessed(rule: str) -> None:
    with pytest.raises(DllmError, match=rf"{rule}.*\n.*Give a model and a prompt"):
        planned(settings(sampler_config=rule), [4])
    with pytest.raises(DllmError, match="stability_threshold=1"):
        planned(settings(stability_threshold=1), [4])


def test_settings_that_generate_refuses_are_refused() -> None:
    with pytest.raises(DllmError, match="at least 5 steps"):
        planned(settings(block_size=3, max_denoising_steps=4), [4])
    with pytest.raises(DllmError, match=r"exact.*block-causal"):
        planned(settings(cache="exact"), [4])


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--new-tokens", "12", "--steps", "5", "--block-size", "4", "--cache", "dual", "--prompt-tokens", "3"]
    assert schedule.main(command) == 0
    expected = planned(settings(max_new_tokens=12, max_denoising_steps=5, block_size=4, cache="dual"), [3])
    assert capsys.readouterr().out.strip() == expected.table()
    more = json.dumps({"guidance_scale": 2.0, "sampler_config": "p2"})
    assert schedule.main(["--new-tokens", "6", "--steps", "3", "--prompt-tokens", "3,2", "--config", more]) == 0
    p2 = planned(settings(max_new_tokens=6, max_denoising_steps=3, sampler_config="p2", guidance_scale=2.0), [3, 2])
    assert capsys.readouterr().out.strip() == p2.table()
    blocks = ["--new-tokens", "8", "--steps", "4", "--model-block", "4", "--cache", "exact", "--every-pass"]
    assert schedule.main(blocks) == 0
    exact = planned(settings(max_new_tokens=8, max_denoising_steps=4, cache="exact"), [32], model_block=4)
    assert capsys.readouterr().out.strip() == exact.table(every_pass=True)


def test_the_command_watches_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(write_source(tmp_path / "plain"), tmp_path / "model", alignment="shifted")
    command = ["--model", str(tmp_path / "model"), "--new-tokens", "8", "--steps", "8", "--rule", "threshold=0.02"]
    command += ["--block-size", "4", "--multi-block", "0.5,0.5"]
    args = schedule.arguments([*command, "--prompt", "My fellow", "--prompt", "The fox"])
    found = schedule.inspect(args)
    from dllm_core.backbone.backbone import Backbone

    rows = schedule.tokenised(args.model, args.prompt)
    assert [len(row) for row in rows] == [9, 7]
    config = DiffusionGenerationConfig(
        max_new_tokens=8,
        max_denoising_steps=8,
        block_size=4,
        sampler_config={"name": "threshold", "threshold": 0.02},
        multi_block={"block_add_threshold": 0.5, "decoded_token_threshold": 0.5},
    )
    out = generate(Backbone.from_pretrained(tmp_path / "model"), rows, config)
    assert (found.num_forwards, found.new_tokens) == (out.num_forwards, sum(out.new_tokens))
    assert schedule.main(command) == 0
    assert "passes (NFE)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["--rule", "threshold"], "Give a model"),
        (["--rule", "confident"], "Did you mean 'confidence'"),
        (["--rule", "threshold=high"], "not a number"),
        (["--multi-block", "1"], "Write 0.1,0.95"),
        (["--config", "{"], "cannot be read"),
        (["--config", "[1]"], "names no settings"),
        (["--rule", "confidence=3"], "It has no settings"),
        (["--model-block", "0"], "--model-block=0"),
        (["--model", "nowhere", "--device", "cuda"], "no usable GPU"),
        (["--prompt", "x"], "Give --model"),
        (["--steps", "0"], "max_denoising_steps"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_two_lines(
    command: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert schedule.main(command) == 2
    assert told in capsys.readouterr().err


def test_an_inspection_of_nothing_has_no_rate() -> None:
    assert Inspection((), 1, 5, 0).tokens_per_forward == 0
