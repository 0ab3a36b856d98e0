"""The batched loop against a decoder that does one sample with Python loops in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dllm_core.samplers.config import SAMPLERS, DiffusionGenerationConfig
from dllm_core.samplers.loop import generate
from tests.generation_tools import easy, prompts
from tests.tiny import tiny_backbone
from tests.unit import sampler_oracle

SETTINGS = {
    "one_block": {"max_denoising_steps": 5},
    "blocks": {"max_denoising_steps": 7, "block_size": 5},
    "one_token_a_step": {"max_denoising_steps": 40},
    "sampled": {"max_denoising_steps": 6, "temperature": 1.5},
    "sampled_blocks": {"max_denoising_steps": 9, "temperature": 3.0, "block_size": 6},
    "filtered": {"max_denoising_steps": 6, "temperature": 2.0, "top_k": 20, "top_p": 0.8},
    "top_p": {"max_denoising_steps": 6, "temperature": 2.0, "top_p": 0.7},
    "cooling": {"max_denoising_steps": 6, "t_max": 3.0, "t_min": 0.5, "block_size": 6},
    "cooling_to_zero": {"max_denoising_steps": 4, "t_max": 3.0, "t_min": 0, "top_k": 30},
    "guided": {"max_denoising_steps": 6, "guidance_scale": 2.5, "block_size": 6},
    "guided_cached": {"max_denoising_steps": 6, "guidance_scale": 0.5, "temperature": 1.0, "cache": "dual"},
    "stable": {"max_denoising_steps": 14, "stability_threshold": 2, "block_size": 7},
    "stable_and_confident": {"max_denoising_steps": 14, "stability_threshold": 1, "confidence_threshold": 2.4},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rule", SAMPLERS)
def test_loop_equals_float64_reference(rule: str, setting: str) -> None:
    backbone = tiny_backbone("qwen3" if setting == "blocks" else "llama", layers=1)
    config = DiffusionGenerationConfig(
        max_new_tokens=14,
        sampler_config=easy(rule),
        stop_at_eos=False,
        record_history=True,
        seed=3,
        **SETTINGS[setting],
    )
    rows = prompts(4, 7)
    out = generate(backbone, rows, config, sample_ids=[5, 2])
    for row, (prompt, sample_id) in enumerate(zip(rows, (5, 2), strict=True)):
        ids = torch.cat((prompt, prompt.new_zeros(14)))
        tokens, commits, passes = sampler_oracle.decode(
            backbone, ids, torch.arange(len(ids)) < len(prompt), config, sample_id
        )
        assert out.sequences[row].tolist() == tokens
        assert out.commit_step is not None
        assert out.commit_step[row].tolist() == commits
        assert passes <= out.num_forwards
    assert out.num_forwards <= min(14, config.max_denoising_steps)


@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
def test_infilling_equals_float64_reference(alignment: str) -> None:
    backbone = tiny_backbone(alignment=alignment, layers=1)
    (ids,) = prompts(20)
    infill = torch.zeros(20, dtype=torch.bool)
    infill[[3, 4, 9, 10, 11, 12, 18, 19]] = True
    infill[0] = alignment == "same_position"
    config = DiffusionGenerationConfig(max_denoising_steps=5, block_size=3, sampler_config="margin", stop_at_eos=False)
    out = generate(backbone, [ids], config, infill_mask=[infill])
    tokens, _, passes = sampler_oracle.decode(backbone, ids, ~infill, config)
    assert out.sequences[0].tolist() == tokens
    assert out.num_forwards == passes == 5
    assert torch.equal(out.sequences[0][~infill], ids[~infill])


def test_alignment_decides_which_state_predicts() -> None:
    (prompt,) = prompts(6)
    config = DiffusionGenerationConfig(max_new_tokens=10, max_denoising_steps=4, stop_at_eos=False)
    shifted, same = (
        generate(tiny_backbone(alignment=a), [prompt], config).sequences[0] for a in ("shifted", "same_position")
    )
    assert not torch.equal(shifted, same)


def test_p2_masks_placed_tokens_again_and_scores_the_placed_token() -> None:
    """A rule that scored a fresh draw, or never revised, would give other tokens than the oracle does."""
    backbone = tiny_backbone(layers=1)
    (prompt,) = prompts(5)
    seen: list[Tensor] = []
    config = DiffusionGenerationConfig(
        max_new_tokens=14, max_denoising_steps=7, sampler_config="p2", temperature=3.0, stop_at_eos=False, seed=1
    )
    out = generate(backbone, [prompt], config, on_draft=lambda _, committed: seen.append(committed[0].clone()))
    revised = sum(int((before & ~after).sum()) for before, after in pairwise(seen))
    assert revised > 0
    assert [int(c.sum()) - 5 for c in seen] == [2, 4, 6, 8, 10, 12, 14]
    ids = torch.cat((prompt, prompt.new_zeros(14)))
    tokens, _, _ = sampler_oracle.decode(backbone, ids, torch.arange(19) < 5, config)
    assert out.sequences[0].tolist() == tokens
