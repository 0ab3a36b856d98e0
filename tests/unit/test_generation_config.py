"""Generation settings: what is accepted, what is refused and how."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest

from dllm_core.errors import DllmError
from dllm_core.samplers.acceptance import RULES
from dllm_core.samplers.config import (
    ADAPTIVE_SAMPLERS,
    SAMPLERS,
    ConfidenceSamplerConfig,
    DiffusionGenerationConfig,
    ThresholdSamplerConfig,
)


@pytest.mark.parametrize("rule", SAMPLERS)
def test_round_trip_through_json(rule: str) -> None:
    config = DiffusionGenerationConfig(
        max_new_tokens=7,
        sampler_config=rule,
        top_p=0.9,
        eos_token_id=[1, 2],
        block_size=4,
        cache={"kind": "delayed", "delay": 3},
        t_max=0.9,
        t_min=0.1,
    )
    assert DiffusionGenerationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_pipelines_round_trip() -> None:
    config = DiffusionGenerationConfig(sampler_config="factor", multi_block={"block_add_threshold": 0.5})
    assert DiffusionGenerationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.multi_block is not None
    assert (config.multi_block.block_add_threshold, config.multi_block.decoded_token_threshold) == (0.5, 0.95)


def test_rules_can_be_named_in_three_ways() -> None:
    ways: tuple[Any, ...] = (
        ThresholdSamplerConfig(threshold=0.7),
        {"name": "threshold", "threshold": 0.7},
    )
    for way in ways:
        assert DiffusionGenerationConfig(sampler_config=way).sampler_config == ways[0]
    assert DiffusionGenerationConfig(sampler_config="confidence").sampler_config == ConfidenceSamplerConfig()
    assert set(RULES) == set(SAMPLERS)
    assert {name for name, rule in RULES.items() if rule.adaptive} == ADAPTIVE_SAMPLERS


@pytest.mark.parametrize(
    ("settings", "problem", "remedy"),
    [
        ({"max_new_tokns": 3}, "Unknown generation setting 'max_new_tokns'", "max_new_tokens"),
        ({"sampler_config": "confidnce"}, "Unknown sampler 'confidnce'", "Did you mean 'confidence'"),
        ({"sampler_config": {"name": "threshold", "treshold": 1}}, "setting 'treshold'", "threshold"),
        ({"sampler_config": {"name": "threshold", "threshold": 0}}, "threshold=0", "(0, 1]"),
        ({"sampler_config": {}}, "Unknown sampler None", "Known"),
        ({"max_new_tokens": 0}, "max_new_tokens=0", "at least 1"),
        ({"max_new_tokens": None}, "max_new_tokens=None", "at least 1"),
        ({"max_denoising_steps": 0}, "max_denoising_steps=0", "at least 1"),
        ({"max_denoising_steps": 2.0}, "max_denoising_steps=2.0", "at least 1"),
        ({"block_size": -1}, "block_size=-1", "at least 1"),
        ({"top_k": 0}, "top_k=0", "at least 1"),
        ({"top_p": 1.5}, "top_p=1.5", "(0, 1]"),
        ({"temperature": -0.1}, "temperature=-0.1", ">= 0"),
        ({"temperature": float("nan")}, "temperature=nan", ">= 0"),
        ({"temperature": "hot"}, "temperature='hot'", ">= 0"),
        ({"seed": "x"}, "seed='x'", "integer"),
        ({"eos_token_id": -1}, "eos_token_id=-1", ">= 0"),
        ({"cache": "prefx"}, "Unknown cache 'prefx'", "Did you mean 'prefix'"),
        ({"cache": {"kind": "dual", "refresh_evry": 2}}, "Unknown cache setting 'refresh_evry'", "refresh_every"),
        ({"cache": {"kind": "dual", "refresh_every": 0}}, "refresh_every=0", "at least 1"),
        ({"cache": {"kind": "exact", "refresh_every": 2}}, "'exact' is never refreshed", "refresh_every"),
        ({"cache": {"kind": "prefix", "delay": 2}}, "'prefix' has no delay", "delayed"),
        ({"cache": "exact", "measure_drift": True}, "has no drift", "measure_drift"),
        ({"sampler_config": {"name": "threshold", "threshold": []}}, "threshold=()", "(0, 1]"),
        ({"sampler_config": {"name": "threshold", "threshold": [0.9, 0.8]}}, "do not serve blocks", "at most 2"),
        ({"sampler_config": {"name": "factor", "factor": 0}}, "factor=0", "above 0"),
        ({"sampler_config": {"name": "entropy_bound", "entropy_bound": "x"}}, "entropy_bound='x'", "above 0"),
        ({"t_max": 1.0}, "belong together", "temperature"),
        ({"t_max": 0.5, "t_min": 0.5}, "no falling temperature", "t_max > t_min"),
        ({"t_max": 0.5, "t_min": 0.1, "temperature": 1.0}, "both say how to draw", "one"),
        ({"guidance_scale": -1}, "guidance_scale=-1", ">= 0"),
        ({"stability_threshold": 0}, "stability_threshold=0", "at least 1"),
        ({"stability_threshold": 1, "confidence_threshold": 0}, "confidence_threshold=0", "above 0"),
        ({"confidence_threshold": 0.1}, "no effect without stability_threshold", "stability_threshold"),
        ({"verify": True, "cache": "dual"}, "verify compares with no cache", "measure_drift"),
        ({"multi_block": {"block_ad_threshold": 1}}, "multi_block setting 'block_ad_threshold'", "block_add_threshold"),
        ({"multi_block": {"decoded_token_threshold": 0}}, "decoded_token_threshold=0", "(0, 1]"),
        ({"multi_block": {}}, "'confidence' accepts fixed counts", "threshold"),
        ({"sampler_config": "threshold", "multi_block": True}, "multi_block=True is no pipeline", "MultiBlockConfig"),
        ({"sampler_config": "factor", "multi_block": (0.1, 0.9)}, "multi_block=(0.1, 0.9) is no", "MultiBlockConfig"),
        ({"sampler_config": ["threshold"]}, "Unknown sampler ['threshold']", "Known"),
        ({"sampler_config": {"name": {}}}, "Unknown sampler {}", "Known"),
        ({"measure_drift": 1}, "measure_drift=1 is neither", "truth"),
    ],
)
def test_bad_settings_are_refused_in_two_lines(settings: dict[str, Any], problem: str, remedy: str) -> None:
    with pytest.raises(DllmError) as caught:
        DiffusionGenerationConfig(**settings)
    first, second = str(caught.value).split("\n")
    assert problem in first
    assert remedy in second


def test_fewer_steps_than_blocks_are_refused() -> None:
    config = DiffusionGenerationConfig(max_denoising_steps=3, block_size=8)
    config.require_steps(24)
    with pytest.raises(DllmError, match="too few for 4 blocks of 8"):
        config.require_steps(25)


def test_settings_import_no_torch() -> None:
    code = "import sys, dllm_core.samplers.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_request_maps_onto_the_config() -> None:
    from dllm_core.methods.protocol import SamplingRequest

    request = SamplingRequest(
        max_new_tokens=9, num_steps=3, temperature=0.5, seed=4, stop_at_eos=True, block_size=5, record_history=True
    )
    config = DiffusionGenerationConfig.from_request(request, "entropy")
    assert (config.max_new_tokens, config.max_denoising_steps, config.temperature) == (9, 3, 0.5)
    assert (config.seed, config.stop_at_eos, config.block_size, config.record_history) == (4, True, 5, True)
    assert config.sampler_config.name == "entropy"
