"""Cached left-to-right decoding against a loop without cache, and against transformers' generate.

On a CPU it runs through the quick pass for three of the families, through transformers' modules for gpt2 and where
DLLM_KERNELS=reference says so.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.backbone import ar_decode
from dllm_core.backbone.ar_decode import _pick, decode
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.passes.quick import QuickPass
from dllm_core.corruption.noise import NoiseSource
from dllm_core.errors import DllmError
from dllm_core.kernels import dispatch
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


def slow_sample(backbone: Backbone, prompt: Tensor, wanted: SamplingRequest, sample_id: int) -> list[int]:
    """Return prompt and new tokens, drawn one by one from float64 probabilities; no cache, no batch."""
    generator = NoiseSource(wanted.seed).generator(sample_id, 0, "ar decoding")
    draws = torch.rand(wanted.max_new_tokens, generator=generator, dtype=torch.float64).tolist()
    ids = prompt.tolist()
    for draw in draws:
        with torch.no_grad():
            logits_V = backbone.model(input_ids=torch.tensor([ids]), is_causal=True, use_cache=False).logits[0, -1]
        shares = (logits_V[:NUM_TOKENS].double() / wanted.temperature).softmax(0).tolist()
        token = 0
        while draw >= shares[token]:
            draw -= shares[token]
            token += 1
        ids.append(token)
        if wanted.stop_at_eos and token in backbone.eos_token_ids:
            break
    return ids


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("seed", range(6))
def test_any_decode_equals_rows_one_at_a_time_without_cache(
    family: str, seed: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random models, numbers and lengths of prompts, ends of text and temperatures."""
    monkeypatch.setenv("DLLM_KERNELS", kernels)
    dice = random.Random(seed)
    backbone = tiny_backbone(family, seed=seed, layers=dice.randint(1, 3), tied=dice.random() < 0.5)
    backbone.config.eos_token_id = dice.sample(range(NUM_TOKENS), 8)
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        torch.randint(NUM_TOKENS, (dice.randint(1, 20),), generator=generator) for _ in range(dice.randint(1, 5))
    ]
    names = tuple(dice.sample(range(100), len(prompts)))
    wanted = request(
        max_new_tokens=dice.randint(1, 20),
        temperature=dice.choice([0.01, 0.7, 1.3]),
        seed=seed,
        sample_ids=names,
        stop_at_eos=dice.random() < 0.6,
    )
    found = decode(backbone, prompts, wanted)
    for prompt, name, sequence in zip(prompts, names, found.sequences, strict=True):
        assert sequence.tolist() == slow_sample(backbone, prompt, wanted, name)
    assert found.num_forwards == max(found.new_tokens)


def test_every_position_of_the_model_can_be_used(family: str) -> None:
    backbone = tiny_backbone(family)
    prompts = [torch.arange(41) % NUM_TOKENS, torch.tensor([9, 2]), torch.arange(30, 62)]
    together = decode(backbone, prompts, request(max_new_tokens=23))
    for prompt, sequence in zip(prompts, together.sequences, strict=True):
        assert sequence.tolist() == slow_greedy(backbone, prompt, 23)
    with pytest.raises(DllmError, match="65 tokens does not fit the model, which has 64"):
        decode(backbone, prompts, request(max_new_tokens=24))


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


# -- how it runs ------------------------------------------------------------------------------------------------------


def test_a_pass_runs_one_token_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    shapes: list[tuple[int, ...]] = []
    plain_call = QuickPass.__call__

    def counted(self: Any, input_ids_BL: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(input_ids_BL.shape))
        return plain_call(self, input_ids_BL, **options)

    monkeypatch.setattr(QuickPass, "__call__", counted)
    decode(backbone, PROMPTS, request(max_new_tokens=4))
    assert shapes == [(3, 5), (3, 1), (3, 1), (3, 1)]


def test_it_says_which_passes_it_takes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("qwen3")
    expected = decode(backbone, PROMPTS, request()).sequences
    monkeypatch.setenv("DLLM_KERNELS", "reference")
    dispatch.announce.cache_clear()
    with caplog.at_level("INFO", dispatch.__name__):
        found = decode(backbone, PROMPTS, request()).sequences
    assert caplog.messages == ["decoder pass runs its reference implementation (DLLM_KERNELS=reference)"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_hooks_see_every_pass() -> None:
    backbone = tiny_backbone("llama")
    expected = decode(backbone, PROMPTS, request()).sequences
    shapes: list[torch.Size] = []
    backbone.layers[0].register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    found = decode(backbone, PROMPTS, request())
    assert shapes == [(3, 5, 32), *[(3, 1, 32)] * 11]
    assert all(torch.equal(a, b) for a, b in zip(found.sequences, expected, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_change_between_decodes_are_noticed(tied: bool) -> None:
    backbone = tiny_backbone("llama", tied=tied)
    seen = []
    for change in (None, backbone.layers[1].mlp.down_proj.weight, backbone.head_weight_VD):
        if change is not None:
            with torch.no_grad():
                change.copy_(change.flip(0))
        seen.append(decode(backbone, [PROMPTS[1]], request()).sequences[0].tolist())
        assert seen[-1] == slow_greedy(backbone, PROMPTS[1], 12)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_bf16_tokens_are_the_best_up_to_the_error_of_bf16(kind: str) -> None:
    """Alone and in a batch; how far off bf16 logits are is taken from transformers' modules."""
    backbone = tiny_backbone(kind, layers=3).to(torch.bfloat16)
    exact = copy.deepcopy(backbone).double()
    together = decode(backbone, PROMPTS, request()).sequences
    for prompt, in_batch in zip(PROMPTS, together, strict=True):
        for sequence in (in_batch, decode(backbone, [prompt], request()).sequences[0]):
            with torch.no_grad():
                logits_LV = exact.model(input_ids=sequence[None], is_causal=True).logits[0, :, :NUM_TOKENS]
                usual_LV = backbone.logits(backbone.hidden(sequence[None], causal=True))[0, :, :NUM_TOKENS]
            error = (usual_LV.double() - logits_LV).abs().max()
            at_T = torch.arange(len(prompt) - 1, len(sequence) - 1)
            short_T = logits_LV[at_T].max(-1).values - logits_LV[at_T, sequence[len(prompt) :]]
            assert short_T.max() < 2 * error
            assert error < 0.25 * logits_LV.std(), "else this says nothing"


# -- what a caller sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_caller_sees_the_tokens_that_are_returned(family: str, temperature: float) -> None:
    backbone = tiny_backbone(family)
    free = decode(backbone, PROMPTS, request(temperature=temperature))
    backbone.config.eos_token_id = [int(free.sequences[0][4]), int(free.sequences[2][8])]
    seen: list[list[int]] = [[], [], []]
    calls = []

    def on_token(token_B: Tensor, alive_B: Tensor) -> None:
        calls.append(alive_B)
        for row in alive_B.nonzero()[:, 0].tolist():
            seen[row].append(int(token_B[row]))

    wanted = request(temperature=temperature, stop_at_eos=True)
    output = decode(backbone, PROMPTS, wanted, on_token=on_token)
    assert [s[len(p) :].tolist() for s, p in zip(output.sequences, PROMPTS, strict=True)] == seen
    assert len(calls) == output.num_forwards == max(output.new_tokens)
    assert min(output.new_tokens) < max(output.new_tokens)
    assert torch.stack(calls).sum(0).tolist() == output.new_tokens
    assert all(
        torch.equal(a, b) for a, b in zip(output.sequences, decode(backbone, PROMPTS, wanted).sequences, strict=True)
    )


def test_a_caller_hears_of_a_token_before_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, order = tiny_backbone("llama"), []
    run = ar_decode._Passes.next_logits
    monkeypatch.setattr(
        ar_decode._Passes, "next_logits", lambda self, token_B: (order.append("pass"), run(self, token_B))[1]
    )
    decode(backbone, PROMPTS, request(max_new_tokens=3), on_token=lambda *_: order.append("token"))
    assert order == ["pass", "token"] * 3


def test_a_caller_can_stop_a_decode(tiny_backbone: Backbone) -> None:
    def interrupted(token_B: Tensor, alive_B: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(tiny_backbone, PROMPTS, request(), on_token=interrupted)
