"""Counts against known models and transformers; estimates against figures measured on real machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dllm_core.methods.requirements import NetworkCost
from steps.check_model import _KNOWN, _scratch_shape
from steps.estimates import GPU_SIZES_GB, MemoryEstimate, ModelShape, anchor_bytes, network_memory, training_memory
from steps.machine import probe
from tests.plan_tools import TWO_CORES

SMOLLM2 = _KNOWN["embedded:smollm2-135m-instruct"]
QWEN3 = _KNOWN["Qwen/Qwen3-1.7B"]


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # published counts
        (
            {
                "model_type": "llama",
                "hidden_size": 576,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "num_hidden_layers": 30,
                "intermediate_size": 1536,
                "vocab_size": 49152,
                "tie_word_embeddings": True,
            },
            134_515_008,
        ),
        (
            {
                "model_type": "qwen2",
                "hidden_size": 896,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "num_hidden_layers": 24,
                "intermediate_size": 4864,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
            },
            494_032_768,
        ),
        (
            {
                "model_type": "qwen3",
                "hidden_size": 2048,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "num_hidden_layers": 28,
                "intermediate_size": 6144,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
            },
            1_720_574_976,
        ),
        (
            {
                "model_type": "gpt2",
                "n_embd": 768,
                "n_head": 12,
                "n_layer": 12,
                "n_positions": 1024,
                "vocab_size": 50257,
            },
            124_439_808,
        ),
    ],
    ids=["smollm2-135m", "qwen2.5-0.5b", "qwen3-1.7b", "gpt2"],
)
def test_parameters_of_known_models(config: dict[str, Any], parameters: int) -> None:
    assert ModelShape.from_config(config).parameters == parameters


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_equal_those_of_transformers(family: str, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = (
        {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 40}
        if family == "gpt2"
        else {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "intermediate_size": 80,
        }
    )
    if family == "qwen3":
        sizes["head_dim"] = 20
    config = AutoConfig.for_model(family, vocab_size=101, tie_word_embeddings=tied, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = ModelShape.from_config({**config.to_dict(), "tie_word_embeddings": tied}).parameters
    expected = sum(p.numel() for p in model.parameters())
    assert counted == expected


def test_known_sizes() -> None:
    assert SMOLLM2.parameters == 134_515_008
    assert QWEN3.parameters == 1_720_574_976
    assert _KNOWN["Qwen/Qwen3-0.6B"].parameters == 596_049_920


def test_flops_of_a_forward_count_every_multiplication() -> None:
    shape = ModelShape(
        family="llama", layers=1, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=12, vocab=20, positions=64
    )
    length, rows = 5, 3
    naive = 0
    for _ in range(length):
        naive += 2 * 8 * 8 + 2 * 8 * 4 * 2 + 2 * 8 * 8 + 3 * 2 * 8 * 12  # q, k and v, o, feed-forward
        naive += 2 * (2 * 4 * length) * 2  # scores and mixing, two heads
    naive += rows * 2 * 8 * 20
    norms = 2 * 3 * 8 * length  # counted with the weights: two norms of a block, one at the end
    assert shape.forward_flops(length, length, rows) == naive + norms


def test_memory_is_16_bytes_a_parameter_and_grows_with_the_micro_batch() -> None:
    one = training_memory(SMOLLM2, 1, 160, dtype="bf16", checkpointing=False)
    eight = training_memory(SMOLLM2, 8, 160, dtype="bf16", checkpointing=False)
    assert one.weights == 18 * SMOLLM2.parameters
    assert eight.activations == pytest.approx(8 * one.activations)
    full = training_memory(SMOLLM2, 8, 160, dtype="fp32", checkpointing=False)
    assert full.activations == pytest.approx(2 * eight.activations)
    assert training_memory(SMOLLM2, 8, 160, dtype="bf16", checkpointing=True).activations < eight.activations / 4


def test_memory_of_networks_of_a_rooms_own() -> None:
    network = NetworkCost(trainable={"a": 600, "b": 400}, frozen=50, flops_per_response_token=6.0 * 900)
    assert network.num_trainable == 1000
    fp32, bf16 = (network_memory(network, 10, 8, dtype=dtype) for dtype in ("fp32", "bf16"))
    assert (fp32.weights, fp32.per_parameter) == (16 * 1000 + 4 * 50, 16)
    assert (bf16.weights, bf16.per_parameter) == (18 * 1000 + 6 * 50, 18)
    assert fp32.activations == pytest.approx(4 * 8 * 1.75 * 900 / 10)
    imitating = replace(network, snapshot=300)
    for dtype, held, size in (("fp32", fp32, 4), ("bf16", bf16, 2)):
        assert network_memory(imitating, 10, 8, dtype=dtype).weights == held.weights + size * 300
    # the rule of thumb for activations against those of a block that are counted one by one
    block = ModelShape(
        family="gpt2", layers=1, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=256, vocab=0, positions=0
    )
    alike = NetworkCost(trainable={"block": block.body}, frozen=0, flops_per_response_token=6.0 * block.body)
    counted = training_memory(block, 1, 8, dtype="fp32", checkpointing=False).activations
    assert network_memory(alike, 64, 8, dtype="fp32").activations == pytest.approx(counted, rel=0.5)


def test_the_base_of_a_rooms_networks_is_the_converted_model() -> None:
    window = {"positions_per_response_token": 1.5, "length": 96}
    base = SMOLLM2.base(converted=False, **window)
    assert (base.hidden, base.layers, base.vocab) == (576, 30, 49_216)
    assert base.parameters == SMOLLM2.parameters + 64 * 576
    assert (base.positions_per_response_token, base.length, base.response) == (1.5, 96, 64)
    assert base.attention_width == 9 * 64
    assert replace(SMOLLM2, vocab=49_216).base(converted=True, **window) == base


def test_memory_of_a_measured_step() -> None:
    """A fp32 step at 8x64 was measured at 3.4 GB."""
    assert training_memory(SMOLLM2, 8, 64, dtype="fp32", checkpointing=False).total == pytest.approx(3.4e9, rel=0.25)


def test_smallest_gpu() -> None:
    assert training_memory(SMOLLM2, 4, 160, dtype="bf16", checkpointing=False).smallest_gpu_gb() == 8
    assert training_memory(QWEN3, 1, 160, dtype="bf16", checkpointing=True).smallest_gpu_gb() == 48
    for size in GPU_SIZES_GB:
        exact = MemoryEstimate(weights=0.92 * size * 1e9, activations=0, rest=0)
        assert exact.smallest_gpu_gb() == size
        assert (replace(exact, rest=1e6).smallest_gpu_gb() or 10**6) > size
    assert MemoryEstimate(weights=1e12, activations=0, rest=0).smallest_gpu_gb() is None


def test_anchor_bytes_of_a_huge_store() -> None:
    """64 layers of a 27B model (hidden 5120) for 100K sequences of 1,024 tokens: 67 TB."""
    shape = replace(QWEN3, hidden=5120)
    assert anchor_bytes(shape, 100_000, 1024, 64, "bf16") == pytest.approx(67e12, rel=0.01)
    assert anchor_bytes(shape, 1, 1, 1, "fp32") == 4 * 5120
    assert anchor_bytes(shape, 1, 1, 1, "int8") == 5120 + 4


def test_rates_give_the_measured_times_within_a_factor_of_two() -> None:
    positions = 8 * 64
    step = 3 * SMOLLM2.forward_flops(positions, 64, positions)
    assert TWO_CORES.seconds(step, 1, "bf16") == pytest.approx(1.8, rel=0.6)
    assert TWO_CORES.seconds(step, 1, "fp32") == pytest.approx(3.1, rel=0.6)
    forward = SMOLLM2.forward_flops(134, 134, 134)
    assert TWO_CORES.seconds(forward, 1, "bf16") == pytest.approx(0.179, rel=0.6)


def test_auto_dtype() -> None:
    assert TWO_CORES.dtype("auto") == "bf16"
    assert replace(TWO_CORES, native_bf16=False).dtype("auto") == "fp32"
    assert replace(TWO_CORES, native_bf16=False).dtype("bf16") == "bf16"


def test_probe_of_this_machine() -> None:
    machine = probe("cpu")
    assert machine.device == "cpu"
    assert machine.cores >= 1
    assert 0 < machine.memory_free <= machine.memory_total
    assert machine.flops_bf16 > 0
    assert probe("cpu", threads=1).flops_fp32 == pytest.approx(machine.flops_fp32 / machine.cores)


def test_a_gpu_that_is_not_there_is_reckoned_with_but_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steps.machine._gpu", lambda: None)
    machine = probe("cuda")
    assert (machine.device, machine.visible) == ("cuda", False)
    assert "no GPU is visible" in machine.name
    assert probe("auto").device == "cpu"


def test_a_gpu_is_taken_when_torch_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steps.machine._gpu", lambda: ("NVIDIA H200", 150e9, 149e9, 9.0))
    monkeypatch.setattr("steps.machine._torch_has_cuda", lambda: False)
    assert probe("auto").device == "cpu"
    assert probe("cuda").visible
    monkeypatch.setattr("steps.machine._torch_has_cuda", lambda: True)
    machine = probe("auto")
    assert (machine.device, machine.name, machine.memory_free) == ("cuda", "NVIDIA H200", 149e9)
    assert probe("cpu").device == "cpu"
    assert machine.dtype("auto") == "bf16"
    monkeypatch.setattr("steps.machine._gpu", lambda: ("Tesla V100", 16e9, 15e9, 7.0))
    assert probe("auto").dtype("auto") == "fp32"


def test_scratch_shapes_count_what_is_built() -> None:
    import params

    scratch = params.load("test").model.scratch
    assert scratch is not None
    shape = _scratch_shape(scratch)
    d, kv = 64, 32
    block = d * (d + 2 * kv) + d * d + 3 * d * 128 + 2 * d
    assert shape.parameters == 2 * block + d + 512 * d
