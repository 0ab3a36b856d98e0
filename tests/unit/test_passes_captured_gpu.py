"""Captured passes on a GPU: what `test_captured_pass.py` shows with graphs played on a CPU, with real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.backbone import masks
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.passes import captured, choice, joined_weights
from dllm_core.backbone.passes.captured import CapturedPass
from dllm_core.backbone.slot_cache import SlotCache
from dllm_core.layers.compiling import can_compile
from dllm_core.samplers import loop
from dllm_core.samplers.config import ADAPTIVE_SAMPLERS, SAMPLERS, DiffusionGenerationConfig
from tests.decoder_models import GATED, modules
from tests.tiny import NUM_TOKENS, tiny_backbone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
COMPILING = ("never", "always") if can_compile(torch.device("cuda")) is None else ("never",)
ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative to the modules' states; in fp32 the order of additions, else roundings of three blocks."""


def model(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Backbone:
    # heads of 16 and 32 and a width of 128, so that the kernels for aligned heads serve
    return tiny_backbone(kind, layers=3, hidden=128, max_length=256, **options).to(dtype).to("cuda")


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(NUM_TOKENS, shape, generator=torch.Generator().manual_seed(seed)).to("cuda")


def passes(backbone: Backbone, compiling: str = "never") -> CapturedPass:
    found = choice.pass_for(backbone, compiling=compiling)
    assert isinstance(found, CapturedPass), choice.obstacle(backbone)
    assert found.parts.compiled == (compiling == "always")
    return found


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < ERROR[found.dtype], float(error)


def num_graphs(run: CapturedPass) -> int:
    return sum(kept._graph is not None for kept in run.captures._recordings.values())


@contextmanager
def without_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiling", COMPILING)
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("batch", [1, 3])
def test_states_are_those_of_the_modules(kind: str, dtype: torch.dtype, batch: int, compiling: str) -> None:
    backbone = model(kind, dtype)
    run, length = passes(backbone, compiling), 37
    documents = torch.zeros(batch, length, dtype=torch.long, device="cuda")
    documents[-1, length // 2 :] = -1
    for seed in range(4):
        canvas, asked = ids(batch, length, seed=seed), torch.arange(3, length, 3 + seed, device="cuda")
        for mask in (None, masks.document_mask(documents, causal=False)):
            options = {"attention_mask_B1LM": mask}
            close(run(canvas, row_M=asked, **options), modules(backbone, canvas, asked, **options))
            found, expected = run(canvas, **options), modules(backbone, canvas, **options)
            seen = documents >= 0 if mask is not None else documents >= -1
            close(found[seen], expected[seen])
    assert num_graphs(run) == 4


@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("kind", GATED)
def test_states_from_a_cache_are_those_of_the_modules(kind: str, dtype: torch.dtype) -> None:
    backbone = model(kind, dtype)
    run = passes(backbone)
    for seed in range(3):
        expecting, cache = (SlotCache(backbone.num_layers, 100) for _ in range(2))
        for step, (at, visible) in enumerate([(0, None), (32, None), (32, 96), (64, None), (16, 96)]):
            tokens = ids(2, 32, seed=10 * seed + step)
            expected = modules(backbone, tokens, cache=expecting.at(at, visible=visible))
            close(run(tokens, cache=cache.at(at, visible=visible)), expected)
        del cache
    assert num_graphs(run) == 1


@pytest.mark.parametrize("compiling", COMPILING)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "delayed", "exact"])
@pytest.mark.parametrize("prompts", [(20,), (20, 9, 33)], ids=["alone", "batch"])
def test_decodes_are_those_of_the_modules(
    cache: str, prompts: tuple[int, ...], compiling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = model("qwen3", model_block=8 if cache == "exact" else None)
    config = DiffusionGenerationConfig(
        max_new_tokens=32,
        max_denoising_steps=16,
        block_size=8,
        cache=cache,  # type: ignore[arg-type]
        stop_at_eos=False,
        compile=compiling,
    )
    for seed in range(3):
        rows, found = [ids(n, seed=seed + n).cpu() for n in prompts], []
        for kernels in ("auto", "reference"):
            monkeypatch.setenv("DLLM_KERNELS", kernels)
            found.append([s.tolist() for s in loop.generate(backbone, rows, config).sequences])
        assert found[0] == found[1]
    monkeypatch.setenv("DLLM_KERNELS", "auto")
    assert num_graphs(passes(backbone, compiling)) > 0


@pytest.mark.parametrize("cache", ["none", "prefix", "exact"])
def test_a_step_of_a_fixed_schedule_does_not_wait(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third decode on: the first launches and compiles, the second records."""
    backbone = model("qwen3", torch.bfloat16, model_block=8 if cache == "exact" else None)
    advance, watched = loop.Decoding.advance, False

    def watching(decoding: loop.Decoding, step: Any) -> Tensor:
        if not watched:
            return advance(decoding, step)
        with without_waiting():
            return advance(decoding, step)

    monkeypatch.setattr(loop.Decoding, "advance", watching)
    rows = [ids(20).cpu(), ids(9).cpu()]
    for rule in sorted(set(SAMPLERS) - ADAPTIVE_SAMPLERS):
        for round_ in range(3):
            watched = round_ == 2
            config = DiffusionGenerationConfig(
                max_new_tokens=32,
                max_denoising_steps=16,
                block_size=8,
                sampler_config=rule,  # type: ignore[arg-type]
                cache=cache,  # type: ignore[arg-type]
                stop_at_eos=False,
                compile="never",
            )
            loop.generate(backbone, rows, config)


def test_shapes_are_let_go_and_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "KEPT_SHAPES", 2)
    backbone = model("llama")
    run = passes(backbone)
    for round_ in range(3):
        for length in (24, 40, 64):
            for seed in range(3):
                canvas = ids(1, length, seed=10 * round_ + seed)
                close(run(canvas), modules(backbone, canvas))
    assert num_graphs(run) == 2


def test_a_result_belongs_to_the_caller() -> None:
    backbone = model("llama", torch.bfloat16)
    run, results = passes(backbone), []
    for seed in range(4):
        for length in (24, 40):
            canvas = ids(1, length, seed=seed)
            results.append((run(canvas), modules(backbone, canvas)))
            canvas.zero_()
    for found, expected in results:
        close(found, expected)


def test_streams_take_turns() -> None:
    backbone = model("llama")
    run = passes(backbone)
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for seed in range(20):
        canvas = ids(4, 64, seed=seed)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[seed % 2]):
            results.append((canvas, run(canvas)))
    torch.cuda.synchronize()
    for canvas, found in results:
        close(found, modules(backbone, canvas))


@pytest.mark.parametrize("largest", [0, joined_weights.LARGEST_COPY["cuda"]])
def test_changed_weights_are_read_anew(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(joined_weights.LARGEST_COPY, "cuda", largest)
    backbone, canvas = model("qwen3"), ids(1, 24)
    optimiser = torch.optim.AdamW(backbone.parameters(), lr=0.02)
    before: Tensor | None = None
    for _ in range(3):
        for _ in range(3):
            found = passes(backbone)(canvas)
            close(found, modules(backbone, canvas))
        assert before is None or float((found - before).norm() / before.norm()) > 10 * ERROR[torch.float32]
        before = found
        backbone.logits(backbone.hidden(ids(2, 7), causal=False))[..., :NUM_TOKENS].square().mean().backward()
        optimiser.step()
    backbone.layers[0].self_attn.q_proj.weight.data.mul_(1.5)
    close(passes(backbone)(canvas), modules(backbone, canvas))
