"""`generate` as its users meet it: batches, EOS, infilling, streaming, errors."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.errors import DllmError
from dllm_core.methods.protocol import GenerationOutput
from dllm_core.methods.random_mask.method import Method
from dllm_core.methods.random_mask.options import Options
from dllm_core.samplers.config import ADAPTIVE_SAMPLERS, SAMPLERS
from dllm_core.samplers.loop import generate
from tests.generation_tools import Recorder, easy, prompts, settings_of
from tests.tiny import NUM_TOKENS, byte_tokenizer, tiny_backbone

settings = settings_of(max_new_tokens=12, max_denoising_steps=5)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone(layers=1)


# -- termination --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SAMPLERS)
def test_every_setting_ends_in_the_promised_forwards_with_nothing_left(backbone: Backbone, rule: str) -> None:
    chooser = random.Random(rule)
    for _ in range(25):
        tokens, size = chooser.randint(1, 30), chooser.choice([None, 1, 3, 7, 16])
        steps = chooser.randint(-(-tokens // (size or tokens)), 40)
        temperature = chooser.choice([0.0, 2.0])
        config = settings(
            max_new_tokens=tokens,
            max_denoising_steps=steps,
            block_size=size,
            temperature=temperature,
            sampler_config=easy(rule),
        )
        out = generate(backbone, prompts(3, 5), config)
        if rule in ADAPTIVE_SAMPLERS:
            assert out.num_forwards <= min(steps, tokens)
        else:
            assert out.num_forwards == min(steps, tokens)
        for sequence, length in zip(out.sequences, (3, 5), strict=True):
            assert len(sequence) == length + tokens
            assert int(sequence.max()) < NUM_TOKENS
        assert out.commit_step is not None
        commits = out.commit_step[0]
        assert int(commits.min()) >= 1
        assert int(commits.max()) <= out.num_forwards
        if rule not in (*ADAPTIVE_SAMPLERS, "p2"):
            assert torch.bincount(commits, minlength=out.num_forwards + 1)[1:].min() >= 1, "a wasted forward"
        if size is not None:
            ends = [int(commits[i : i + size].max()) for i in range(0, tokens, size)]
            starts = [int(commits[i : i + size].min()) for i in range(0, tokens, size)]
            assert all(end < start for end, start in zip(ends, starts[1:], strict=False)), "blocks from left to right"


def test_threshold_needs_fewer_forwards_the_lower_it_is(backbone: Backbone) -> None:
    forwards = [
        generate(
            backbone,
            prompts(4),
            settings(max_denoising_steps=12, sampler_config={"name": "threshold", "threshold": t}),
        ).num_forwards
        for t in (1e-6, 1.0)
    ]
    assert forwards == [1, 12]


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("rule", SAMPLERS)
def test_mixed_lengths_in_a_batch_equal_one_at_a_time(family: str, rule: str, temperature: float) -> None:
    backbone = tiny_backbone(family)
    rows = prompts(9, 2, 14, 9)
    config = settings(sampler_config=rule, temperature=temperature, block_size=5)
    together = generate(backbone, rows, config, sample_ids=[7, 1, 3, 12])
    for row, sample_id in enumerate([7, 1, 3, 12]):
        alone = generate(backbone, [rows[row]], config, sample_ids=[sample_id])
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert together.commit_step is not None
        assert alone.commit_step is not None
        assert torch.equal(together.commit_step[row], alone.commit_step[0])
    assert together.new_tokens == [12] * 4


def test_padding_is_what_makes_the_mask_necessary(backbone: Backbone) -> None:
    """The same rows decoded without lengths give other tokens, so the test above can fail."""
    from dllm_core.backbone import masks

    rows = prompts(9, 2)
    right = generate(backbone, rows, settings())
    plain = masks.document_mask
    masks.document_mask = lambda document_BL, *, causal: torch.ones(2, 1, 21, 21, dtype=torch.bool)
    try:
        wrong = generate(backbone, rows, settings())
    finally:
        masks.document_mask = plain
    assert torch.equal(right.sequences[0], wrong.sequences[0])
    assert not torch.equal(right.sequences[1], wrong.sequences[1])


def test_a_tensor_of_prompts_equals_a_list(backbone: Backbone) -> None:
    rows = prompts(6, 6)
    one, other = (generate(backbone, p, settings()) for p in (rows, torch.stack(rows)))
    assert all(torch.equal(a, b) for a, b in zip(one.sequences, other.sequences, strict=True))


def test_noise_depends_on_seed_and_sample_id_alone(backbone: Backbone) -> None:
    (prompt,) = prompts(5)

    def text(seed: int, sample_id: int) -> list[int]:
        config = settings(temperature=2.0, seed=seed, sampler_config="random")
        return generate(backbone, [prompt], config, sample_ids=[sample_id]).sequences[0].tolist()

    torch.manual_seed(1)
    first = text(0, 0)
    torch.manual_seed(2)
    assert text(0, 0) == first
    assert text(1, 0) != first
    assert text(0, 1) != first


def test_results_can_be_trained_on(backbone: Backbone) -> None:
    """Tensors made in inference mode cannot be saved for backward; the output must not be one of them."""
    (sequence,) = generate(backbone, prompts(4), settings()).sequences
    table = torch.nn.Embedding(NUM_TOKENS, 2)
    table(sequence).sum().backward()
    assert table.weight.grad is not None


# -- infilling ----------------------------------------------------------------------------------------------------


def test_infilling_changes_masked_places_only_and_rows_may_differ(backbone: Backbone) -> None:
    rows = prompts(20, 13)
    masks = [torch.zeros(len(r), dtype=torch.bool) for r in rows]
    masks[0][[4, 5, 6, 10, 19]] = True
    masks[1][[1, 12]] = True
    config = settings(max_denoising_steps=3, temperature=1.0)
    out = generate(backbone, rows, config, infill_mask=masks)
    assert out.new_tokens == [5, 2]
    assert out.num_forwards == 3
    for row, mask, found in zip(rows, masks, out.sequences, strict=True):
        assert torch.equal(found[~mask], row[~mask])
        assert len(found) == len(row)
    alone = generate(backbone, [rows[1]], config, infill_mask=[masks[1]], sample_ids=[1])
    assert alone.num_forwards == 2
    assert torch.equal(alone.sequences[0], out.sequences[1])


def test_a_literal_mask_token_in_the_prompt_is_data(backbone: Backbone) -> None:
    mask_id = backbone.contract.mask_token_id
    prompt = torch.tensor([3, mask_id, 8, mask_id])
    out = generate(backbone, [prompt], settings())
    assert out.sequences[0][:4].tolist() == prompt.tolist()
    assert out.new_tokens == [12]
    assert mask_id not in out.sequences[0][4:].tolist()


def test_nothing_to_fill_makes_no_forward(backbone: Backbone) -> None:
    (prompt,) = prompts(4)
    out = generate(backbone, [prompt], settings(), infill_mask=[torch.zeros(4, dtype=torch.bool)])
    assert (out.num_forwards, out.new_tokens) == (0, [0])
    assert torch.equal(out.sequences[0], prompt)


# -- end of text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["confidence", "p2", "threshold", "factor"])
@pytest.mark.parametrize("block_size", [None, 4])
def test_text_ends_at_the_first_eos_and_the_row_stops_early(
    backbone: Backbone, rule: str, block_size: int | None
) -> None:
    """Which id ends the text is chosen from what the model says anyway, so that something is cut."""
    rows = prompts(5, 8, 3, seed=4)
    base = settings(max_new_tokens=24, max_denoising_steps=24, sampler_config=rule, block_size=block_size)
    full = generate(backbone, rows, base)
    eos = int(full.sequences[0][5 + 6])
    config = settings(**{**base.to_dict(), "stop_at_eos": True, "eos_token_id": eos})
    out = generate(backbone, rows, config)
    for row, (found, whole) in enumerate(zip(out.sequences, full.sequences, strict=True)):
        prompt = len(rows[row])
        new = found[prompt:].tolist()
        if eos in new:
            assert new.index(eos) == len(new) - 1
        if rule != "p2":
            end = whole[prompt:].tolist()
            end = end[: end.index(eos) + 1] if eos in end else end
            assert new == end
        assert out.new_tokens[row] == len(new)
        assert int(found.max()) < NUM_TOKENS
        alone = generate(backbone, [rows[row]], config)
        assert torch.equal(alone.sequences[0], found)
    assert out.new_tokens[0] < 24
    assert generate(backbone, rows[:1], config).num_forwards < 24
    assert out.commit_step is not None
    assert [len(c) for c in out.commit_step] == out.new_tokens


def test_eos_inside_given_text_or_before_it_does_not_cut(backbone: Backbone) -> None:
    (ids,) = prompts(16)
    infill = torch.zeros(16, dtype=torch.bool)
    infill[3:8] = True
    free = generate(backbone, [ids], settings(), infill_mask=[infill])
    eos = int(free.sequences[0][4])
    out = generate(backbone, [ids], settings(stop_at_eos=True, eos_token_id=eos), infill_mask=[infill])
    assert torch.equal(out.sequences[0], free.sequences[0])
    assert out.new_tokens == [5]


def test_the_models_own_eos_is_used(backbone: Backbone) -> None:
    """The tiny config says 0; a model without one never stops."""
    assert backbone.config.eos_token_id == 0
    config = settings(temperature=5.0, stop_at_eos=True, max_new_tokens=40, max_denoising_steps=40)
    outs = [generate(backbone, prompts(4), config, sample_ids=[i]) for i in range(12)]
    short = [o for o in outs if o.new_tokens[0] < 40]
    assert short
    assert all(int(o.sequences[0][-1]) == 0 for o in short)


# -- streaming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SAMPLERS)
@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("eos", [False, True])
def test_streamed_equals_returned(backbone: Backbone, rule: str, block_size: int | None, eos: bool) -> None:
    (prompt,) = prompts(6)
    config = settings(
        sampler_config=rule, block_size=block_size, temperature=4.0, stop_at_eos=eos, eos_token_id=(0, 5, 9, 30, 31)
    )
    recorder = Recorder()
    out = generate(backbone, [prompt], config, streamer=recorder)
    assert recorder.final == out.sequences[0].tolist()
    assert recorder.ended
    assert len(recorder.drafts) == out.num_forwards
    assert all(token < NUM_TOKENS for draft in recorder.drafts for token in draft)
    assert recorder.puts >= 2
    if block_size and not eos:
        assert recorder.puts == 1 + 3, "the prompt and each block as it becomes final"


def test_transformers_streamer_prints_the_text(backbone: Backbone, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextDiffusionStreamer

    tokenizer = byte_tokenizer()
    prompt = torch.tensor(tokenizer("Fellow citizens").input_ids)
    out = generate(
        backbone, [prompt], settings(block_size=4), streamer=TextDiffusionStreamer(tokenizer, skip_prompt=True)
    )
    shown = capsys.readouterr().out.rsplit("\033[J", 1)[1]
    assert tokenizer.decode(out.sequences[0][len(prompt) :]).endswith(shown.rstrip("\n"))


def test_drafts_show_what_stands_and_what_is_proposed(backbone: Backbone) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    rows = prompts(4, 7)
    out = generate(backbone, rows, settings(block_size=6), on_draft=lambda c, d: seen.append((c.clone(), d.clone())))
    assert len(seen) == out.num_forwards
    for canvas, committed in seen:
        for row, sequence in enumerate(out.sequences):
            stands = committed[row, : len(sequence)]
            assert torch.equal(canvas[row, : len(sequence)][stands], sequence[stands])
    canvas, committed = seen[-1]
    assert committed.sum(-1).tolist() == [16, 19]
    assert not committed[0, 16:].any(), "padding never stands"
    assert (seen[0][0][0, 10:16] == backbone.contract.mask_token_id).all(), "the second block is not drafted yet"


# -- measurements -------------------------------------------------------------------------------------------------


def test_first_token_comes_before_the_end(backbone: Backbone) -> None:
    out = generate(backbone, prompts(4), settings(max_denoising_steps=12))
    assert isinstance(out, GenerationOutput)
    assert out.first_token_s > 0
    assert out.tokens_per_forward == 1.0


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "infill", "problem"),
    [
        ([], {}, None, "no row to decode"),
        ([torch.ones(1, 4, dtype=torch.long)], {}, None, "Row 0 has shape (1, 4)"),
        ("My fellow citizens", {}, None, "str is no batch of token ids"),
        ({"input_ids": torch.ones(1, 4).long()}, {}, None, "dict is no batch of token ids"),
        (None, {}, None, "NoneType is no batch"),
        (torch.tensor(4), {}, None, "Tensor is no batch"),
        ([[1, 2, 3]], {}, None, "Row 0 is a list"),
        (torch.ones(1, 4), {}, None, "Row 0 holds torch.float32"),
        ([torch.ones(4).long()], {}, [[False, True, True, False]], "infill mask is no tensor"),
        ([torch.tensor([], dtype=torch.long)], {}, None, "no token at position 0"),
        ([torch.tensor([1, 500])], {}, None, "id 500 lies outside"),
        ([torch.tensor([1, -1])], {}, None, "id -1 lies outside"),
        ([torch.ones(60, dtype=torch.long)], {}, None, "does not fit the model, which has 64"),
        ([torch.ones(4, dtype=torch.long)], {"block_size": 2}, None, "too few for 6 blocks"),
        ([torch.ones(4, dtype=torch.long)], {}, [torch.ones(4)], "no token at position 0"),
        ([torch.ones(4, dtype=torch.long)], {}, [torch.ones(5)], "does not fit the ids"),
        ([torch.ones(4, dtype=torch.long)], {}, [torch.ones(4), torch.ones(4)], "does not fit the ids"),
    ],
)
def test_what_cannot_be_decoded_is_refused(
    backbone: Backbone, rows: Any, options: dict[str, Any], infill: Any, problem: str
) -> None:
    cell = Method(backbone, Options())
    for decode in (partial(generate, backbone), cell.generate):
        with pytest.raises(DllmError) as caught:
            decode(rows, settings(**options), infill_mask=infill)
        first, second = str(caught.value).split("\n")
        assert problem in first
        assert second


def test_settings_of_another_kind_and_ids_that_do_not_count_are_refused(backbone: Backbone) -> None:
    cell = Method(backbone, Options())
    with pytest.raises(DllmError, match="A dict does not say how to denoise"):
        cell.generate(prompts(3), {"max_new_tokens": 4})  # type: ignore[arg-type]
    with pytest.raises(DllmError, match="1 sample ids do not name 2 rows"):
        cell.generate(prompts(3, 4), settings(), sample_ids=[7])


def test_a_streamer_takes_one_row(backbone: Backbone) -> None:
    with pytest.raises(DllmError, match="not a batch of 2"):
        generate(backbone, prompts(3, 3), settings(), streamer=Recorder())
