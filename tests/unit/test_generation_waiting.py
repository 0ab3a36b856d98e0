"""What a denoising step reads back from the device: nothing where the schedule is fixed, one small tensor elsewhere.

On a CPU no read waits for anything, so reads are counted instead: through Python (`tolist`, `item`, `bool`) and
through operations whose result has a size that depends on the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_core.samplers import loop
from dllm_core.samplers.config import ADAPTIVE_SAMPLERS, SAMPLERS, DiffusionGenerationConfig
from tests.tiny import NUM_TOKENS, tiny_backbone

READING = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
SIZED_BY_DATA = ("nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "_local_scalar_dense", "equal")


class Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in SIZED_BY_DATA or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """What each step read, one list per step; the step's plan is made inside it."""
    steps: list[list[str]] = []
    advance = loop.Decoding.advance

    def watched(decoding: loop.Decoding, step: Any) -> Tensor:
        steps.append([])
        with ExitStack() as stack:
            stack.enter_context(Operations(steps[-1]))
            stack.enter_context(Calls(steps[-1]))
            drafted_BC = advance(decoding, step)
            decoding.plan.next_step(decoding.device)
            return drafted_BC

    monkeypatch.setattr(loop.Decoding, "advance", watched)
    return steps


def decode(family: str = "llama", block: int | None = None, **options: Any) -> int:
    backbone = tiny_backbone(family, model_block=block)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, NUM_TOKENS, (n,), generator=generator) for n in (5, 9)]
    options = {"max_new_tokens": 12, "max_denoising_steps": 6, "stop_at_eos": False, **options}
    return loop.generate(backbone, rows, DiffusionGenerationConfig(**options)).num_forwards


def test_the_watch_sees_reads() -> None:
    found: list[str] = []
    x = torch.arange(3)
    with Operations(found), Calls(found):
        for read in (x.tolist, x[0].item, lambda: bool(x[0]), lambda: int(x[1]), x.nonzero, lambda: x[x > 0], x.cpu):
            before = len(found)
            read()  # type: ignore[operator]
            assert len(found) > before, read


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"block_size": 4},
    {"temperature": 1.0, "top_p": 0.9},
    {"t_max": 1.0, "t_min": 0.1, "top_k": 5},
    {"guidance_scale": 2.0},
    {"record_passes": True, "record_history": True},
    {"cache": "prefix", "block_size": 4},
    {"cache": {"kind": "dual", "refresh_every": 2}, "block_size": 4},
    {"cache": "delayed", "measure_drift": True},
    {"cache": "exact", "block": 4},
)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: " ".join(map(str, o)) or "plain")
def test_a_fixed_schedule_reads_nothing(
    reads: list[list[str]], options: dict[str, Any], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLLM_KERNELS", kernels)
    for rule in SAMPLERS:
        if rule not in ADAPTIVE_SAMPLERS:
            forwards = decode(sampler_config=rule, **options)
            assert reads == [[]] * forwards, rule
            reads.clear()


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_whatever_the_family(reads: list[list[str]], family: str) -> None:
    assert reads == [[]] * decode(family)


@pytest.mark.parametrize("rule", sorted(ADAPTIVE_SAMPLERS))
def test_rules_that_go_by_scores_read_once_a_step(reads: list[list[str]], rule: str) -> None:
    assert reads == [["tolist"]] * decode(sampler_config=rule)


def test_the_end_of_text_is_read_once_a_step(reads: list[list[str]]) -> None:
    forwards = decode(stop_at_eos=True, eos_token_id=3)
    assert reads == [["tolist"]] * forwards
