"""Gaps in held-out text: where they are, what fills them, what counts as right. Fast against one text at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.noise import NoiseSource
from dllm_core.evals.gaps import (
    Filling,
    Gaps,
    context_of,
    continue_to_gap,
    fill,
    gap_figures,
    middle_gaps,
    random_gaps,
)
from dllm_core.evals.masked_accuracy import exact_ratio_mask
from dllm_core.methods.protocol import Method
from dllm_core.methods.registry import room_method, room_options
from dllm_core.samplers.config import DiffusionGenerationConfig, MultiBlockConfig
from tests.sequences import packed_sequences, random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone

LENGTH, PROMPT = 24, 8


def method_of(room: str, backbone: Backbone, **options: object) -> Method:
    return room_method(room)(backbone, room_options(room)(**options)).eval()


@pytest.fixture(scope="module")
def gaps() -> Gaps:
    batch = random_sequences(5, LENGTH, PROMPT, NUM_TOKENS).batch_of(range(5))
    return middle_gaps(batch, 6, (0, 0, 1, 1, 2))


def test_the_gap_lies_in_the_middle_of_the_response(gaps: Gaps) -> None:
    for mask in gaps.masks:
        assert mask.nonzero()[:, 0].tolist() == [13, 14, 15, 16, 17, 18]
    assert gaps.sizes == (6,) * 5


def test_a_gap_takes_at_most_half_of_the_response() -> None:
    batch = random_sequences(2, LENGTH, PROMPT, NUM_TOKENS).batch_of(range(2))
    assert middle_gaps(batch, 100, None).sizes == (8, 8)


def test_packed_text_gives_its_first_document_without_padding() -> None:
    batch = packed_sequences(3, (9, 7), 4, NUM_TOKENS).batch_of(range(3))
    found = middle_gaps(batch, 3, None)
    assert [len(ids) for ids in found.ids] == [9, 9, 9]
    assert found.masks[0].nonzero()[:, 0].tolist() == [3, 4, 5]
    random = random_gaps(batch, 0.5, NoiseSource(0), None)
    assert all(not bool(mask[0]) for mask in random.masks), "a document's first token has no predictor"


def test_a_response_in_pieces_loses_one_stretch() -> None:
    batch = random_sequences(1, LENGTH, 2, NUM_TOKENS).batch_of(range(1))
    batch.response_BL[0, 12:15] = False
    (mask,) = middle_gaps(batch, 8, None).masks
    places = mask.nonzero()[:, 0].tolist()
    assert places == list(range(places[0], places[-1] + 1))
    assert not set(places) & {12, 13, 14}


def test_random_gaps_hide_what_the_masked_accuracy_hides() -> None:
    batch = random_sequences(4, LENGTH, PROMPT, NUM_TOKENS).batch_of(range(4))
    found = random_gaps(batch, 0.5, NoiseSource(3), None)
    assert torch.equal(torch.stack(found.masks), exact_ratio_mask(batch, 0.5, NoiseSource(3)))


def test_context_follows_from_what_a_row_can_do() -> None:
    assert context_of(room_options("random_mask")().capabilities()) == "both sides"
    assert context_of(room_options("block_causal")(block_size=4).capabilities()) == "left and own block"
    assert context_of(room_options("ar")(tuned=True).capabilities()) == "left"
    assert context_of(room_options("ldlm")().capabilities()) is None


# -- filling ----------------------------------------------------------------------------------------------------------


def config(size: int, **more: object) -> DiffusionGenerationConfig:
    return DiffusionGenerationConfig(max_denoising_steps=size, stop_at_eos=False, record_history=True, **more)


ADAPTIVE: Sequence[dict[str, object]] = (
    {"sampler_config": "confidence"},
    {"sampler_config": {"name": "threshold", "threshold": 0.04}},
    {"sampler_config": {"name": "factor", "factor": 3.0}},
    {
        "sampler_config": {"name": "entropy_threshold", "entropy_threshold": 3.9},
        "block_size": 2,
        "multi_block": MultiBlockConfig(block_add_threshold=0.5),
    },
)


@pytest.mark.parametrize("rule", ADAPTIVE, ids=["confidence", "threshold", "factor", "multi_block"])
@pytest.mark.parametrize("room", ["random_mask", "block_causal"])
def test_a_batch_gives_tokens_and_passes_of_one_text_at_a_time(room: str, rule: dict[str, object]) -> None:
    """Texts of different lengths and gaps; the passes of a text are those of a decode of its own, not its batch's."""
    block = {"block_size": 4} if room == "block_causal" else {}
    method = method_of(room, tiny_backbone("llama", model_block=block.get("block_size")), **block)
    batch = random_sequences(6, LENGTH, PROMPT, NUM_TOKENS).batch_of(range(6))
    parts = [middle_gaps(batch.rows(0, 3), 6, None), random_gaps(batch.rows(3, 6), 0.7, NoiseSource(1), None)]
    gaps = Gaps(*(sum((getattr(p, name) for p in parts), ()) for name in ("ids", "masks", "sample_ids")))
    whole = fill(method, gaps, lambda size: config(size, **rule), batch_size=4)
    forwards = []
    for i in range(len(gaps)):
        output = method.fill(  # the number of passes as the loop itself counts it
            [gaps.ids[i]], [gaps.masks[i]], config(gaps.sizes[i], **rule), sample_ids=[gaps.sample_ids[i]]
        )
        forwards.append(output.num_forwards)
        assert torch.equal(output.sequences[0][gaps.masks[i]], whole.tokens[i])
        assert torch.equal(output.sequences[0][~gaps.masks[i]], gaps.ids[i][~gaps.masks[i]])
    assert whole.forwards == tuple(forwards)


def test_rules_that_let_more_through_take_fewer_passes() -> None:
    method = method_of("random_mask", tiny_backbone("llama"))
    batch = random_sequences(4, LENGTH, PROMPT, NUM_TOKENS).batch_of(range(4))
    gaps = middle_gaps(batch, 8, None)

    def passes(threshold: float) -> int:
        rule = {"name": "threshold", "threshold": threshold}
        return sum(fill(method, gaps, lambda size: config(size, sampler_config=rule), batch_size=4).forwards)

    assert passes(1.0) == 4 * 8
    assert passes(1e-6) == 4
    assert passes(1.0) > passes(0.06) > passes(1e-6)


def test_a_block_causal_gap_gets_a_pass_for_every_block() -> None:
    method = method_of("block_causal", tiny_backbone("llama", model_block=4), block_size=4)
    batch = random_sequences(2, LENGTH, PROMPT, NUM_TOKENS).batch_of(range(2))
    gaps = middle_gaps(batch, 8, None)  # tokens 12 to 19: two blocks
    found = fill(method, gaps, lambda size: config(1), batch_size=2)
    assert found.forwards == (2, 2)


def test_a_causal_row_writes_on_from_what_stands_before_the_gap(gaps: Gaps) -> None:
    """Greedy continuation, token by token, with the plain forward of the network."""
    backbone = tiny_backbone("llama")
    method = method_of("ar", backbone, tuned=True)
    found = continue_to_gap(method, gaps, seed=0, batch_size=2)
    for ids, tokens in zip(gaps.ids, found.tokens, strict=True):
        written: list[int] = ids[:13].tolist()
        with torch.no_grad():
            for _ in range(6):
                states_BLD = backbone.hidden(torch.tensor([written]), causal=True)
                written.append(int(backbone.logits(states_BLD[0, -1:])[0].argmax()))
        assert tokens.tolist() == written[13:]
    assert found.forwards == (6,) * 5


def test_a_room_that_cannot_fill_says_so() -> None:
    with pytest.raises(NotImplementedError, match="cannot fill in masks"):
        method_of("ar", tiny_backbone("llama"), tuned=True).fill([], [], config(1))


# -- counting ---------------------------------------------------------------------------------------------------------


def oracle(found: Sequence[Tensor], gaps: Gaps) -> tuple[float, float]:
    """Return accuracy, and that against texts of other documents, token by token."""
    own = other = total = compared = 0
    truths = [t.tolist() for t in gaps.truths]
    assert gaps.groups is not None
    for i, tokens in enumerate(f.tolist() for f in found):
        own += sum(a == b for a, b in zip(tokens, truths[i], strict=True))
        total += len(tokens)
        for j, truth in enumerate(truths):
            if gaps.groups[j] != gaps.groups[i]:
                other += sum(a == b for a, b in zip(tokens, truth, strict=True)) / sum(
                    g != gaps.groups[i] for g in gaps.groups
                )
        compared += len(tokens)
    return own / total, other / compared


def test_accuracy_and_its_control_against_a_count_by_hand(gaps: Gaps) -> None:
    generator = torch.Generator().manual_seed(0)
    found = tuple(
        torch.where(torch.rand(6, generator=generator) < 0.5, truth, torch.randint(4, (6,), generator=generator))
        for truth in gaps.truths
    )
    figures = gap_figures(Filling(found, gaps.sizes), gaps)
    own, other = oracle(found, gaps)
    assert figures["accuracy"]["value"] == pytest.approx(own)
    assert figures["accuracy_other"] == pytest.approx(other)
    assert figures["accuracy_gain"]["value"] == pytest.approx(own - other)
    assert figures["accuracy_gain"]["se"] > 0
    assert figures["overlap_1"] >= figures["accuracy"]["value"], "a token at its place is a shared token"


def test_the_truth_is_all_right_and_a_single_text_has_no_control(gaps: Gaps) -> None:
    figures = gap_figures(Filling(gaps.truths, gaps.sizes), gaps)
    assert figures["accuracy"] == {"value": 1.0, "se": 0.0}
    alone = Gaps(gaps.ids[:1], gaps.masks[:1], gaps.sample_ids[:1], (0,))
    figures = gap_figures(Filling(alone.truths, alone.sizes), alone)
    assert (figures["accuracy"]["value"], figures["accuracy_other"], figures["accuracy_gain"]) == (1.0, None, None)
