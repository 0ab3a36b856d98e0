"""Sizes and costs of VFM: counted modules, counted operations, and what its options refuse."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from dllm_core.backbone import attention as backbone_attention
from dllm_core.errors import DllmError
from dllm_core.layers import attention as layers_attention
from dllm_core.methods.protocol import Resources
from dllm_core.methods.requirements import BaseShape
from dllm_core.methods.vfm.adapter import Adapter
from dllm_core.methods.vfm.flow_map import FlowMap
from dllm_core.methods.vfm.options import Options
from dllm_core.methods.vfm.shapes import SHAPES, AdapterShape, adapter_parameters, time_parameters
from tests.ldlm_tools import random_anchors
from tests.method_tools import corrupt
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS
from tests.vfm_tools import coins, phase_info, tiny_vfm

QWEN = BaseShape(hidden=2048, layers=28, vocab=151_936, parameters=1_720_574_976)
SMOL = BaseShape(hidden=576, layers=30, vocab=49_216, parameters=134_500_000)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("spread", [True, False])
def test_parameters_are_those_of_the_modules(name, spread):
    for hidden in (64, 576, 2048):
        with torch.device("meta"):
            adapter, flow = Adapter(hidden, hidden, SHAPES[name], spread=spread), FlowMap(hidden)
        found = sum(p.numel() for p in adapter.parameters())
        assert adapter_parameters(SHAPES[name], hidden, spread=spread) == found
        assert time_parameters(hidden) == sum(p.numel() for p in flow.parameters())


def test_the_adapter_grows_with_the_base_model():
    on_qwen = Options(shape="qwen3_1_7b").network(QWEN).trainable
    assert on_qwen["adapter"] == 113_281_536
    assert on_qwen["base model"] == QWEN.parameters
    on_smol = Options(shape="laptop").network(SMOL).trainable["adapter"]
    assert 0.05 < on_smol / SMOL.parameters < 0.1
    assert Options(shape="smoke").network(SMOL).trainable["adapter"] < 0.3e6
    frozen = Options(freeze_base=True).network(SMOL)
    assert list(frozen.trainable) == ["adapter"]
    assert frozen.frozen == SMOL.parameters
    for paired_share in (0.0, 0.3):
        options = Options(paired_share=paired_share)
        assert options.network(SMOL).frozen == 0
        assert options.network(SMOL).snapshot == (SMOL.parameters if paired_share else 0)  # the sampler to imitate
        reading = options.model_copy(update={"prompt_encoder": "states"}).network(SMOL)
        assert reading.frozen == SMOL.parameters  # the language model that reads prompts


@pytest.fixture
def products(monkeypatch):
    """Attention by the products that torch's counter knows."""
    for module in (layers_attention, backbone_attention):
        monkeypatch.setattr(module, "is_plain", lambda *_: True)


def _counted(method, corrupted, info, resources=None) -> tuple[float, float]:
    """Return (operations that torch counts, operations that the room reports)."""
    totals = method.totals(corrupted)
    with FlopCounterMode(display=False) as counter:
        out = method.loss(corrupted, totals, info, resources or Resources())
        out.loss.backward()
    return float(counter.get_total_flops()), out.flops


def _case(**options):
    """Return a method wide enough that products dominate, its draws with every coin up, and its expected base."""
    backbone = {"hidden": 128, "layers": 4, "max_length": 64}
    shape = AdapterShape(width=96, depth=1, head_width=32)
    options = {"shape": shape, "adapter_fraction": 1.0, "observe_fraction": 1.0, **options}
    method = tiny_vfm(backbone=backbone, **options)
    data = random_sequences(4, 40, 8, NUM_TOKENS)
    base = BaseShape(
        hidden=128,
        layers=4,
        vocab=128,
        parameters=method.backbone.num_parameters(),
        positions_per_response_token=40 / 32,
        length=40,
    )
    return method, data, base


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("phase", ["flow", "paired"])
@pytest.mark.parametrize("prompt", ["visible", "hidden"])
def test_training_operations_are_those_that_torch_counts(phase, prompt):
    paired = phase == "paired"
    method, data, base = _case(prompt=prompt, paired_share=0.5 if paired else 0.0, paired_fraction=1.0, rollout_steps=5)
    corrupted, _ = corrupt(method, data.batch_of(range(4)), phase_info(phase))
    counted, reported = _counted(method, corrupted, phase_info(phase))
    assert reported == pytest.approx(counted, rel=0.03)
    planned = method.options.training_flops(base)
    if paired:  # the plan averages over both phases
        planned += 0.5 * method.options.rollout_flops(base)
    assert planned * 4 * 32 == pytest.approx(reported, rel=0.03)


@pytest.mark.usefixtures("products")
def test_a_rollout_costs_its_passes():
    method, data, base = _case(rollout_steps=16, adapter_fraction=0.0)
    corrupted, _ = corrupt(method, data.batch_of(range(4)), phase_info("paired", batch_size=4))
    every = coins(corrupted, paired_B=[True] * 4)
    none = coins(corrupted, paired_B=[False] * 4)
    (with_it, said), (without, said_without) = (_counted(method, c, phase_info("paired")) for c in (every, none))
    assert method.options.rollout_flops(base) * 4 * 32 == pytest.approx(with_it - without, rel=0.05)
    assert said - said_without == pytest.approx(with_it - without, rel=0.12)
    # 16 passes without a backward pass are 16 / 3 of a training step, and a vocabulary product more in 15 of them
    assert (with_it - without) / without > 16 / 3


@pytest.mark.usefixtures("products")
def test_a_frozen_base_costs_less():
    method, data, base = _case(freeze_base=True)
    corrupted, _ = corrupt(method, data.batch_of(range(4)), phase_info("adapter"))
    counted, reported = _counted(method, corrupted, phase_info("adapter"), random_anchors(data, method.layer, 128))
    assert reported == pytest.approx(counted, rel=0.12)
    assert method.options.training_flops(base) * 4 * 32 == pytest.approx(counted, rel=0.2)  # half is masked on average


def test_the_factor_rises_with_what_is_paid_for():
    factors = [
        Options(paired_share=0.0, observe_fraction=0.0).cost_factor(),
        Options(paired_share=0.0).cost_factor(),
        Options().cost_factor(),
        Options(rollout_steps=32).cost_factor(),
        Options(rollout_steps=32, paired_fraction=1.0).cost_factor(),
    ]
    assert factors == sorted(factors)
    assert len(set(factors)) == 5
    assert Options(freeze_base=True).cost_factor() < 1
    bare = Options(paired_share=0.0, observe_fraction=0.0, adapter_fraction=0.0)
    base = Options().training_flops(SMOL) / bare.training_flops(SMOL)
    assert Options().cost_factor() == pytest.approx(base, rel=0.2)


# -- what is asked for, and refused ---------------------------------------------------------------------------------


def test_anchors_are_asked_for_where_states_are_read():
    assert Options().requirements(30).anchors is None
    need = Options(prompt_encoder="states", anchor_sequences=64).requirements(30).anchors
    assert (need.layers, need.positions, need.heldout, need.sequences) == (("28",), "all", True, 64)
    assert Options(freeze_base=True).requirements(30).anchors.layers == ("28",)
    assert Options(freeze_base=True, prompt_encoder="embedding").requirements(30).anchors is None


def test_bad_options_are_refused():
    with pytest.raises(DllmError, match="does not exist in a model of 4 blocks"):
        Options(prompt_encoder="states", layer=-6).requirements(4)
    with pytest.raises(DllmError, match="width 33"):
        AdapterShape(width=33).heads_on(64)
    for wrong in (
        {"tau": 0.0},
        {"gate": 0.0},
        {"paired_share": 1.0},
        {"rollout_steps": 1},
        {"adapter_fraction": 1.5},
        {"prompt": "invisible"},
        {"alpha": 0.5},
        {"shape": {"width": 0}},
    ):
        with pytest.raises(ValidationError):
            Options(**wrong)
