"""What is measured and generated is drawn from other streams than what is trained on, in every room.

A prompt of the evaluation may have the seed and the number of a training sequence: with a stream in common it would be
decoded from noise that the network was trained on.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dllm_core.corruption.noise import NoiseSource
from dllm_core.evals.masked_accuracy import masked_accuracy
from dllm_core.evals.nelbo import block_nelbo, nelbo, nelbo_by_rate
from dllm_core.methods.ar.method import Method as Ar
from dllm_core.methods.ar.options import Options as ArOptions
from dllm_core.methods.protocol import Method, SamplingRequest
from dllm_core.methods.random_mask.method import Method as RandomMask
from dllm_core.methods.random_mask.options import Options as RandomMaskOptions
from dllm_core.methods.repr_align.method import Method as ReprAlign
from dllm_core.methods.repr_align.options import Options as ReprAlignOptions
from dllm_core.methods.trajectory.method import Method as Trajectory
from dllm_core.methods.trajectory.options import Options as TrajectoryOptions
from tests.block_causal_tools import block_causal
from tests.cola_tools import tiny_cola
from tests.ldlm_tools import tiny_ldlm
from tests.method_tools import step_info
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone
from tests.vfm_tools import tiny_vfm

SEED, ROWS, LENGTH, PROMPT = 0, 4, 12, 3
ROOMS: dict[str, Callable[[], Method]] = {
    "ar": lambda: Ar(tiny_backbone(), ArOptions(tuned=True)),
    "random_mask": lambda: RandomMask(tiny_backbone(), RandomMaskOptions()),
    "repr_align": lambda: ReprAlign(tiny_backbone(), ReprAlignOptions(token_fraction=0.5)),
    "trajectory": lambda: Trajectory(tiny_backbone(), TrajectoryOptions(token_fraction=0.5, block_sizes=(4,))),
    "block_causal": lambda: block_causal(tiny_backbone()),
    "ldlm": tiny_ldlm,
    "vfm": tiny_vfm,
    "vfm, frozen base": lambda: tiny_vfm(freeze_base=True, prompt_encoder="embedding"),
    "cola": tiny_cola,
}


def test_every_room_is_here():
    root = Path(__file__).parents[2] / "dllm_core" / "methods"
    rooms = {path.parent.name for path in root.glob("*/method.py")}
    assert rooms == {name.split(",")[0] for name in ROOMS}


@pytest.mark.parametrize("name", ROOMS)
def test_no_room_is_measured_on_noise_that_it_was_trained_on(name, monkeypatch):
    method = ROOMS[name]()
    drawn: set[tuple[int, int, str]] = set()
    generator = NoiseSource.generator

    def noted(self: NoiseSource, sample_id: int, epoch: int, stream: str) -> torch.Generator:
        drawn.add((sample_id, epoch, stream))
        return generator(self, sample_id, epoch, stream)

    monkeypatch.setattr(NoiseSource, "generator", noted)
    batch, noise = random_sequences(ROWS, LENGTH, PROMPT, NUM_TOKENS).batch_of(range(ROWS)), NoiseSource(SEED)
    for phase in method.phases():
        method.corrupt(batch, step_info(phase.name, step=1, batch_size=ROWS), noise)
    trained = set(drawn)
    assert bool(trained) == (name != "ar")

    drawn.clear()
    method.eval()
    request = SamplingRequest(
        max_new_tokens=LENGTH - PROMPT, num_steps=3, temperature=1.0, seed=SEED, sample_ids=tuple(range(ROWS))
    )
    method.sample(list(batch.input_ids_BL[:, :PROMPT]), request)
    generated = set(drawn)
    assert {sample for sample, _, _ in generated} == set(range(ROWS))
    if method.capabilities.nelbo:
        nelbo(method, batch, samples=2, noise=noise)
        nelbo_by_rate(method, batch, samples=2, noise=noise)
        block_nelbo(method, batch, samples=2, block_size=4, noise=noise)
        masked_accuracy(method, batch, ratios=[0.5], noise=noise)
        assert drawn > generated
    assert not trained & drawn
