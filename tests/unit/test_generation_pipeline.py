"""Several blocks at once: against d3LLM's description in float64, and against blocks one after the other."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from dllm_core.samplers.config import ADAPTIVE_SAMPLERS, DiffusionGenerationConfig
from dllm_core.samplers.loop import generate
from tests.generation_tools import Recorder, easy, prompts, settings_of
from tests.tiny import NUM_TOKENS, tiny_backbone
from tests.unit import sampler_oracle

any_rule = settings_of(max_new_tokens=23, max_denoising_steps=23, block_size=5)


def settings(rule: str, **options: Any) -> DiffusionGenerationConfig:
    return any_rule(sampler_config=easy(rule), **options)


@pytest.mark.parametrize("rule", sorted(ADAPTIVE_SAMPLERS))
@pytest.mark.parametrize("length", [1, 5, 12, 23])
def test_thresholds_of_one_are_blocks_one_after_the_other(family: str, rule: str, length: int) -> None:
    """Token for token and pass for pass, at lengths that leave a remainder too."""
    backbone = tiny_backbone(family)
    ones = {"block_add_threshold": 1.0, "decoded_token_threshold": 1.0}
    for cache in ("none", "dual"):
        options: dict[str, Any] = {"max_new_tokens": length, "cache": cache, "block_size": min(5, length)}
        found = generate(backbone, prompts(6, 9), settings(rule, multi_block=ones, **options))
        expected = generate(backbone, prompts(6, 9), settings(rule, **options))
        assert found.num_forwards == expected.num_forwards
        for name in ("sequences", "commit_step"):
            assert all(map(torch.equal, getattr(found, name), getattr(expected, name)))


@pytest.mark.parametrize("rule", ["threshold", "entropy_threshold"])
@pytest.mark.parametrize("eos", [False, True])
def test_pipeline_equals_the_float64_description(rule: str, eos: bool) -> None:
    chooser = random.Random(f"{rule} {eos}")
    saved = 0
    for trial in range(25):
        backbone = tiny_backbone(chooser.choice(["llama", "gpt2"]), layers=1, seed=trial)
        size, tokens = chooser.randint(1, 7), chooser.randint(1, 24)
        options: dict[str, Any] = {
            "max_new_tokens": tokens,
            "block_size": size,
            "max_denoising_steps": chooser.randint(-(-tokens // size), 24),
            "stop_at_eos": eos,
            "eos_token_id": tuple(range(0, NUM_TOKENS, 7)),
        }
        pipeline = {name: chooser.choice([0.1, 0.3, 0.5, 0.95, 1.0]) for name in ("block_add_threshold",)}
        pipeline["decoded_token_threshold"] = chooser.choice([0.1, 0.5, 0.95, 1.0])
        config = settings(rule, multi_block=pipeline, **options)
        rows = prompts(4, 7, seed=trial)
        out = generate(backbone, rows, config)
        passes = []
        for row, prompt in enumerate(rows):
            ids = torch.cat((prompt, prompt.new_zeros(tokens)))
            expected, used = sampler_oracle.decode_pipeline(backbone, ids, len(prompt), config)
            assert out.sequences[row].tolist() == expected, (trial, config)
            passes.append(used)
        assert out.num_forwards == max(passes) <= config.max_denoising_steps
        saved += generate(backbone, rows, settings(rule, **options)).num_forwards - out.num_forwards
    assert saved > 0, "pipelines that never save a pass would prove little"


@pytest.mark.parametrize("rule", sorted(ADAPTIVE_SAMPLERS))
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "delayed", "exact"])
def test_batches_streams_and_caches(rule: str, cache: str) -> None:
    backbone = tiny_backbone(model_block=5 if cache == "exact" else None)
    rows = prompts(9, 2, 14)
    config = settings(rule, cache=cache, multi_block={"block_add_threshold": 0.3, "decoded_token_threshold": 0.5})
    together = generate(backbone, rows, config)
    for row, prompt in enumerate(rows):
        recorder = Recorder()
        alone = generate(backbone, [prompt], config, sample_ids=[row], streamer=recorder)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert recorder.final == alone.sequences[0].tolist()
        assert len(recorder.drafts) == alone.num_forwards <= 23
        assert int(alone.sequences[0].max()) < NUM_TOKENS
    if cache == "exact":
        plain = generate(backbone, rows, settings(rule, multi_block=config.multi_block))
        assert all(map(torch.equal, plain.sequences, together.sequences))
