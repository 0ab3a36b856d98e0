"""The estimate of a training pass against what autograd keeps for it, in bytes, room by room."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.data.batch import Batch
from dllm_core.methods.block_causal.options import Options as BlockCausalOptions
from dllm_core.methods.protocol import LossOutput, Method, Resources, StepInfo
from dllm_core.methods.random_mask.method import Method as RandomMask
from dllm_core.methods.random_mask.options import Options as RandomMaskOptions
from dllm_core.methods.requirements import RoomOptions
from dllm_core.methods.trajectory.method import TRAJECTORY
from dllm_core.methods.trajectory.method import Method as Trajectory
from dllm_core.methods.trajectory.options import Options as TrajectoryOptions
from steps.estimates import ModelShape, training_memory
from tests.block_causal_tools import block_causal
from tests.method_tools import DictTrajectories, corrupt, step_info
from tests.plan_tools import plan
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone

BATCH = 4
ROOMS: dict[str, tuple[Callable[[str], Method], StepInfo]] = {
    "random_mask": (lambda family: RandomMask(_backbone(family), RandomMaskOptions()), step_info()),
    "block_causal": (lambda family: block_causal(_backbone(family), block_size=8), step_info()),
    "complementary": (lambda family: block_causal(_backbone(family), block_size=8, complementary=True), step_info()),
    "trajectory": (
        lambda family: Trajectory(
            _backbone(family), TrajectoryOptions(block_sizes=(16,), random_mask_fraction=0.0, weight=0.0)
        ),
        step_info(TRAJECTORY, step=5),
    ),
}


def _backbone(family: str) -> Backbone:
    return tiny_backbone(family, layers=4, hidden=64)


def _resources(batch: Batch) -> Resources:
    """Return commit orders from left to right."""
    order_L = torch.arange(batch.length)
    steps = order_L.masked_fill(~batch.response_BL, -1)
    return Resources(trajectories=DictTrajectories(dict(zip(batch.sequence_keys, steps, strict=True))))


def _kept(method: Method, batch: Batch, info: StepInfo) -> tuple[float, LossOutput]:
    """Return the bytes that one loss keeps for its backward pass, parameters and buffers left out."""
    weights = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    corrupted, totals = corrupt(method, batch, info)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = method.loss(corrupted, totals, info, _resources(batch))
    return float(sum(storage.nbytes() for storage in kept.values())), out


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("room", ROOMS)
def test_activations_are_those_that_autograd_keeps(room: str, family: str) -> None:
    make, info = ROOMS[room]
    prompt, response = 8, 32
    method = make(family)
    batch = random_sequences(BATCH, prompt + response, prompt, NUM_TOKENS).batch_of(range(BATCH))
    kept, out = _kept(method, batch, info)
    positions = method.options.training_positions(prompt, response)
    assert out.positions == BATCH * positions
    shape = ModelShape.from_config(_backbone(family).config.to_dict())
    estimate = training_memory(shape, BATCH, positions, dtype="fp32", checkpointing=False)
    assert estimate.activations == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("size", [1, 4, 7, 32, 64])
def test_positions_of_the_block_layout_for_every_window(size: int, complementary: bool) -> None:
    options = BlockCausalOptions(block_size=size, complementary=complementary)
    method = block_causal(tiny_backbone(), **options.model_dump())
    for length in range(2, 41, 3):
        for prompt in range(1, length, 4):
            batch = random_sequences(1, length, prompt, NUM_TOKENS).batch_of([0])
            width = method.layout(batch, 2 if complementary else 1).width
            assert options.training_positions(prompt, length - prompt) == width, (length, prompt)


def test_a_room_of_one_pass_takes_the_sequence_itself() -> None:
    assert RoomOptions().training_positions(32, 128) == 160


def test_the_plan_counts_longer_passes() -> None:
    """Windows of 32 + 128 tokens: 128 clean and 128 noisy columns; two views of 160."""
    memories = plan("laptop", cells="random_mask,block_causal,repr_align_trajectory").cost.memories
    one = memories["random_mask"].activations
    assert memories["block_causal"].activations == pytest.approx(one * 256 / 160)
    assert memories["repr_align_trajectory"].activations == pytest.approx(one * 2)
    small = plan("test", cells="random_mask,block_causal", overrides="cells.block_causal.options.block_size=8")
    # 8 + 16 tokens in blocks of 8: the prompt's block and the next are clean, the response's two are noisy
    ratio = small.cost.memories["block_causal"].activations / small.cost.memories["random_mask"].activations
    assert ratio == pytest.approx(32 / 24)
