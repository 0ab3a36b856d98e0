"""Two modes: what one pass can and cannot do. The responses are one token all along or another, equally often.

The first phase alone tends to a product of marginals at t = 1: drawn in one pass, four tokens agree as four coins do,
2 (1/2)^4 = 1/8 of the time. Its K-step sampler makes whole modes of the same noise, and the second phase teaches them
to one pass. Thresholds are far from what chance gives and from what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dllm_core import DiffusionGenerationConfig
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.order import SampleOrder
from dllm_core.methods.protocol import Resources
from dllm_core.methods.vfm.method import Method
from dllm_core.training.loop import Trainer
from dllm_core.training.settings import TrainSettings
from tests.vfm_tools import tiny_vfm, two_modes

LENGTH, MODES, SAMPLES = 4, (10, 20), 256
FLOW_STEPS, PAIRED_STEPS = 180, 110


def texts(method: Method, passes: int, *, temperature: float = 1.0, **more) -> torch.Tensor:
    config = DiffusionGenerationConfig(
        max_new_tokens=LENGTH, max_denoising_steps=passes, temperature=temperature, stop_at_eos=False
    )
    out = method.generate([torch.tensor([1])] * SAMPLES, config, **more)
    return torch.stack(out.sequences)[:, 1:]


def whole_modes(method: Method, passes: int, **more) -> list[float]:
    """Return how often each mode comes out whole."""
    found = texts(method, passes, **more)
    return [float((found == mode).all(1).double().mean()) for mode in MODES]


@dataclass
class Trained:
    """Samples after the first phase, and the method after the second."""

    first: dict[int, list[float]]
    method: Method
    rows: list[dict]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.manual_seed(0)
    data, steps = two_modes(64, LENGTH), FLOW_STEPS + PAIRED_STEPS
    workdir: Path = tmp_path_factory.mktemp("modes")
    rows: list[dict] = []

    def trainer(method: Method) -> Trainer:
        settings = TrainSettings(
            steps=steps, batch_size=32, lr=4e-3, min_lr_ratio=0.3, weight_decay=0.0, checkpoint_every_s=None
        )
        return Trainer(
            method,
            data,
            SampleOrder(64, 0),
            settings,
            Resources(),
            NoiseSource(0),
            workdir,
            rows.append,
            peak_flops=1e9,
        )

    options = {
        "backbone": {"layers": 2, "seed": 1},
        "seed": 1,
        "move": 0.0,
        "adapter_fraction": 0.0,
        "paired_share": PAIRED_STEPS / steps,
        "paired_fraction": 0.8,
        "rollout_steps": 8,
        "time_at_one": 0.05,
    }
    before = tiny_vfm(**options)
    trainer(before).run(stop_at=FLOW_STEPS)
    first = {passes: whole_modes(before, passes, source="normal") for passes in (1, 8)}
    method = tiny_vfm(**options)
    trainer(method).run()  # from the checkpoint at the end of the first phase
    return Trained(first, method, rows)


def test_the_first_phase_alone_mixes_the_modes_in_one_pass(trained):
    assert [row["phase"] for row in trained.rows] == ["flow"] * FLOW_STEPS + ["paired"] * PAIRED_STEPS
    assert sum(trained.first[1]) < 0.35  # coins give 0.125
    assert sum(trained.first[8]) > 0.75
    assert min(trained.first[8]) > 0.1


def test_the_second_phase_makes_whole_modes_in_one_pass(trained):
    once = whole_modes(trained.method, 1, source="normal")
    assert sum(once) > 0.55
    assert sum(once) > sum(trained.first[1]) + 0.3
    assert min(once) > 0.1  # and no mode was dropped
    assert sum(whole_modes(trained.method, 4, source="normal")) > 0.75  # several passes stay in shape


def test_the_noise_says_which_mode_it_is(trained):
    """The same noise, the same text; one pass agrees with the sampler that it was taught; other noise, other text."""
    method = trained.method
    greedy = {"temperature": 0.0, "source": "normal"}
    one, again = texts(method, 1, **greedy), texts(method, 1, **greedy)
    assert torch.equal(one, again)
    eight = texts(method, 8, **greedy)
    assert float((one == eight).double().mean()) > 0.8
    shuffled = texts(method, 1, sample_ids=[SAMPLES - 1 - i for i in range(SAMPLES)], **greedy)
    assert torch.equal(shuffled, one.flip(0))
    changed = float((shuffled != one).any(1).double().mean())
    assert changed > 0.25
