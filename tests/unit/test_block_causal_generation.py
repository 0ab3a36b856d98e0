"""Decoding a block-causal model: what training saw, cached or not, one row or many, wherever the prompt ends."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.errors import DllmError
from dllm_core.methods.block_causal.method import Method
from dllm_core.methods.protocol import SamplingRequest
from dllm_core.methods.random_mask.method import Method as RandomMask
from dllm_core.methods.random_mask.options import Options as RandomMaskOptions
from dllm_core.samplers.config import SAMPLERS
from tests.block_causal_tools import block_causal, block_log_probs
from tests.generation_tools import assert_same, easy, prompts, settings_of, watch_passes
from tests.tiny import NUM_TOKENS, tiny_backbone

SIZE, NEW = 4, 11


settings = settings_of(max_new_tokens=NEW, max_denoising_steps=7)


@torch.no_grad()
def plain_decode(method: Method, prompt: list[int], new: int, per_pass: int) -> list[int]:
    """Return the sequence of a decoder that, block by block, places the `per_pass` most confident tokens of a pass."""
    ids, size, mask = [*prompt], method.options.block_size, method.backbone.contract.mask_token_id
    ids += [mask] * new
    for start in range(len(prompt) // size * size, len(ids), size):
        block = range(start, min(start + size, len(ids)))
        open_ = [i for i in block if i >= len(prompt)]
        while open_:
            log_p = block_log_probs(method.backbone, ids[:start], ids[block.start : block.stop], size)
            best = {i: log_p[i - start].max(0) for i in open_}
            for i in sorted(open_, key=lambda i: (-float(best[i].values), i))[:per_pass]:
                ids[i] = int(best[i].indices)
                open_.remove(i)
    return ids


@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
@pytest.mark.parametrize("cache", ["none", "exact"])
def test_equals_one_forward_per_pass_on_prefix_and_block(family: str, cache: str, alignment: str) -> None:
    method = block_causal(tiny_backbone(family, alignment=alignment))
    for length in range(1, 10):
        (prompt,) = prompts(length, seed=length)
        out = method.generate([prompt], settings(cache=cache, max_denoising_steps=NEW))
        assert out.sequences[0].tolist() == plain_decode(method, prompt.tolist(), NEW, 1)
        assert out.num_forwards == NEW


@pytest.mark.parametrize("cache", ["none", "exact"])
@pytest.mark.parametrize("length", range(1, 10))
def test_decoding_computes_what_training_computes(cache: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state that decoding predicts from, block edges included, against [clean | noisy] of the finished text."""
    from dllm_core.samplers import loop

    method = block_causal(tiny_backbone("qwen3", layers=3))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    propose = loop.propose

    def spying(backbone: Any, hidden_MD: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[-1] += (hidden_MD.clone(),)  # type: ignore[assignment]
        return propose(backbone, hidden_MD, *args, **kwargs)

    class Decoding(loop.Decoding):
        def _denoise(self, candidate_BC: Tensor, step: Any) -> Any:
            seen.append((self.canvas_BC.clone(), candidate_BC.clone()))  # type: ignore[arg-type]
            return super()._denoise(candidate_BC, step)

    monkeypatch.setattr(loop, "propose", spying)
    monkeypatch.setattr(loop, "Decoding", Decoding)
    out = method.generate(prompts(length), settings(cache=cache))
    final_1L = out.sequences[0][None]
    place_1L = torch.arange(final_1L.shape[1])[None]
    response_1L = place_1L >= length
    batch = Batch(final_1L, response_1L, torch.zeros_like(place_1L), place_1L, (0,), (0,), ("k",))
    assert len(seen) == out.num_forwards == 7
    for canvas_1L, candidate_1L, hidden_MD in seen:
        with torch.inference_mode():
            wanted_MD = method.run(batch, canvas_1L)[0, candidate_1L[0].nonzero()[:, 0] - 1]
            assert float((hidden_MD - wanted_MD).abs().max()) < 1e-5
            found_MV, wanted_MV = (method.backbone.logits(s_MD)[:, :NUM_TOKENS] for s_MD in (hidden_MD, wanted_MD))
        assert float((found_MV - wanted_MV).abs().max()) < 1e-5


@pytest.mark.parametrize("rule", SAMPLERS)
def test_cached_equals_uncached_token_for_token(family: str, rule: str) -> None:
    chooser = random.Random(f"{family} {rule}")
    for trial in range(4):
        method = block_causal(tiny_backbone(family, seed=trial), block_size=chooser.choice([1, 2, 3, 5, 8]))
        rows = prompts(*(chooser.randint(1, 14) for _ in range(chooser.randint(1, 4))), seed=trial)
        new = chooser.randint(1, 17)
        config = {
            "max_new_tokens": new,
            "max_denoising_steps": chooser.randint(new, 20),
            "sampler_config": easy(rule),
            "temperature": chooser.choice([0.0, 1.0]),
            "block_size": chooser.choice([None, 2, 64]),
            "stop_at_eos": chooser.random() < 0.5,
            "eos_token_id": [3, 4, 5, 6, 7, 8],
        }
        cached = method.generate(rows, settings(cache="exact", **config))
        assert_same(cached, method.generate(rows, settings(**config)))
        assert max(int(s.max()) for s in cached.sequences) < NUM_TOKENS
        for row, prompt in enumerate(rows):
            alone = method.generate([prompt], settings(cache="exact", **config), sample_ids=[row])
            assert torch.equal(alone.sequences[0], cached.sequences[row])


@pytest.mark.parametrize("cache", ["none", "exact"])
def test_a_prompt_gets_the_same_blocks_wherever_it_ends(cache: str) -> None:
    """Feeding back the tokens of the first passes as prompt goes on as before: states depend on the text alone."""
    method = block_causal(tiny_backbone())
    (prompt,) = prompts(3)
    config = settings(cache=cache, max_denoising_steps=NEW)
    whole = method.generate([prompt], config).sequences[0]
    for block_end in (4, 8, 12):
        rest = settings(cache=cache, max_new_tokens=14 - block_end, max_denoising_steps=14 - block_end)
        assert torch.equal(method.generate([whole[:block_end]], rest).sequences[0], whole)


def test_infilling_sees_its_block_and_nothing_behind_it() -> None:
    method = block_causal(tiny_backbone())
    (row,) = prompts(12)
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[2, 5, 6]] = True
    for cache in ("none", "exact"):
        config = settings(cache=cache)
        out = method.generate([row], config, infill_mask=[mask]).sequences[0]
        assert torch.equal(out[~mask], row[~mask])
        behind = row.clone()
        behind[8:] = (behind[8:] + 1) % NUM_TOKENS
        assert torch.equal(method.generate([behind], config, infill_mask=[mask]).sequences[0][:8], out[:8])
        moved = [
            not torch.equal(method.generate([changed], config, infill_mask=[mask]).sequences[0][mask], out[mask])
            for i in (7,)
            for token in range(1, 40)
            for changed in [torch.cat((row[:i], torch.tensor([token]), row[i + 1 :]))]
        ]
        assert any(moved), "what stands behind a mask in its block does count"


def test_sampling_keeps_the_cache_and_gives_every_block_a_pass() -> None:
    method = block_causal(tiny_backbone())
    rows = prompts(6, 9)
    with watch_passes(method.backbone) as passes:
        out = method.sample(rows, SamplingRequest(max_new_tokens=NEW, num_steps=2))
    assert out.new_tokens == [NEW, NEW]
    assert out.num_forwards == 4  # places 6..16 and 9..19 stand in four and in three blocks
    assert max(passes.tokens[1:]) <= 2 * SIZE
    config = settings(max_denoising_steps=4)
    for row, (prompt, sequence) in enumerate(zip(rows, out.sequences, strict=True)):
        assert torch.equal(sequence, method.generate([prompt], config, sample_ids=[row]).sequences[0])
    more = method.sample(rows, SamplingRequest(max_new_tokens=NEW, num_steps=9, block_size=2))
    assert more.num_forwards == 9


def test_a_mask_token_in_the_prompt_is_data() -> None:
    method = block_causal(tiny_backbone())
    mask = method.backbone.contract.mask_token_id
    row = torch.tensor([5, mask, 7, mask, 9, mask])
    for cache in ("none", "exact"):
        out = method.generate([row], settings(cache=cache)).sequences[0]
        assert out[:6].tolist() == row.tolist()
        assert int(out[6:].max()) < NUM_TOKENS


def test_caches_of_the_wrong_kind_are_refused() -> None:
    bidirectional = RandomMask(tiny_backbone(), RandomMaskOptions())
    with pytest.raises(DllmError, match=r"exact.*block-causal"):
        bidirectional.generate(prompts(3), settings(cache="exact"))
    with pytest.raises(DllmError, match="Give cache='exact'"):
        block_causal(tiny_backbone()).generate(prompts(3), settings(cache="dual"))
    with pytest.raises(DllmError, match="at least 4 steps"):
        block_causal(tiny_backbone()).generate(prompts(6), settings(max_denoising_steps=3))


def test_streamed_is_returned() -> None:
    method = block_causal(tiny_backbone())

    class Kept:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value[0].tolist()

        def end(self) -> None:
            self.ended = True

    for cache in ("none", "exact"):
        kept = Kept()
        out = method.generate(prompts(6), settings(cache=cache), streamer=kept)
        assert (kept.tokens, kept.ended) == (out.sequences[0].tolist(), True)
