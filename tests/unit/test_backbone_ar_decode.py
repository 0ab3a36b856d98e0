"""Cached left-to-right decoding against a loop without cache, and against transformers' generate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_core.backbone.ar_decode import _pick, decode
from dllm_core.backbone.backbone import Backbone
from dllm_core.errors import DllmError
from dllm_core.methods.protocol import SamplingRequest
from tests.tiny import NUM_TOKENS, tiny_backbone

PROMPTS = [torch.tensor([5]), torch.tensor([7, 8, 9, 10, 11]), torch.tensor([3, 1, 4])]


def request(**options) -> SamplingRequest:
    return SamplingRequest(**{"max_new_tokens": 12, "num_steps": 0, **options})


def slow_greedy(backbone: Backbone, prompt: Tensor, count: int) -> list[int]:
    ids = prompt.tolist()
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(backbone.logits(backbone.hidden(torch.tensor([ids]), causal=True))[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_greedy_equals_a_loop_without_cache_whatever_the_batch(family: str, attn: str) -> None:
    backbone = tiny_backbone(family, attn=attn)
    together = decode(backbone, PROMPTS, request(record_history=True))
    for i, prompt in enumerate(PROMPTS):
        expected = slow_greedy(backbone, prompt, 12)
        assert together.sequences[i].tolist() == expected
        assert decode(backbone, [prompt], request()).sequences[0].tolist() == expected
        assert together.commit_step[i].tolist() == list(range(1, 13))
    assert together.new_tokens == [12, 12, 12]
    assert together.num_forwards == 12
    assert together.tokens_per_forward == 1
    assert together.first_token_s > 0


def test_greedy_equals_generate(family: str) -> None:
    backbone = tiny_backbone(family)
    backbone.model.config.is_causal = True
    theirs = backbone.model.generate(
        PROMPTS[1][None], max_new_tokens=12, do_sample=False, eos_token_id=None, suppress_tokens=[*range(97, 128)]
    )
    assert decode(backbone, [PROMPTS[1]], request()).sequences[0].tolist() == theirs[0].tolist()


def test_sampling_is_keyed_by_sample_id(family: str) -> None:
    backbone = tiny_backbone(family)
    options = {"temperature": 1.0, "seed": 3}
    together = decode(backbone, PROMPTS, request(sample_ids=(11, 12, 13), **options))
    for i, sample_id in enumerate((11, 12, 13)):
        alone = decode(backbone, [PROMPTS[i]], request(sample_ids=(sample_id,), **options))
        assert torch.equal(alone.sequences[0], together.sequences[i])
    other = decode(backbone, PROMPTS, request(sample_ids=(11, 12, 13), temperature=1.0, seed=4))
    assert not any(torch.equal(a, b) for a, b in zip(other.sequences, together.sequences, strict=True))
    same = decode(backbone, [PROMPTS[1]] * 2, request(sample_ids=(0, 1), **options)).sequences
    assert not torch.equal(*same), "two samples of one prompt must differ"


def test_sampled_frequencies_follow_the_distribution() -> None:
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=gen) * 2
    logits[[0, 5]] = -torch.inf
    draws = torch.rand(40_000, generator=gen, dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        counts = _pick(logits.expand(40_000, 6), temperature, draws).bincount(minlength=6)
        expected = (logits / temperature).softmax(-1)
        assert counts[0] == counts[5] == 0
        torch.testing.assert_close(counts / 40_000, expected, atol=0.01, rtol=0)


def test_extreme_draws_stay_allowed() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, 3.0, -torch.inf]])
    assert _pick(logits, 1.0, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert _pick(logits, 1.0, torch.tensor([1.0], dtype=torch.float64)).item() == 3


def test_blocked_ids_are_never_emitted(tiny_backbone: Backbone) -> None:
    with torch.no_grad():
        # without the block, mask and padding rows would win every time
        tiny_backbone.head_weight_VD[NUM_TOKENS:] *= 50
    for temperature in (0.0, 5.0):
        out = decode(tiny_backbone, PROMPTS, request(max_new_tokens=40, temperature=temperature))
        assert max(int(s.max()) for s in out.sequences) < NUM_TOKENS


def test_stops_at_end_of_sequence(tiny_backbone: Backbone) -> None:
    free = decode(tiny_backbone, PROMPTS, request())
    new = [s[len(p) :].tolist() for s, p in zip(free.sequences, PROMPTS, strict=True)]
    tiny_backbone.config.eos_token_id = [new[0][3], new[1][5]]
    ends = set(tiny_backbone.eos_token_ids)
    stopped = decode(tiny_backbone, PROMPTS, request(stop_at_eos=True))
    lengths = []
    for i, tokens in enumerate(new):
        first = next((k for k, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        assert stopped.sequences[i].tolist() == PROMPTS[i].tolist() + tokens[: first + 1]
        lengths.append(first + 1)
    assert stopped.new_tokens == lengths
    assert stopped.num_forwards == max(lengths)
    assert min(lengths) < 12
    ignoring = decode(tiny_backbone, PROMPTS, request(stop_at_eos=False))
    assert all(torch.equal(a, b) for a, b in zip(ignoring.sequences, free.sequences, strict=True))


def test_too_long_is_refused_before_any_work(tiny_backbone: Backbone) -> None:
    with pytest.raises(DllmError, match="65 tokens"):
        decode(tiny_backbone, PROMPTS, request(max_new_tokens=60))
