"""`generate` of the reference rows: the same decode as `sample`, seen token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dllm_core.backbone.ar_decode import decode
from dllm_core.backbone.passes import choice
from dllm_core.errors import DllmError
from dllm_core.methods.ar.method import Method
from dllm_core.methods.ar.options import Options
from dllm_core.methods.protocol import SamplingRequest
from dllm_core.samplers.config import DiffusionGenerationConfig
from tests.tiny import NUM_TOKENS, tiny_backbone

PROMPTS = [torch.tensor([5]), torch.tensor([7, 8, 9, 10, 11]), torch.tensor([3, 1, 4])]
CONFIG = DiffusionGenerationConfig(max_new_tokens=9, temperature=1.0, seed=4, stop_at_eos=False, record_history=True)


@pytest.fixture
def method() -> Method:
    return Method(tiny_backbone(), Options(tuned=False))


class Streamer:
    def __init__(self) -> None:
        self.put_: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.put_.append(value[0].tolist())

    def end(self) -> None:
        self.ended = True


def test_generate_is_the_cached_decode(method: Method) -> None:
    request = SamplingRequest(
        max_new_tokens=9, num_steps=0, temperature=1.0, seed=4, sample_ids=(6, 2, 3), record_history=True
    )
    wanted = decode(method.backbone, PROMPTS, request)
    found = method.generate(PROMPTS, CONFIG, sample_ids=[6, 2, 3])
    assert all(torch.equal(a, b) for a, b in zip(found.sequences, wanted.sequences, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found.commit_step, wanted.commit_step, strict=True))
    alone = method.generate(PROMPTS[1][None], replace(CONFIG, stop_at_eos=True), sample_ids=[2])
    assert alone.sequences[0].tolist() == wanted.sequences[1].tolist()[: len(alone.sequences[0])]


def test_every_pass_shows_one_token_more_of_each_row(method: Method) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    output = method.generate(PROMPTS, CONFIG, on_draft=lambda canvas, committed: seen.append((canvas, committed)))
    assert len(seen) == 9
    for i, (canvas_BC, committed_BC) in enumerate(seen):
        for prompt, canvas_C, committed_C, whole in zip(
            PROMPTS, canvas_BC, committed_BC, output.sequences, strict=True
        ):
            stands = len(prompt) + i + 1
            assert committed_C.tolist() == [k < stands for k in range(len(canvas_C))]
            assert canvas_C[:stands].tolist() == whole[:stands].tolist()
            assert bool((canvas_C[stands:] == NUM_TOKENS).all()), "the mask token stands where nothing does yet"


def test_a_streamer_gets_the_prompt_and_then_token_by_token(method: Method) -> None:
    streamer = Streamer()
    output = method.generate([PROMPTS[1]], CONFIG, streamer=streamer)
    assert streamer.put_[0] == PROMPTS[1].tolist()
    assert [len(part) for part in streamer.put_[1:]] == [1] * 9
    assert [i for part in streamer.put_ for i in part] == output.sequences[0].tolist()
    assert streamer.ended
    with pytest.raises(DllmError, match="one sequence, not a batch of 3"):
        method.generate(PROMPTS, CONFIG, streamer=Streamer())


def test_a_text_that_ends_early_is_shown_up_to_its_end(method: Method) -> None:
    free = method.generate([PROMPTS[1]], replace(CONFIG, seed=1))
    method.backbone.config.eos_token_id = int(free.sequences[0][9])
    streamer, seen = Streamer(), []
    config = replace(CONFIG, seed=1, stop_at_eos=True)
    output = method.generate([PROMPTS[1]], config, streamer=streamer, on_draft=lambda *pair: seen.append(pair))
    assert output.new_tokens[0] < 9
    assert [i for part in streamer.put_ for i in part] == output.sequences[0].tolist()
    assert int(seen[-1][1].sum()) == len(output.sequences[0])


def test_texts_of_a_batch_that_have_ended_do_not_grow(method: Method) -> None:
    free = method.generate(PROMPTS, CONFIG)
    method.backbone.config.eos_token_id = [int(free.sequences[0][3]), int(free.sequences[1][9])]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    output = method.generate(PROMPTS, replace(CONFIG, stop_at_eos=True), on_draft=lambda *pair: seen.append(pair))
    assert min(output.new_tokens) < max(output.new_tokens) == len(seen)
    for passes, (canvas_BC, committed_BC) in enumerate(seen, start=1):
        for prompt, canvas_C, committed_C, whole in zip(
            PROMPTS, canvas_BC, committed_BC, output.sequences, strict=True
        ):
            stands = min(len(prompt) + passes, len(whole))
            assert canvas_C[committed_C].tolist() == whole[:stands].tolist()
            assert bool((canvas_C[~committed_C] == NUM_TOKENS).all())


def test_watching_takes_nothing_of_the_speed(method: Method) -> None:
    """A hook on the decoder would send every pass through transformers' modules."""
    obstacles = []
    method.generate(PROMPTS, CONFIG, on_draft=lambda *_: obstacles.append(choice.obstacle(method.backbone)))
    assert obstacles == [None] * 9


@pytest.mark.parametrize("setting", [{"top_k": 3}, {"sampler_config": "p2"}, {"cache": "dual"}, {"verify": True}])
def test_settings_of_diffusion_are_refused(method: Method, setting: dict) -> None:
    with pytest.raises(DllmError, match=f"{next(iter(setting))} is a setting of diffusion"):
        method.generate([PROMPTS[0]], DiffusionGenerationConfig(**setting))
