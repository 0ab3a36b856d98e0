"""Captured passes against transformers' modules, with graphs played on a CPU (`tests/tape_graph.py`)."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_core.backbone import ar_decode, masks
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.passes import captured, choice, joined_weights, recording
from dllm_core.backbone.passes.captured import CapturedPass, Captures
from dllm_core.backbone.passes.joined_weights import Joined
from dllm_core.backbone.passes.plain import PlainPass
from dllm_core.backbone.slot_cache import SlotCache
from dllm_core.errors import DllmError
from dllm_core.kernels import dispatch
from dllm_core.layers import gated_parts
from dllm_core.methods.protocol import SamplingRequest
from dllm_core.samplers import denoisers
from dllm_core.samplers.config import SAMPLERS, DiffusionGenerationConfig
from dllm_core.samplers.loop import generate
from tests.decoder_models import (
    CHANGES,
    GATED,
    VARIANTS,
    attention_masks,
    close,
    decoder,
    decodes_beside_training,
    in_place,
    modules,
)
from tests.tape_graph import RefusingRecorder, TapeRecorder
from tests.tiny import NUM_TOKENS, tiny_backbone


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(NUM_TOKENS, shape, generator=torch.Generator().manual_seed(seed))


def passes(backbone: Backbone, recorder: TapeRecorder | None = None) -> tuple[CapturedPass, TapeRecorder]:
    recorder = recorder or TapeRecorder()
    return CapturedPass(backbone, Captures(Joined(backbone), recorder), gated_parts.eager()), recorder


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    """Decode through graphs played on a CPU, chosen as they are on a GPU."""
    recorder = TapeRecorder()

    def pass_for(backbone: Backbone, *, quick: bool = True, compiling: str = "auto") -> Any:
        if not quick or choice.obstacle(backbone) or joined_weights.obstacle(backbone):
            return PlainPass(backbone)
        captures = choice.captures_of(backbone)
        captures.recorder = recorder
        return choice.joined_pass_for(backbone, compiling)

    monkeypatch.setattr(denoisers, "pass_for", pass_for)
    return recorder


# -- the same states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [*GATED, *VARIANTS])
def test_states_are_those_of_the_modules(kind: str, batch: int, copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """First launched, then recorded, then replayed on other tokens, rows and masks."""
    monkeypatch.setitem(joined_weights.LARGEST_COPY, "cpu", 2**31 if copies else 0)
    backbone = decoder(kind)
    run, recorder = passes(backbone)
    assert len(run.captures.weights.blocks[0].heads) == (1 if copies else 3)
    for seed in range(4):
        canvas = ids(batch, 11, seed=seed)
        asked = torch.tensor([seed, 10, 3, batch * 11 - 1])[: 4 - seed]
        for mask in attention_masks(batch, 11):
            options = {"attention_mask_B1LM": mask}
            close(run(canvas, **options), modules(backbone, canvas, **options))
            close(run(canvas, row_M=asked, **options), modules(backbone, canvas, asked, **options))
    assert recorder.replays > recorder.records > 0


@pytest.mark.parametrize("packs", [True, False])
def test_without_reordering_the_states_are_the_same(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: gate and up are one product there."""
    monkeypatch.setattr(joined_weights, "reorders", lambda dtype: packs)
    monkeypatch.setattr("dllm_core.layers.packed_linear.reorders", lambda dtype: packs)
    for kind in (*GATED, "biases"):
        backbone = decoder(kind)
        run, _ = passes(backbone)
        assert len(run.captures.weights.blocks[0].inner) == (2 if packs else 1)
        for seed in range(3):
            canvas = ids(2, 11, seed=seed)
            close(run(canvas), modules(backbone, canvas))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_order_of_shapes_gives_what_the_modules_do(data: Any) -> None:
    """Shapes come, go and come back, behind masks and without; graphs share their memory throughout."""
    backbone = tiny_backbone(data.draw(st.sampled_from(GATED)))
    run, _ = passes(backbone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "KEPT_SHAPES", data.draw(st.integers(1, 4)))
        for seed in range(data.draw(st.integers(4, 16))):
            batch, length = data.draw(st.sampled_from([(1, 7), (2, 7), (2, 8), (1, 40), (3, 33)]))
            canvas, mask = ids(batch, length, seed=seed), data.draw(st.sampled_from(attention_masks(batch, length)))
            row = data.draw(st.lists(st.integers(0, batch * length - 1), max_size=30))
            asked = torch.tensor(row) if row else None
            found = run(canvas, row_M=asked, attention_mask_B1LM=mask)
            close(found, modules(backbone, canvas, asked, attention_mask_B1LM=mask))


def test_bf16_is_as_close_to_float64_as_the_modules_are() -> None:
    for kind in GATED:
        backbone = decoder(kind).to(torch.bfloat16)
        exact, errors = copy.deepcopy(backbone).double(), torch.zeros(2, dtype=torch.float64)
        run, _ = passes(backbone)
        for seed in range(12):
            canvas = ids(3, 13, seed=seed)
            for mask in attention_masks(3, 13):
                expected = modules(exact, canvas, attention_mask_B1LM=mask)
                usual = modules(backbone, canvas, attention_mask_B1LM=mask)
                found = run(canvas, attention_mask_B1LM=mask)
                errors += torch.stack([(x.double() - expected).square().sum() for x in (found, usual)])
        assert errors[0] < 1.3 * errors[1], kind


def test_a_result_belongs_to_the_caller() -> None:
    """What is replayed next, of this shape or another, leaves it alone; and so do other inputs."""
    backbone = decoder("llama")
    run, _ = passes(backbone)
    results = []
    for seed in range(5):
        for length in (7, 9):
            canvas, asked = ids(1, length, seed=seed), torch.tensor([1, 4])
            results.append((run(canvas, row_M=asked), modules(backbone, canvas, asked)))
            results.append((run(canvas), modules(backbone, canvas)))
            canvas.zero_()
    for found, expected in results:
        close(found, expected)


# -- how many graphs --------------------------------------------------------------------------------------------------


def test_one_graph_serves_a_decode_whose_rows_become_fewer() -> None:
    backbone = decoder("llama")
    run, recorder = passes(backbone)
    for count in (20, 17, 16, 9, 1):
        canvas, asked = ids(1, 24, seed=count), torch.arange(24)[-count:]
        close(run(canvas, row_M=asked), modules(backbone, canvas, asked))
    assert (recorder.records, recorder.replays) == (1, 4)
    run(ids(1, 24), row_M=torch.arange(24).repeat(2))
    assert len(run.captures._recordings) == 2, "more rows than the graph reads need another"


def test_a_lone_pass_records_nothing_and_old_shapes_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "KEPT_SHAPES", 2)
    run, recorder = passes(tiny_backbone("llama"))
    for length in (5, 6, 7):
        run(ids(1, length))
    assert (recorder.records, recorder.waits) == (0, 1)
    gone = weakref.ref(next(iter(run.captures._recordings.values())))
    for length in (7, 7, 8):
        run(ids(1, length))
    assert recorder.records == 1
    assert gone() is None, "its graph and buffers go with it"


def test_masked_lengths_share_a_graph() -> None:
    """Padding that nobody sees; a batch's rows lie further apart in it."""
    backbone = decoder("qwen3")
    run, recorder = passes(backbone)
    for length in (13, 32, 20, 13, 31):
        for batch in (1, 2):
            canvas, mask = ids(batch, length, seed=length), attention_masks(batch, length)[3]
            asked = torch.tensor([2, batch * length - 1])
            options = {"attention_mask_B1LM": mask}
            close(run(canvas, row_M=asked, **options), modules(backbone, canvas, asked, **options))
            close(run(canvas, **options), modules(backbone, canvas, **options))
    assert recorder.records == 4, "rows asked for or not, one row or two"


def test_long_passes_are_launched_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MOST_TOKENS", 10)
    backbone = tiny_backbone("llama")
    run, recorder = passes(backbone)
    for seed in range(3):
        canvas = ids(2, 6, seed=seed)
        close(run(canvas), modules(backbone, canvas))
    assert recorder.records == 0


def test_a_device_that_records_nothing_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    backbone = tiny_backbone("llama")
    run, recorder = passes(backbone, RefusingRecorder())
    dispatch.announce.cache_clear()
    with caplog.at_level("INFO", dispatch.__name__):
        for seed in range(4):
            canvas = ids(1, 6 + seed % 2, seed=seed)
            close(run(canvas), modules(backbone, canvas))
    assert recorder.records == 1
    assert caplog.messages == [
        "decoder graph runs its launched implementation (operation not permitted when stream is capturing)"
    ]


# -- caches -----------------------------------------------------------------------------------------------------------


def windows() -> list[tuple[Any, int | None, Tensor | None, Tensor | None]]:
    """Return (slots, visible, positions, mask): stretches and scattered rows, each behind what came before."""
    scattered = torch.stack((torch.arange(3, 8), torch.arange(9, 14)))
    some = torch.rand(2, 1, 5, 16, generator=torch.Generator().manual_seed(1)) < 0.7
    some[..., 0] = True
    return [
        (0, 9, torch.arange(9)[None], None),
        (9, 16, torch.arange(9, 16)[None], None),
        (9, None, torch.arange(9, 14)[None], None),
        (9, 16, torch.arange(9, 14)[None], some),
        (4, 11, torch.arange(4, 9)[None], some[:1, :, :, :11]),
        (scattered, None, scattered, some),
        (scattered, None, scattered, None),
        (torch.arange(2, 7), 12, torch.arange(2, 7)[None], None),
        (9, None, None, None),
        (2, None, None, None),
    ]


@pytest.mark.parametrize("kind", GATED)
def test_states_from_a_cache_are_those_of_the_modules(kind: str) -> None:
    backbone = decoder(kind)
    run, recorder = passes(backbone)
    for seed in range(3):
        expecting, cache = (SlotCache(backbone.num_layers, 16) for _ in range(2))
        for step, (at, visible, position, mask) in enumerate(windows()):
            length = {0: 9, 1: 7}.get(step, 5)
            tokens = ids(2, length, seed=10 * seed + step)
            options: dict[str, Any] = {"position_BL": position, "attention_mask_B1LM": mask}
            expected = modules(backbone, tokens, cache=expecting.at(at, visible=visible), **options)
            close(run(tokens, cache=cache.at(at, visible=visible), **options), expected)
        for one, other in zip(expecting.layers, cache.layers, strict=True):
            close(other.keys, one.keys)
            close(other.values, one.values)
        del cache
    assert recorder.replays > 20
    assert recorder.records == 3, "lengths 9, 7 and 5: slots, visible ones and masks are inputs"


def test_two_caches_at_a_time_do_not_mix() -> None:
    """The second has no buffers of the graphs', nor gets any later: what it holds would be lost."""
    backbone = decoder("llama")
    run, recorder = passes(backbone)
    pairs = [tuple(SlotCache(backbone.num_layers, 12) for _ in range(2)) for _ in range(2)]
    for step in range(5):
        for which, (expecting, cache) in enumerate(pairs):
            tokens = ids(1, 4, seed=2 * step + which)
            at = 2 * step
            close(run(tokens, cache=cache.at(at)), modules(backbone, tokens, cache=expecting.at(at)))
    assert recorder.records == 1
    expecting, cache = pairs.pop()
    pairs.clear()
    tokens = ids(1, 4, seed=99)
    close(run(tokens, cache=cache.at(8, visible=12)), modules(backbone, tokens, cache=expecting.at(8, visible=12)))


def test_a_cache_finds_nothing_that_another_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a slot held, nan included: weights of 0 do not make nan 0."""
    backbone = decoder("llama")
    run, recorder = passes(backbone)
    for seed in range(4):
        expecting, cache = (SlotCache(backbone.num_layers, 12) for _ in range(2))
        tokens = ids(2, 4, seed=seed)
        expected = modules(backbone, tokens, cache=expecting.at(0, visible=10))
        close(run(tokens, cache=cache.at(0, visible=10)), expected)
        for layer in cache.layers:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
        del cache, layer
    assert (recorder.records, recorder.replays) == (1, 3), "the buffers are lent again"


def test_a_cache_of_fewer_rows_goes_on_by_itself() -> None:
    backbone = decoder("llama")
    run, _ = passes(backbone)
    expecting, cache = (SlotCache(backbone.num_layers, 12) for _ in range(2))
    for found in (cache, expecting):
        run_or_modules = run if found is cache else PlainPass(backbone)
        with torch.no_grad():
            run_or_modules(ids(3, 6), cache=found.at(0))
        found.keep_rows(torch.tensor([2, 0]))
    tokens = ids(2, 5, seed=4)
    close(run(tokens, cache=cache.at(6)), modules(backbone, tokens, cache=expecting.at(6)))


def test_stores_are_let_go_with_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "KEPT_STORES", 1)
    backbone = decoder("llama")
    run, _ = passes(backbone)
    small, large = SlotCache(backbone.num_layers, 12), SlotCache(backbone.num_layers, 80)
    expecting = SlotCache(backbone.num_layers, 12)
    run(ids(1, 4), cache=small.at(0))
    modules(backbone, ids(1, 4), cache=expecting.at(0))
    gone = weakref.ref(next(iter(run.captures._stores.values())))
    run(ids(1, 4), cache=large.at(0))
    assert gone() is None
    tokens = ids(1, 4, seed=1)
    close(run(tokens, cache=small.at(4)), modules(backbone, tokens, cache=expecting.at(4)))


# -- weights that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_read_anew(
    change: Any, packs: bool, played: TapeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_weights, "reorders", lambda dtype: packs)
    backbone, canvas = tiny_backbone("qwen3"), ids(1, 9)
    for _ in range(3):
        before = denoisers.pass_for(backbone)(canvas)
    assert choice.captures_of(backbone) is choice.captures_of(backbone)
    assert (played.records, played.replays) == (1, 2)
    change(backbone)
    for _ in range(3):
        after = denoisers.pass_for(backbone)(canvas)
        close(after, modules(backbone, canvas))
    assert not torch.allclose(before, after, atol=1e-3)


def test_training_between_decodes_shows(played: TapeRecorder) -> None:
    found = decodes_beside_training(tiny_backbone("llama"))
    assert found[0] != found[1]
    assert played.records == 3


def test_graphs_belong_to_nobody_else(played: TapeRecorder) -> None:
    backbone, canvas = tiny_backbone("llama"), ids(1, 9)
    names = set(backbone.state_dict())
    for _ in range(2):
        denoisers.pass_for(backbone)(canvas)
    other = copy.deepcopy(backbone)
    assert set(backbone.state_dict()) == names
    in_place(other)
    for _ in range(2):
        close(denoisers.pass_for(other)(canvas), modules(other, canvas))
        close(denoisers.pass_for(backbone)(canvas), modules(backbone, canvas))
    gone = weakref.ref(choice.captures_of(backbone))
    del backbone
    played.graphs.clear()
    gc.collect()
    assert gone() is None


# -- whole decodes ----------------------------------------------------------------------------------------------------

DECODES: tuple[dict[str, Any], ...] = (
    {},
    {"block_size": 4},
    {"temperature": 0.9, "top_p": 0.9},
    {"guidance_scale": 2.0},
    {"cache": "prefix", "block_size": 4},
    {"cache": {"kind": "dual", "refresh_every": 2}, "block_size": 4},
    {"cache": "delayed", "measure_drift": True},
    {"cache": "exact", "block": 4},
    {"block": 4},
)


@pytest.mark.parametrize("options", DECODES, ids=lambda o: " ".join(map(str, o)) or "plain")
@pytest.mark.parametrize("prompts", [(5,), (5, 9, 2)], ids=["alone", "batch"])
def test_decodes_are_those_of_the_modules(
    options: dict[str, Any], prompts: tuple[int, ...], played: TapeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone("qwen3", model_block=options.get("block"))
    chosen = {"max_new_tokens": 12, "max_denoising_steps": 6, "stop_at_eos": False}
    chosen |= {key: value for key, value in options.items() if key != "block"}
    outputs: dict[str, list[Any]] = {"auto": [], "reference": []}
    for round_ in range(2):
        rows = [ids(n, seed=10 * round_ + n) for n in prompts]
        for kernels, found in outputs.items():
            monkeypatch.setenv("DLLM_KERNELS", kernels)
            for rule in sorted(SAMPLERS):
                out = generate(backbone, rows, DiffusionGenerationConfig(sampler_config=rule, **chosen))
                found.append(([s.tolist() for s in out.sequences], out.num_forwards))
    assert outputs["auto"] == outputs["reference"]
    assert played.replays > played.records > 0


def test_left_to_right_decodes_are_those_of_the_modules(played: TapeRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token a pass, slots and positions that differ, and a prompt that is run once."""
    monkeypatch.setattr(ar_decode, "pass_for", denoisers.pass_for)
    for kind in GATED:
        backbone = decoder(kind)
        request = SamplingRequest(max_new_tokens=9, num_steps=1, stop_at_eos=False)
        for seed in range(2):
            rows, found = [ids(n, seed=seed) for n in (5, 9, 2)], []
            for kernels in ("auto", "reference"):
                monkeypatch.setenv("DLLM_KERNELS", kernels)
                found.append([s.tolist() for s in ar_decode.decode(backbone, rows, request).sequences])
            assert found[0] == found[1]
            monkeypatch.setenv("DLLM_KERNELS", "auto")
    assert played.replays > 6 * played.records > 0


def test_a_decode_verifies_itself(played: TapeRecorder) -> None:
    backbone = tiny_backbone("llama", model_block=4)
    for cache in ("none", "exact", "exact"):
        config = DiffusionGenerationConfig(max_new_tokens=12, max_denoising_steps=6, cache=cache, verify=True)  # type: ignore[arg-type]
        generate(backbone, [ids(5), ids(9)], config)
    assert played.replays > 0


# -- stepping aside ---------------------------------------------------------------------------------------------------


def _mixed(backbone: Backbone) -> None:
    backbone.layers[0].input_layernorm.to(torch.float64)


def _positions_by_length(backbone: Backbone) -> None:
    backbone.decoder.rotary_emb.rope_type = "dynamic"  # type: ignore[union-attr, assignment]


@pytest.mark.parametrize(
    ("change", "reason"), [(_mixed, "differ in dtype"), (_positions_by_length, "depend on the length")]
)
def test_it_steps_aside_where_it_would_not_give_the_same(change: Any, reason: str) -> None:
    backbone = tiny_backbone("llama")
    assert joined_weights.obstacle(backbone) is None
    change(backbone)
    assert reason in str(joined_weights.obstacle(backbone))
    with pytest.raises(DllmError, match=reason):
        choice.pass_for(backbone, compiling="always")


def test_the_reference_is_the_reference_whatever_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLLM_KERNELS", "reference")
    for compiling in ("auto", "never", "always"):
        assert isinstance(choice.pass_for(tiny_backbone("llama"), compiling=compiling), PlainPass)


def test_longer_than_the_model_or_the_cache_is_refused() -> None:
    backbone = tiny_backbone("llama")
    run, _ = passes(backbone)
    with pytest.raises(DllmError, match="does not fit the model"):
        run(ids(1, 65))
    with pytest.raises(DllmError, match="do not fit a cache"):
        run(ids(1, 5), cache=SlotCache(backbone.num_layers, 8).at(4))


def test_positions_are_the_slots_where_none_are_given() -> None:
    """And without a cache given positions are launched as they come."""
    backbone = tiny_backbone("llama")
    run, recorder = passes(backbone)
    positions = torch.tensor([[3, 1, 4, 1, 5]])
    for seed in range(3):
        canvas = ids(2, 5, seed=seed)
        close(run(canvas, position_BL=positions), modules(backbone, canvas, position_BL=positions))
    assert recorder.records == 0


def test_what_serves_what() -> None:
    shape = recording.Shape(1, 8, 32, None, None, False, "")
    assert shape.serves(shape._replace(rows=16))
    assert not shape.serves(shape._replace(rows=64))
    assert not shape.serves(shape._replace(rows=None))
    assert not shape._replace(rows=None).serves(shape)
    for other in (shape._replace(length=7), shape._replace(compiled=True), shape._replace(masks=1)):
        assert not shape.serves(other)


def test_padding_sees_itself_and_nobody_else() -> None:
    """Else a query of padding would be nan, and nan in a key survives a weight of 0."""
    backbone = tiny_backbone("llama")
    run, _ = passes(backbone)
    mask = masks.document_mask(torch.zeros(1, 9, dtype=torch.long), causal=False)
    for length in (9, 5, 9):
        run(ids(1, length), attention_mask_B1LM=mask[:, :, :length, :length])
        (kept,) = run.captures._recordings.values()
        expected = torch.eye(32, dtype=torch.bool)
        expected[:length, :length] = True
        assert kept.mask_B1LM is not None
        assert torch.equal(kept.mask_B1LM[0, 0], expected)
