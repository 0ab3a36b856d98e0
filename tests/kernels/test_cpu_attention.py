"""The plain CPU attention against softmax(q k') v written out in float64, and against transformers' sdpa."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dllm_core.backbone import attention


def _oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores_LL = q[b, h] @ k[b, h // groups].T * scale
            if mask is not None:
                scores_LL = scores_LL.masked_fill(~mask[b, 0], -torch.inf)
            out[b, h] = scores_LL.softmax(-1) @ v[b, h // groups]
    return out.transpose(1, 2)


def _inputs(length: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(2, 6, length, 16), (2, 2, keys, 16), (2, 2, keys, 16)]
    return [torch.randn(s).to(torch.bfloat16).to(dtype).requires_grad_() for s in shapes]


def _run(function, inputs, mask, causal, weight):  # type: ignore[no-untyped-def]
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    out, _ = function(module, *inputs, mask, scaling=0.3, is_causal=causal)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), inputs)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(1, 9), (2, 2), (33, 33), (7, 40)])
def test_bf16_is_as_close_to_float64_as_sdpa(length: int, keys: int, masked: bool) -> None:
    inputs = _inputs(length, keys, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = None
    if masked:
        mask = torch.rand(2, 1, length, keys) < 0.6
        mask[..., -1] = True
    weight = torch.randn(2, length, 6, 16, dtype=torch.double)
    expected_out = _oracle(*exact, mask, 0.3)
    expected = [expected_out, *torch.autograd.grad((expected_out * weight).sum(), exact)]
    ours = _run(attention.attention, inputs, mask, False, weight)
    theirs = _run(sdpa_attention_forward, inputs, mask, False, weight)
    for name, want, got, reference in zip(("out", "q", "k", "v"), expected, ours, theirs, strict=True):
        error, usual = (got.double() - want).norm(), (reference.double() - want).norm()
        assert error <= max(2.0 * usual, 0.01 * want.norm()), (name, error / want.norm(), usual / want.norm())


@pytest.mark.parametrize(("dtype", "causal"), [(torch.float32, False), (torch.bfloat16, True)])
def test_all_else_goes_to_sdpa(dtype: torch.dtype, causal: bool) -> None:
    inputs = _inputs(12, 12, dtype)
    weight = torch.randn(2, 12, 6, 16, dtype=torch.double)
    ours = _run(attention.attention, inputs, None, causal, weight)
    theirs = _run(sdpa_attention_forward, inputs, None, causal, weight)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got, want)


def test_the_benchmark_behind_the_choice_runs(tmp_path: Path) -> None:
    from benchmarks import attention as benchmark

    out, threads = tmp_path / "attention.json", torch.get_num_threads()
    small = "--lengths 8 --tokens 16 --rounds 6 --warmup 1 --heads 4 --kv-heads 2 --head-dim 8 --threads"
    assert benchmark.main([*small.split(), str(threads), "--out", str(out)]) == 0
    cases = json.loads(out.read_text())["cpu"]
    assert [(c["dtype"], c["length"], c["batch"]) for c in cases] == [("bf16", 8, 2), ("fp32", 8, 2)]
    for case in cases:
        for name in ("forward", "forward_backward"):
            assert case[name]["rows"] == ["plain", "sdpa"]
            assert case[name]["ci95"][0] <= case[name]["ratio"] <= case[name]["ci95"][1]
