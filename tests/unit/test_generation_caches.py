"""Keys and values kept between passes: against a float64 decoder with a plain growing cache, and against no cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.errors import DllmError
from dllm_core.samplers.config import SAMPLERS, CacheConfig
from dllm_core.samplers.loop import generate
from tests.generation_tools import assert_same, easy, prompts, settings_of, watch_passes
from tests.tiny import NUM_TOKENS, tiny_backbone
from tests.unit import sampler_oracle

CACHES = [
    {"kind": "prefix"},
    {"kind": "prefix", "refresh_every": 2},
    {"kind": "dual"},
    {"kind": "dual", "refresh_every": 3},
    {"kind": "delayed"},
    {"kind": "delayed", "delay": 2, "refresh_every": 4},
]
NAMES = [" ".join(map(str, c.values())) for c in CACHES]


settings = settings_of(max_new_tokens=13, max_denoising_steps=8)


# -- approximate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
@pytest.mark.parametrize("cache", CACHES, ids=NAMES)
def test_equals_the_float64_decoder_with_the_same_cache(family: str, cache: dict[str, Any], alignment: str) -> None:
    """Rows of different length enter blocks at the same pass but stand at different positions."""
    backbone = tiny_backbone(family, alignment=alignment)
    rows = prompts(4, 7)
    config = settings(cache=cache, block_size=5)
    out = generate(backbone, rows, config)
    for row, prompt in enumerate(rows):
        ids = torch.cat((prompt, prompt.new_zeros(13)))
        tokens, commits, _ = sampler_oracle.decode(backbone, ids, torch.arange(len(ids)) < len(prompt), config, row)
        assert out.sequences[row].tolist() == tokens
        assert out.commit_step is not None
        assert out.commit_step[row].tolist() == commits


@pytest.mark.parametrize("cache", CACHES, ids=NAMES)
@pytest.mark.parametrize("rule", SAMPLERS)
def test_rows_that_are_at_different_passes_of_their_blocks(rule: str, cache: dict[str, Any]) -> None:
    """Infilling: rows have different numbers of places, so one begins a block while another is inside one."""
    backbone = tiny_backbone()
    rows, masks = prompts(20, 15, 17), []
    for row, share in zip(rows, (2, 3, 4), strict=True):
        masks.append(torch.arange(len(row)) % share == 1)
    config = settings(cache=cache, block_size=3, sampler_config=easy(rule))
    together = generate(backbone, rows, config, infill_mask=masks)
    for row in range(3):
        alone = generate(backbone, [rows[row]], config, infill_mask=[masks[row]], sample_ids=[row])
        assert torch.equal(together.sequences[row], alone.sequences[0])
        tokens, _, _ = sampler_oracle.decode(backbone, rows[row], ~masks[row], config, row)
        assert alone.sequences[0].tolist() == tokens


@pytest.mark.parametrize("kind", ["prefix", "dual", "delayed"])
@pytest.mark.parametrize("rule", SAMPLERS)
def test_refreshing_at_every_pass_is_no_cache(family: str, rule: str, kind: str) -> None:
    backbone = tiny_backbone(family)
    options = {"block_size": 4, "sampler_config": easy(rule), "temperature": 1.0}
    cache = {"kind": kind, "refresh_every": 1}
    found = generate(backbone, prompts(9, 3), settings(cache=cache, measure_drift=True, **options))
    assert_same(found, generate(backbone, prompts(9, 3), settings(**options)))
    assert found.drift is not None
    assert found.drift.max_logit_difference < 1e-4
    assert found.drift.changed_tokens == 0


def test_drift_is_the_difference_of_logits_on_the_canvases_that_were_met() -> None:
    """Against both decoders' own logits, pass by pass, in float64."""
    backbone = tiny_backbone()
    (prompt,) = prompts(6)
    config = settings(cache="dual", block_size=5, measure_drift=True)
    canvases: list[Tensor] = []
    out = generate(backbone, [prompt], config, on_draft=lambda c, d: canvases.append(torch.where(d, c, NUM_TOKENS)[0]))
    first = torch.cat((prompt, prompt.new_full((13,), NUM_TOKENS)))
    cached = sampler_oracle.Model(backbone, CacheConfig(kind="dual"))
    changed = compared = 0
    for canvas in [first, *canvases[:-1]]:
        masked = (canvas == NUM_TOKENS).nonzero()[:, 0].tolist()
        start = 6 + (masked[0] - 6) // 5 * 5
        block = list(range(start, min(start + 5, 19)))
        one = torch.tensor(cached.log_probs(canvas.tolist(), block))
        other = torch.tensor(sampler_oracle.Model(backbone, CacheConfig()).log_probs(canvas.tolist(), block))
        scored = [i for i in block if i in masked]
        changed += int((one[scored].argmax(-1) != other[scored].argmax(-1)).sum())
        compared += len(scored)
    assert out.drift is not None
    assert (out.drift.changed_tokens, out.drift.num_tokens) == (changed, compared)
    assert out.drift.max_logit_difference > 1e-3, "a cache of a bidirectional model drifts"


def test_cached_passes_run_what_they_promise() -> None:
    backbone = tiny_backbone()
    rows = prompts(6, 6)
    lengths = {}
    for kind in ("none", "prefix", "dual", "delayed"):
        with watch_passes(backbone) as passes:
            generate(backbone, rows, settings(cache=kind, block_size=5, max_new_tokens=15, max_denoising_steps=9))
        lengths[kind] = passes.tokens
    # 21 positions, blocks at 6, 11 and 16; the state before a block is run with it
    assert lengths["none"] == [21] * 9
    assert lengths["prefix"] == [21, 16, 16, 21, 11, 11, 21, 6, 6]
    assert lengths["dual"] == [21, 6, 6, 21, 6, 6, 21, 6, 6]
    assert lengths["delayed"] == [21, 16, 16, 16, 11, 11, 11, 6, 6]


# -- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
@pytest.mark.parametrize("rule", SAMPLERS)
def test_exact_cache_equals_no_cache(family: str, rule: str, alignment: str) -> None:
    """Prompts end inside blocks, at their borders and before the first; rows differ in length."""
    backbone = tiny_backbone(family, alignment=alignment, model_block=5)
    options = {"sampler_config": easy(rule), "max_new_tokens": 17, "temperature": 1.0 if rule == "random" else 0.0}
    for rows in (prompts(7, 7), prompts(10, 3, 5), prompts(1), prompts(4, 11)):
        plain = generate(backbone, rows, settings(**options))
        cached = generate(backbone, rows, settings(cache="exact", **options))
        assert_same(cached, plain)
        assert cached.num_forwards == plain.num_forwards
    ids = torch.cat((rows[1], rows[1].new_zeros(17)))
    tokens, _, _ = sampler_oracle.decode(backbone, ids, torch.arange(28) < 11, settings(**options), 1)
    assert plain.sequences[1].tolist() == tokens


def test_exact_logits_are_those_without_cache(family: str) -> None:
    """The states themselves, at every pass, the border of blocks included."""
    from dllm_core.samplers import denoisers

    backbone = tiny_backbone(family, model_block=4)
    shape = denoisers.Shape((18, 15), 18)
    policy = denoisers.policy_for(CacheConfig(kind="exact"), 2, 1, 4)
    cached = denoisers.CachedCanvas(backbone, shape, policy, 4)
    full = denoisers.FullCanvas(backbone, shape)
    ids = torch.stack([torch.randint(1, NUM_TOKENS, (18,)) for _ in range(2)])
    with torch.no_grad():
        for start in (6, 8, 12, 16):
            stop = min((start // 4 + 1) * 4, 18)
            for hidden in (stop - start, 1):
                canvas = ids.clone()
                canvas[:, stop - hidden :] = NUM_TOKENS
                spans = [denoisers.Span(start, stop, start // 4), denoisers.Span(start - 3, stop - 3, start // 4)]
                spans[1] = denoisers.Span(max(1, start // 4 * 4 - 4), start // 4 * 4, start // 4 - 1)
                canvas[1] = ids[1]
                canvas[1, spans[1].stop - 1 :] = NUM_TOKENS
                where = torch.tensor([*range(start, stop), *(18 + p for p in range(spans[1].start, spans[1].stop))])
                found = cached.predict(canvas, spans, where)
                expected = full.predict(canvas, spans, where)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_exact_cache_runs_one_block_per_pass() -> None:
    backbone = tiny_backbone(model_block=4)
    with watch_passes(backbone) as passes:
        generate(backbone, prompts(9), settings(cache="exact", max_new_tokens=13, max_denoising_steps=8))
    # 9 given, then 3 + 4 + 4 + 2 in 2, 3, 2 and 1 passes; a block is run once more beside the first pass of the next
    assert passes.tokens == [12, 4, 8, 4, 4, 8, 4, 6]


def test_a_block_causal_model_sees_no_later_block() -> None:
    """What comes after a block changes nothing in it, cached or not; in a bidirectional model it does."""
    (prompt,) = prompts(8)
    for model_block in (4, None):
        backbone = tiny_backbone(model_block=model_block)
        short, long = (
            generate(backbone, [prompt], settings(max_new_tokens=n, max_denoising_steps=n, block_size=4)).sequences[0]
            for n in (4, 16)
        )
        assert torch.equal(short, long[:12]) == (model_block is not None)


def test_infilling_with_an_exact_cache() -> None:
    backbone = tiny_backbone(model_block=4)
    rows = prompts(21, 14)
    masks = [torch.zeros(len(r), dtype=torch.bool) for r in rows]
    masks[0][[2, 3, 4, 8, 15, 16, 20]] = True
    masks[1][[1, 13]] = True
    plain, cached = (generate(backbone, rows, settings(cache=c), infill_mask=masks) for c in ("none", "exact"))
    assert_same(cached, plain)


def test_blocks_of_the_model_are_never_crossed_but_may_be_cut() -> None:
    backbone = tiny_backbone(model_block=6)
    (prompt,) = prompts(8)
    for size, blocks in ((None, [4, 6, 3]), (6, [4, 6, 3]), (50, [4, 6, 3]), (3, [3, 1, 3, 3, 3])):
        out = generate(backbone, [prompt], settings(max_denoising_steps=13, block_size=size, cache="exact"))
        assert out.commit_step is not None
        commits, start = out.commit_step[0].tolist(), 0
        for block in blocks:
            assert sorted(commits[start : start + block]) == list(range(start + 1, start + block + 1))
            start += block
    with pytest.raises(DllmError, match="too few for the 3 blocks"):
        generate(backbone, [prompt], settings(max_denoising_steps=2))


def test_a_cell_samples_with_the_exact_cache_where_there_is_one() -> None:
    from dllm_core.methods.protocol import SamplingRequest
    from dllm_core.methods.random_mask.method import Method
    from dllm_core.methods.random_mask.options import Options

    request = SamplingRequest(max_new_tokens=8, num_steps=4, temperature=0.0, seed=0)
    for model_block, lengths in ((4, [8, 4, 8, 4]), (None, [12] * 4)):
        backbone = tiny_backbone(model_block=model_block)
        with watch_passes(backbone) as passes:
            Method(backbone, Options()).sample(prompts(4), request)
        assert passes.tokens == lengths


# -- both -----------------------------------------------------------------------------------------------------------


def test_fuzzed_caches_batches_and_blocks() -> None:
    chooser = random.Random(5)
    for trial in range(24):
        exact = trial % 2 == 0
        backbone = tiny_backbone(
            chooser.choice(["llama", "qwen2", "qwen3", "gpt2"]),
            alignment=chooser.choice(["shifted", "same_position"]),
            model_block=chooser.choice([3, 4, 7]) if exact else None,
            layers=chooser.choice([1, 2]),
            seed=trial,
        )
        tokens = chooser.randint(1, 18)
        rows = prompts(*(chooser.randint(1, 12) for _ in range(chooser.randint(1, 4))), seed=trial)
        options = {
            "max_new_tokens": tokens,
            "max_denoising_steps": chooser.randint(tokens, 24),
            "block_size": chooser.choice([None, *range(1, tokens + 1)]),
            "sampler_config": easy(chooser.choice(list(SAMPLERS))),
            "temperature": chooser.choice([0.0, 1.0]),
            "stop_at_eos": chooser.choice([True, False]),
            "eos_token_id": chooser.sample(range(NUM_TOKENS), 4),
            "seed": trial,
        }
        cache = CacheConfig(kind="exact") if exact else CacheConfig(**chooser.choice(CACHES))
        config = settings(cache=cache, **options)
        out = generate(backbone, rows, config)
        assert out.num_forwards <= min(tokens, config.max_denoising_steps)
        for row, prompt in enumerate(rows):
            alone = generate(backbone, [prompt], config, sample_ids=[row])
            assert torch.equal(out.sequences[row], alone.sequences[0]), (trial, options, cache)
            assert int(out.sequences[row].max()) < NUM_TOKENS
        if exact:
            assert_same(out, generate(backbone, rows, settings(**options)))


@pytest.mark.parametrize(
    ("model_block", "options", "problem"),
    [
        (None, {"cache": "exact"}, "needs a block-causal model"),
        (4, {"cache": "dual"}, "gives exactly"),
        (None, {"cache": "dual", "block_size": 14}, "block_size=14 is more than the 13 tokens"),
        (None, {"cache": "prefix", "max_new_tokens": 60, "max_denoising_steps": 9}, "has 64 positions"),
        (4, {"cache": "exact", "max_new_tokens": 60, "max_denoising_steps": 40}, "has 64 positions"),
    ],
)
def test_caches_that_cannot_be_are_refused(model_block: int | None, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(DllmError) as caught:
        generate(tiny_backbone(model_block=model_block), prompts(6), settings(**options))
    first, second = str(caught.value).split("\n")
    assert problem in first
    assert second
