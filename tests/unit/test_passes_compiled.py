"""The element-wise parts of a pass against float64, compiled and not; and when they are compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.backbone.passes import choice
from dllm_core.backbone.passes.captured import CapturedPass, Captures
from dllm_core.backbone.passes.joined import JoinedPass
from dllm_core.backbone.passes.joined_weights import Joined
from dllm_core.backbone.passes.quick import QuickPass
from dllm_core.errors import DllmError
from dllm_core.kernels import dispatch
from dllm_core.layers import compiling, gated_parts
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.loop import generate
from tests.decoder_models import GATED, close
from tests.tape_graph import TapeRecorder
from tests.tiny import tiny_backbone
from tests.unit.test_passes_quick import ids

CPU = torch.device("cpu")
EPS = 1e-5
UNCOMPILED = dataclasses.replace(gated_parts.eager(), turned=gated_parts.turned_fused)
"""What is compiled, as written."""


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> compiling.Spending:
    """Start from nothing spent, and leave it so."""
    found = compiling.Spending()
    for module in (compiling, choice):
        monkeypatch.setattr(module, "SPENT", found)
    return found


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take the parts as they are written where compiled ones are asked for; count how often."""
    asked: list[int] = []
    parts = dataclasses.replace(UNCOMPILED, compiled=True)
    monkeypatch.setattr(gated_parts, "compiled", lambda: (asked.append(1), parts)[1])
    return asked


def heads(batch: int, length: int, count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    joint_BLNH = torch.randn(batch, length, count + 1, width, generator=generator)
    angle_BL1H = 9 * torch.rand(batch, length, 1, width // 2, generator=generator).repeat(1, 1, 1, 2)
    sign_H = torch.cat((-torch.ones(width // 2), torch.ones(width // 2)))
    return joint_BLNH[:, :, :count], angle_BL1H.cos(), angle_BL1H.sin() * sign_H, torch.rand(count, width) + 0.5


def exact_turn(x_BLNH: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> Tensor:
    """Turn each pair of a head by itself, in float64."""
    x_BLNH, cos, sin = (t.double() for t in (x_BLNH, cos, sin))
    if weight is not None:
        x_BLNH = x_BLNH / (x_BLNH.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    half = x_BLNH.shape[-1] // 2
    out = torch.empty_like(x_BLNH)
    for i in range(half):
        c, s = cos[..., i], sin[..., i + half]
        a, b = x_BLNH[..., i], x_BLNH[..., i + half]
        out[..., i], out[..., i + half] = a * c - b * s, b * c + a * s
    return out.transpose(1, 2)


def check(parts: gated_parts.Parts, dtype: torch.dtype, tolerance: float) -> None:
    for seed, (batch, length, count, width) in enumerate([(1, 7, 3, 8), (1, 12, 3, 8), (3, 5, 3, 8), (2, 9, 3, 8)]):
        x, cos, sin, weight = (t.to(dtype) for t in heads(batch, length, count, width, seed))
        for norm in (None, weight, weight[0]):
            found = parts.turned(x, cos, sin, norm, EPS)
            assert found.is_contiguous()
            assert found.dtype == dtype
            expected = exact_turn(x, cos, sin, norm)
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        joint_R = torch.randn(batch * length, 2 * width, generator=torch.Generator().manual_seed(seed)).to(dtype)
        gate, up = joint_R.chunk(2, dim=-1)
        expected = gate.double() * torch.sigmoid(gate.double()) * up.double()
        torch.testing.assert_close(parts.gated(gate, up).double(), expected, rtol=tolerance, atol=tolerance)
        wide = joint_R.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double().flatten()[: 2 * width]
        found = parts.normed(joint_R, weight.flatten()[: 2 * width], EPS)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


TOLERANCES = [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("parts", [gated_parts.eager(), UNCOMPILED], ids=["eager", "fused"])
def test_parts_are_what_they_say(parts: gated_parts.Parts, dtype: torch.dtype, tolerance: float) -> None:
    check(parts, dtype, tolerance)


def test_the_tables_are_transformers_rotation() -> None:
    backbone = tiny_backbone("llama")
    positions = torch.tensor([[4, 0, 63], [7, 7, 1]])
    cos_BLH, sin_BLH = backbone.decoder.rotary_emb(torch.zeros(1), positions)  # type: ignore[operator]
    x_BLNH = torch.randn(2, 3, 4, 8)
    first, second = x_BLNH.chunk(2, -1)
    expected = x_BLNH * cos_BLH[:, :, None] + torch.cat((-second, first), -1) * sin_BLH[:, :, None]
    found = gated_parts.eager().turned(x_BLNH, *Joined(backbone).rotations.at(positions), None, EPS)
    torch.testing.assert_close(found, expected.transpose(1, 2))


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GATED)
def test_on_a_cpu_compiled_parts_are_asked_for_by_name(kind: str, uncompiled: list[int]) -> None:
    backbone = tiny_backbone(kind, layers=3)
    for word in ("auto", "never"):
        assert isinstance(choice.pass_for(backbone, compiling=word), QuickPass)
    assert not uncompiled
    run = choice.pass_for(backbone, compiling="always")
    assert isinstance(run, JoinedPass)
    assert uncompiled
    for seed in range(3):
        canvas, asked = ids(2, 9 + seed), torch.tensor([3, 1, 16])
        with torch.no_grad():
            expected = backbone.hidden(canvas, causal=False)
        close(run(canvas), expected)
        close(run(canvas, row_M=asked), expected.flatten(0, 1)[asked])
    config = DiffusionGenerationConfig(
        max_new_tokens=9, max_denoising_steps=4, compile="always", verify=True, stop_at_eos=False
    )
    generate(backbone, [ids(5), ids(9)], config)


def test_graphs_are_compiled_once_that_pays(
    spent: compiling.Spending, uncompiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, of which this machine plays the part."""
    monkeypatch.setattr(choice, "can_compile", lambda device: None)
    backbone = tiny_backbone("llama")
    captures = Captures(Joined(backbone), TapeRecorder())
    assert not choice.parts_for(captures, "auto").compiled
    captures.passes = choice.PASSES_BEFORE_COMPILING
    assert not choice.parts_for(captures, "auto").compiled, "on a CPU it never pays"
    monkeypatch.setattr(captures.weights, "device", Elsewhere("cuda"))
    spent.seconds = choice.COMPILE_BUDGET_S
    assert not choice.parts_for(captures, "auto").compiled, "enough has been spent"
    spent.seconds = 0.0
    captures.passes -= 1
    assert not choice.parts_for(captures, "auto").compiled
    captures.passes += 1
    monkeypatch.setattr(choice, "_try_out", lambda weights, parts: None)
    assert choice.parts_for(captures, "auto").compiled
    captures.passes = 0
    assert choice.parts_for(captures, "auto").compiled, "what has been compiled is used"
    assert not choice.parts_for(captures, "never").compiled
    assert spent.seconds > 0


@dataclasses.dataclass
class Elsewhere:
    type: str


def test_compiled_and_eager_graphs_live_side_by_side(uncompiled: list[int]) -> None:
    backbone = tiny_backbone("llama")
    captures = Captures(Joined(backbone), TapeRecorder())
    both = [CapturedPass(backbone, captures, parts) for parts in (gated_parts.eager(), gated_parts.compiled())]
    for seed in range(4):
        for run in both:
            canvas = ids(1, 9 + seed % 2)
            with torch.no_grad():
                close(run(canvas), backbone.hidden(canvas, causal=False))
    assert {shape.compiled for shape in captures._recordings} == {False, True}
    assert len(captures._recordings) == 4


def test_a_compiler_that_fails_is_asked_once(
    spent: compiling.Spending, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def broken(*given: Any) -> Tensor:
        tries.append(1)
        raise RuntimeError("no such target\nand more")

    monkeypatch.setattr(choice, "can_compile", lambda device: None)
    broken_parts = dataclasses.replace(gated_parts.eager(), turned=broken, compiled=True)
    monkeypatch.setattr(gated_parts, "compiled", lambda: broken_parts)
    dispatch.announce.cache_clear()
    backbone, canvas = tiny_backbone("llama"), ids(1, 9)
    with caplog.at_level("INFO", dispatch.__name__):
        for _ in range(2):
            run = choice.pass_for(backbone, compiling="always")
            with torch.no_grad():
                close(run(canvas), backbone.hidden(canvas, causal=False))
    assert tries == [1]
    assert "decoder parts runs its eager implementation (no such target)" in caplog.messages
    assert spent.fault == "no such target"


def test_without_a_compiler_always_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    backbone = tiny_backbone("llama")
    with pytest.raises(DllmError, match="no C\\+\\+ compiler at hand"):
        choice.pass_for(backbone, compiling="always")
    with pytest.raises(DllmError, match="not written for gpt2"):
        choice.pass_for(tiny_backbone("gpt2"), compiling="always")


@pytest.mark.parametrize("word", ["sometimes", None, 3])
def test_unknown_words_are_refused(word: Any) -> None:
    with pytest.raises(DllmError, match="is not a choice"):
        DiffusionGenerationConfig(compile=word)
    config = DiffusionGenerationConfig(compile="never")
    assert DiffusionGenerationConfig.from_dict(config.to_dict()) == config


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(compiling.can_compile(CPU) is not None, reason="no C++ compiler")
def test_compiled_parts_are_what_they_say(spent: compiling.Spending) -> None:
    """And one compilation serves any number of rows."""
    counted = torch._dynamo.utils.counters
    with compiling.metered():
        check(gated_parts.compiled(), torch.float32, 2e-6)
        made = counted["stats"]["unique_graphs"]
        for length in (21, 34, 55):
            x, cos, sin, weight = heads(1, length, 3, 8)
            gated_parts.compiled().turned(x, cos, sin, weight, EPS)
            gated_parts.compiled().gated(*torch.randn(length, 16).chunk(2, dim=-1))
            gated_parts.compiled().normed(torch.randn(length, 16), torch.rand(16), EPS)
    assert counted["stats"]["unique_graphs"] == made
    assert spent.seconds > 0


@pytest.mark.slow
@pytest.mark.skipif(compiling.can_compile(CPU) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_compiled_pass_is_the_modules(kind: str, spent: compiling.Spending) -> None:
    backbone = tiny_backbone(kind, layers=2)
    run = choice.pass_for(backbone, compiling="always")
    assert spent.fault is None
    for batch, length in ((1, 9), (2, 9), (3, 17)):
        canvas = ids(batch, length)
        with torch.no_grad():
            close(run(canvas), backbone.hidden(canvas, causal=False))
