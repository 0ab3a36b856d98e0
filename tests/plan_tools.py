"""A fixed machine, model directories that hold a config and no weights, and the two lines of an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import params
from dllm_core.errors import DllmError
from params import ParamsError
from steps.machine import Machine
from steps.plan import Plan, validate

TWO_CORES = Machine(
    device="cpu",
    name="two cores",
    cores=2,
    native_bf16=True,
    memory_total=24e9,
    memory_free=20e9,
    flops_bf16=180e9,
    flops_fp32=100e9,
    bytes_per_s=9e9,
    overhead_s=0.015,
)

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}


def plan(preset: str = "test", **arguments: Any) -> Plan:
    """Return the plan of a preset on a fixed machine."""
    extra = {key: arguments.pop(key) for key in ("dry_run", "runs_dir") if key in arguments}
    machine = arguments.pop("machine", TWO_CORES)
    return validate(params.load(preset, **arguments), machine=machine, **extra)


def refused(call: Callable[[], object]) -> list[str]:
    """Return the two lines of the error."""
    with pytest.raises((DllmError, ParamsError)) as caught:
        call()
    lines = str(caught.value).split("\n")
    assert lines == [caught.value.problem, caught.value.remedy]
    return lines


def model_dir(path: Path, config: dict[str, Any] | str = LLAMA, weights: bool = True) -> Path:
    """Write a model directory with a config and something that looks like a tokenizer and weights."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    if weights:
        (path / "model.safetensors").write_bytes(b"")
    return path
