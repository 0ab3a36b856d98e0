"""Estimates, likelihood, masked accuracy, floor, prompts, judge and frontier."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.evals.estimates import SequenceSums, paired_difference
from dllm_core.evals.frontier import continue_prompts, frontier, judged, reference_statistics
from dllm_core.evals.judge import BaseJudge, TextJudge
from dllm_core.evals.likelihood import exact_nll
from dllm_core.evals.masked_accuracy import exact_ratio_mask, masked_accuracy, prediction_strip
from dllm_core.evals.memory import watch_peak, weight_bytes
from dllm_core.evals.nelbo import block_nelbo, nelbo
from dllm_core.evals.prompts import prompts_of
from dllm_core.evals.unigram import unigram_nll
from dllm_core.methods.ar.method import Method as ArMethod
from dllm_core.methods.ar.options import Options as ArOptions
from dllm_core.methods.random_mask.method import Method as MaskMethod
from dllm_core.methods.random_mask.options import Options as MaskOptions
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import NUM_TOKENS, byte_tokenizer, tiny_model
from tests.unit.toy_denoiser import TableDenoiser, toy_batch


@torch.no_grad()
def causal_oracle(backbone: Backbone, ids: list[int], scored_from: int) -> float:
    """Return -log p of ids[scored_from:] by one forward per prefix through the plain transformers model."""
    total = 0.0
    for end in range(scored_from, len(ids)):
        logits_V = backbone.model(torch.tensor([ids[:end]]), is_causal=True).logits[0, -1, :NUM_TOKENS].double()
        total -= float(torch.log_softmax(logits_V, 0)[ids[end]])
    return total


# -- estimates ----------------------------------------------------------------------------------------------------


def test_per_token_is_a_ratio_of_sums() -> None:
    sums = SequenceSums((2.0, 30.0), (1.0, 10.0))
    assert sums.per_token().value == pytest.approx(32 / 11), "not the mean of 2 and 3"


def test_standard_error_with_equal_lengths_is_the_textbook_one() -> None:
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = SequenceSums.of(values * 8, torch.full((50,), 8))
    assert sums.per_token().se == pytest.approx(float(values.std() / math.sqrt(50)))


def test_standard_error_of_a_ratio_matches_resampling() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 50, (60,), generator=generator)
    nats = tokens * (3 + torch.randn(60, generator=generator, dtype=torch.float64))
    index = torch.randint(60, (4000, 60), generator=generator)
    resampled = nats[index].sum(1) / tokens[index].sum(1)
    assert SequenceSums.of(nats, tokens).per_token().se == pytest.approx(float(resampled.std()), rel=0.1)


def test_documents_of_equal_size_give_the_standard_error_of_their_means() -> None:
    """Closed form: with m equally long windows a document, the document means are the sample."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 1, generator=generator, dtype=torch.float64) + 0.1 * torch.randn(
        12, 5, generator=generator
    )
    groups = torch.arange(12).repeat_interleave(5)
    order = torch.randperm(60, generator=generator)
    sums = SequenceSums.of(values.flatten()[order] * 8, torch.full((60,), 8)).grouped(tuple(groups[order].tolist()))
    expected = float(values.mean(1).std() / math.sqrt(12))
    assert sums.per_token().se == pytest.approx(expected)
    alone = sums.grouped(None).per_token().se
    assert alone is not None
    assert alone < 0.6 * expected, "windows of one document taken for independent look too certain"
    assert sums.grouped(tuple(range(60))).per_token().se == pytest.approx(alone)


def test_copies_of_a_sequence_add_no_certainty() -> None:
    nats, tokens = (3.0, 9.0, 4.0), (2.0, 5.0, 3.0)
    once = SequenceSums(nats, tokens).per_token()
    copied = SequenceSums(nats * 4, tokens * 4, (0, 1, 2) * 4).per_token()
    assert (copied.value, copied.se) == pytest.approx((once.value, once.se))
    assert SequenceSums(nats, tokens, (7, 7, 7)).per_token().se is None, "one document"
    difference = paired_difference(
        SequenceSums(nats * 4, tokens * 4, (0, 1, 2) * 4), SequenceSums((0.0,) * 12, tokens * 4)
    )
    assert difference.se == pytest.approx(once.se)


def test_one_sequence_has_no_standard_error() -> None:
    assert SequenceSums((2.0,), (4.0,)).per_token().as_json() == {"value": 0.5, "se": None}


def test_paired_differences_drop_what_is_common() -> None:
    hard = torch.tensor([1.0, 9.0, 4.0, 30.0], dtype=torch.float64)
    tokens = torch.full((4,), 10)
    difference = paired_difference(SequenceSums.of(hard + 1.0, tokens), SequenceSums.of(hard, tokens))
    assert (difference.value, difference.se) == pytest.approx((0.1, 0.0), abs=1e-12)


def test_bits_per_byte() -> None:
    assert SequenceSums((math.log(2) * 80,), (10.0,)).bits_per_byte([40]) == pytest.approx(2.0)


# -- likelihood ---------------------------------------------------------------------------------------------------


def test_exact_likelihood_is_the_chain_rule(tiny_backbone: Backbone) -> None:
    sequences = random_sequences(3, 12, 4, NUM_TOKENS)
    found = exact_nll(ArMethod(tiny_backbone, ArOptions(tuned=False)), sequences.batch_of(range(3)), batch_size=2)
    assert found.tokens == (8.0, 8.0, 8.0)
    for row in range(3):
        oracle = causal_oracle(tiny_backbone, sequences.input_ids_NL[row].tolist(), 4)
        assert found.sums[row] == pytest.approx(oracle, rel=1e-4)


@torch.no_grad()
def test_bounds_of_a_real_room_score_the_same_tokens_as_the_likelihood(tiny_backbone: Backbone) -> None:
    """With blocks of one token the bound is a chain over prefixes, each followed by masks: plain forwards give it."""
    method = MaskMethod(tiny_backbone, MaskOptions())
    sequences = random_sequences(2, 9, 3, NUM_TOKENS)
    batch = sequences.batch_of(range(2))
    found = block_nelbo(method, batch, samples=1, block_size=1, noise=NoiseSource(0), batch_size=5)
    mask_id = tiny_backbone.contract.mask_token_id
    for row in range(2):
        ids, total = sequences.input_ids_NL[row].tolist(), 0.0
        for i in range(3, 9):
            noisy = torch.tensor([ids[:i] + [mask_id] * (9 - i)])
            logits_V = tiny_backbone.model(noisy, is_causal=False).logits[0, i - 1, :NUM_TOKENS].double()
            total -= float(torch.log_softmax(logits_V, 0)[ids[i]])
        assert found.sums[row] == pytest.approx(total, rel=1e-4)
    assert nelbo(method, batch, samples=2, noise=NoiseSource(0)).tokens == found.tokens == (6.0, 6.0)


def test_packed_rows_equal_their_documents_alone(tiny_backbone: Backbone) -> None:
    packed = packed_sequences(2, (5, 7), 2, NUM_TOKENS)
    method = ArMethod(tiny_backbone, ArOptions(tuned=False))
    found = exact_nll(method, packed.batch_of(range(2)))
    for row in range(2):
        ids = packed.input_ids_NL[row].tolist()
        oracle = causal_oracle(tiny_backbone, ids[:5], 1) + causal_oracle(tiny_backbone, ids[5:12], 1)
        assert found.sums[row] == pytest.approx(oracle, rel=1e-4)
    assert found.tokens == (10.0, 10.0), "first tokens and padding are never scored"


# -- masked accuracy and floor ------------------------------------------------------------------------------------


def test_masks_have_exact_counts_and_are_nested() -> None:
    batch = random_sequences(6, 25, 5, 50).batch_of(range(6))
    masks = [exact_ratio_mask(batch, r, NoiseSource(0)) for r in (0.01, 0.15, 0.5, 0.85, 1.0)]
    assert [set(m.sum(1).tolist()) for m in masks] == [{1}, {3}, {10}, {17}, {20}]
    for small, large in itertools.pairwise(masks):
        assert not (small & ~large).any()


def test_masked_accuracy_by_hand() -> None:
    method = TableDenoiser(4)
    rows = [[2, 0, 1, 1], [1, 1, 0, 2], [0, 2, 1, 0]]
    batch, noise = toy_batch([[r] for r in rows]), NoiseSource(0)
    found = masked_accuracy(method, batch, ratios=[0.5], noise=noise, batch_size=2)[0.5]
    masked_BL = exact_ratio_mask(batch, 0.5, noise)[:, 1:]
    for row, tokens in enumerate(rows):
        visible = tuple(i for i in range(4) if not masked_BL[row, i])
        hidden = [i for i in range(4) if masked_BL[row, i]]
        assert found.nll.sums[row] == pytest.approx(sum(method.nll(tokens, visible, i) for i in hidden), abs=1e-9)
        right = sum(int(method.conditional(tokens, visible, i).argmax()) == tokens[i] for i in hidden)
        assert found.accuracy.sums[row] == right
    assert found.accuracy.tokens == (2.0, 2.0, 2.0)


def test_strip_marks_every_token_once() -> None:
    method, batch = TableDenoiser(4), toy_batch([[[2, 0, 1, 1]]])
    states = prediction_strip(method, batch, ratio=0.5, noise=NoiseSource(0))
    masked_L = exact_ratio_mask(batch, 0.5, NoiseSource(0))[0].tolist()
    assert [s != "given" for s in states] == masked_L


def test_unigram_floor_is_smoothed_and_ignores_prompts() -> None:
    batch = toy_batch([[[1, 1, 2]]])
    found = unigram_nll(batch, torch.tensor([0, 6]), num_tokens=4)  # id 2 and 3 were never seen
    p = {1: 7 / 10, 2: 1 / 10}
    assert found.sums[0] == pytest.approx(-2 * math.log(p[1]) - math.log(p[2]))
    assert found.tokens == (3.0,)


# -- prompts, judge, frontier -------------------------------------------------------------------------------------


def test_prompts_of_windows_and_of_packed_text() -> None:
    windows = random_sequences(3, 12, 4, 50)
    found = prompts_of(windows.batch_of(range(3)), prompt_tokens=99, response_tokens=5, limit=2)
    assert len(found) == 2
    assert found.ids[1].tolist() == windows.input_ids_NL[1, :4].tolist()
    assert found.references[1].tolist() == windows.input_ids_NL[1, 4:9].tolist()
    packed = packed_sequences(2, (6, 5), 3, 50)
    found = prompts_of(packed.batch_of(range(2)), prompt_tokens=2, response_tokens=99, limit=9)
    assert found.ids[0].tolist() == packed.input_ids_NL[0, :2].tolist()
    assert found.references[0].tolist() == packed.input_ids_NL[0, 2:6].tolist(), "ends with its document"


def test_base_judge_is_the_causal_model(tiny_backbone: Backbone) -> None:
    judge = BaseJudge(tiny_backbone, batch_size=2)
    texts = [([5, 6, 7], [8, 9, 10]), ([5], [11, 12, 13, 14, 15]), ([1, 2], [3, 4, 5, 6])]
    found = judge.score([p for p, _ in texts], [c for _, c in texts])
    assert found.tokens == (3.0, 5.0, 4.0)
    for value, (prompt, continuation) in zip(found.sums, texts, strict=True):
        assert value == pytest.approx(causal_oracle(tiny_backbone, prompt + continuation, len(prompt)), rel=1e-4)
    assert "self-judged" in judge.label


class PairTokenizer:
    """Two characters a token, so that the prompt's border may fall inside one."""

    is_fast = True

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        spans = [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
        return {"input_ids": [hash(text[a:b]) % 90 for a, b in spans], "offset_mapping": spans}


def test_foreign_judge_scores_only_tokens_after_the_prompt() -> None:
    writer = byte_tokenizer()
    model = tiny_model(vocab=97)
    judge = TextJudge(model, PairTokenizer(), writer, label="other")
    prompt, continuation = (writer(t)["input_ids"] for t in ("abc", "defgh"))
    found = judge.score([prompt], [continuation])
    # ab cd ef gh: "cd" straddles the border
    assert found.tokens == (2.0,)
    ids = PairTokenizer()("abcdefgh")["input_ids"]
    logp_LV = torch.log_softmax(model(torch.tensor([ids])).logits[0].detach().double(), -1)
    assert found.sums[0] == pytest.approx(-float(logp_LV[1, ids[2]] + logp_LV[2, ids[3]]), rel=1e-4)


class Parrot(TableDenoiser):
    """Writes the prompt's last token, plus one at temperatures above a half."""

    def sample(self, prompts: Any, request: Any, on_draft: Any = None) -> Any:
        from dllm_core.methods.protocol import GenerationOutput

        self.requests = [*getattr(self, "requests", []), request]
        new = request.max_new_tokens
        ids = [torch.full((new,), int(p[-1]) + (request.temperature > 0.5)) for p in prompts]
        return GenerationOutput(
            [torch.cat([p, n]) for p, n in zip(prompts, ids, strict=True)],
            [new] * len(prompts),
            request.num_steps,
            0.1,
            [torch.arange(new) + 1 for _ in prompts] if request.record_history else None,
        )


def test_frontier_writes_scores_and_keeps_the_order(tiny_backbone: Backbone) -> None:
    batch = random_sequences(5, 20, 4, 50).batch_of(range(5))
    prompts = prompts_of(batch, prompt_tokens=4, response_tokens=16, limit=5)
    method, judge = Parrot(2), BaseJudge(tiny_backbone)
    found = frontier(
        method,
        prompts,
        judge,
        NoiseSource(0),
        temperatures=(1.0, 0.2),
        new_tokens=6,
        steps=40,
        batch_size=2,
        record_history=True,
    )
    assert [p["temperature"] for p in found.points] == [0.2, 1.0]
    assert all(p["unigram_entropy_nats"] == 0 and p["num_samples"] == 5 for p in found.points)
    assert found.points[0]["repetition_4"] == pytest.approx(2 / 3)
    assert found.points[0]["num_documents"] is None, "nobody knows where these prompts come from"
    grouped = judged(judge, replace(prompts, groups=(0, 0, 1, 1, 1)), found.continuations[0].tokens, NoiseSource(0))
    assert (grouped["num_samples"], grouped["num_documents"]) == (5, 2)
    assert {r.num_steps for r in method.requests} == {6}, "never more steps than tokens"
    assert [r.sample_ids for r in method.requests[:3]] == [(0, 1), (2, 3), (4,)]
    assert found.continuations[0].commit_step is not None
    assert found.continuations[1].commit_step is None
    oracle = causal_oracle(tiny_backbone, [*prompts.ids[0].tolist(), *found.continuations[0].tokens[0].tolist()], 4)
    alone = judge.score([prompts.ids[0].tolist()], [found.continuations[0].tokens[0].tolist()])
    assert alone.sums[0] == pytest.approx(oracle, rel=1e-4)
    expected = judge.score(
        [p.tolist() for p in prompts.ids], [t.tolist() for t in found.continuations[0].tokens]
    ).per_token()
    assert found.points[0]["judge_ppl"] == pytest.approx(math.exp(expected.value))


class Bigrams(BaseJudge):
    """Gives ascending pairs 1 nat and everything else 3."""

    def __init__(self) -> None:
        self.label, self.batch_size = "bigrams", 8

    def score(self, prompts: Any, continuations: Any) -> SequenceSums:
        sums = [
            sum(1.0 if b == a + 1 else 3.0 for a, b in zip([p[-1], *c], c, strict=False))
            for p, c in zip(prompts, continuations, strict=True)
        ]
        return SequenceSums(tuple(sums), tuple(float(len(c)) for c in continuations))


def test_shuffling_opens_a_gap_only_where_there_is_structure() -> None:
    sequences = random_sequences(8, 65, 1, 50)
    batch = sequences.batch_of(range(8))
    prompts = prompts_of(batch, prompt_tokens=1, response_tokens=64, limit=8)
    ordered = [torch.arange(int(p[-1]) + 1, int(p[-1]) + 65) for p in prompts.ids]
    written = judged(Bigrams(), prompts, ordered, NoiseSource(0))
    assert written["shuffle_gap_nats"] > 0.3
    # of 64 shuffled tokens about one pair stays in order
    assert written["judge_ppl"] == pytest.approx(math.e)
    assert written["shuffled_judge_ppl"] == pytest.approx(math.exp(3.0 - 2.0 / 64), rel=0.05)
    same = judged(Bigrams(), prompts, [torch.full((64,), 7)] * 8, NoiseSource(0))
    assert same["shuffled_judge_ppl"] == same["judge_ppl"]
    fragments = [torch.tensor([i % 4 for i in range(64)]) for _ in prompts.ids]
    assert judged(Bigrams(), prompts, fragments, NoiseSource(0))["shuffle_gap_nats"] == pytest.approx(0.0, abs=0.05)
    figures = reference_statistics(Bigrams(), prompts, NoiseSource(0))
    assert figures["shuffled_judge_ppl"] <= math.exp(3.0) + 1e-9


def test_continuations_do_not_depend_on_the_batch(tiny_backbone: Backbone) -> None:
    method = MaskMethod(tiny_backbone, MaskOptions())
    batch = random_sequences(4, 20, 4, NUM_TOKENS).batch_of(range(4))
    prompts = prompts_of(batch, prompt_tokens=4, response_tokens=16, limit=4)

    def written(size: int) -> list[Tensor]:
        found = continue_prompts(method, prompts, temperature=0.8, new_tokens=8, steps=4, seed=0, batch_size=size)
        return list(found.tokens)

    assert all(torch.equal(a, b) for a, b in zip(written(1), written(4), strict=True))


# -- memory -------------------------------------------------------------------------------------------------------


def test_weights_are_counted_once() -> None:
    model = tiny_model()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected = sum(p.numel() * 4 for p in model.parameters()) + sum(b.numel() * 4 for b in model.buffers())
    assert weight_bytes(model) <= expected
    assert weight_bytes(model) >= sum(p.numel() * 4 for p in model.parameters())


def test_peak_sees_a_large_temporary() -> None:
    with watch_peak(torch.device("cpu")) as peak:
        large = torch.ones(64 << 20, dtype=torch.uint8)
        del large
    if peak.extra_bytes is None:
        pytest.skip("this system keeps no high-water mark")
    assert 50e6 < peak.extra_bytes < 200e6


def test_toy_rows_know_their_batch() -> None:
    """The toy's own layout: prompts are given, padding is nobody's."""
    batch: Batch = toy_batch([[[1, 2], [0]], [[2]]])
    assert batch.response_BL.tolist() == [[False, True, True, False, True], [False, True, False, False, False]]
    assert batch.document_BL[1].tolist() == [0, 0, -1, -1, -1]
