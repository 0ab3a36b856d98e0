"""Thresholds from commit orders, by hand, and what they do to a decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dllm_core.data.trajectories import TrajectoryStore
from dllm_core.errors import DllmError
from dllm_core.samplers.config import DiffusionGenerationConfig, ThresholdSamplerConfig
from dllm_core.samplers.loop import generate
from dllm_core.samplers.trajectory_thresholds import mean_ranks, stored_thresholds, trajectory_thresholds
from tests.tiny import NUM_TOKENS, tiny_backbone
from tests.unit import sampler_oracle

# two full blocks of three in the first row (one token is left over), one in the second; steps may repeat
ORDERS = torch.tensor([[-1, 4, 0, 2, 9, 9, 7, 30], [-1, -1, 5, 1, 3, -1, -1, -1]])


def test_mean_ranks_by_hand() -> None:
    """Ranks (2, 0, 1), (1, 2, 0) and (2, 0, 1): ties go to the left."""
    assert mean_ranks(ORDERS, 3).tolist() == pytest.approx([5 / 6, 2 / 6, 2 / 6])
    assert mean_ranks(ORDERS, 1).tolist() == [0.0]


def test_thresholds_lie_between_the_limits() -> None:
    assert trajectory_thresholds(ORDERS, 3, 0.4, 1.0) == pytest.approx((0.9, 0.6, 0.6))
    left_to_right = torch.arange(8)[None]
    assert trajectory_thresholds(left_to_right, 4, 0.5, 0.8) == pytest.approx((0.5, 0.6, 0.7, 0.8))


def test_thresholds_of_what_a_run_extracted(tmp_path: Path) -> None:
    """Rows of different length, written as the extraction writes them."""
    rows = [ORDERS[0], ORDERS[1, :6]]
    for n, row in enumerate(rows):
        TrajectoryStore(tmp_path, mode="student", identity="x").write(f"{n}{n}", row, row >= 0)
    assert stored_thresholds(tmp_path, 3, 0.4, 1.0) == trajectory_thresholds(ORDERS, 3, 0.4, 1.0)
    with pytest.raises(DllmError, match="full block of 9"):
        stored_thresholds(tmp_path, 9)


@pytest.mark.parametrize(("size", "limits"), [(8, (0.5, 0.9)), (3, (0.9, 0.5)), (3, (0.0, 0.5)), (3, (0.5, 1.1))])
def test_what_gives_no_thresholds_is_refused(size: int, limits: tuple[float, float]) -> None:
    with pytest.raises(DllmError):
        trajectory_thresholds(ORDERS, size, *limits)


def test_decoding_by_place_equals_the_reference() -> None:
    backbone = tiny_backbone(layers=1)
    rule = ThresholdSamplerConfig(threshold=(0.05, 0.9, 0.1, 0.3, 0.02))
    config = DiffusionGenerationConfig(
        max_new_tokens=13, max_denoising_steps=13, block_size=5, sampler_config=rule, stop_at_eos=False
    )
    assert DiffusionGenerationConfig.from_dict(config.to_dict()) == config
    rows = [torch.randint(1, NUM_TOKENS, (n,), generator=torch.Generator().manual_seed(n)) for n in (4, 7)]
    out = generate(backbone, rows, config)
    for row, prompt in enumerate(rows):
        ids = torch.cat((prompt, prompt.new_zeros(13)))
        tokens, _, passes = sampler_oracle.decode(backbone, ids, torch.arange(len(ids)) < len(prompt), config, row)
        assert out.sequences[row].tolist() == tokens
        assert passes < 13
