"""Attention against loops in float64, its masks, its rotary positions and its dispatch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_core.layers import sizes
from dllm_core.layers.attention import (
    LONGEST_PLAIN,
    Attention,
    attend,
    is_plain,
    joined,
    joined_key_mask,
    key_mask,
    plain_attend,
    rotate,
    rotation,
)
from tests.unit import layers_oracle as oracle

WIDTH, HEADS = 12, 2
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 rotary tables


def _module() -> Attention:
    module = oracle.randomise(Attention(WIDTH, HEADS))
    assert isinstance(module, Attention)
    return module


def _run(module: Attention, x: Tensor, seen: Tensor, at_x: Tensor, at_seen: Tensor, mask: Tensor | None) -> Tensor:
    head = module.head_width
    return module(x, module.keys_values(seen, rotation(at_seen, head)), rotation(at_x, head), mask)


@pytest.mark.parametrize("masked", [None, "keys", "pairs"])
@torch.no_grad()
def test_attention_is_its_loops(masked: str | None) -> None:
    module = _module()
    x, seen = torch.randn(2, 3, WIDTH).double(), torch.randn(2, 5, WIDTH).double()
    at_x, at_seen = torch.tensor([[-1, 0, 40], [7, -9, 7]]), torch.tensor([[-4, -3, 0, 2, 40], [0, 1, 2, -30, 9]])
    sees = torch.rand(2, 1, 1 if masked == "keys" else 3, 5) < 0.6
    sees[..., 0] = True
    got = _run(module, x, seen, at_x, at_seen, sees if masked else None)
    seen_by_all = (sees if masked else torch.ones_like(sees)).expand(2, 1, 3, 5)
    for b in range(2):
        want = oracle.attention(module, x[b], seen[b], at_x[b].tolist(), at_seen[b].tolist(), seen_by_all[b, 0])
        torch.testing.assert_close(got[b], want, **CLOSE)


@torch.no_grad()
def test_only_differences_of_positions_count() -> None:
    module = _module()
    x, at = torch.randn(2, 6, WIDTH).double(), torch.tensor([[-3, -2, -1, 0, 1, 2], [0, 5, 6, 7, 20, 21]])
    here = _run(module, x, x, at, at, None)
    for shift in (-50, 1, 64):
        torch.testing.assert_close(_run(module, x, x, at + shift, at + shift, None), here, rtol=1e-4, atol=2e-5)
    assert (_run(module, x, x, at + 1, at, None) - here).abs().max() > 1e-2
    one_row = torch.stack([_run(module, x[b : b + 1], x[b : b + 1], at[b], at[b], None)[0] for b in range(2)])
    torch.testing.assert_close(one_row, here)


def test_bf16_heads_are_turned_by_fp32_angles() -> None:
    """bf16 knows no 4,001: the table must be made before the cast."""
    x = torch.randn(1, 1, 2, 8).to(torch.bfloat16)
    got = rotate(x, rotation(torch.tensor([4001, -257]), 8))
    assert got.dtype == torch.bfloat16
    for i, position in enumerate((4001, -257)):
        want = oracle.turned(x[0, 0, i].double(), position)
        torch.testing.assert_close(got[0, 0, i].double(), want, rtol=0, atol=3 * 2**-8 * float(x.abs().max()))


@pytest.mark.parametrize(("length", "keys"), [(2, 2), (33, 33), (7, 40)])
@pytest.mark.parametrize("masked", [False, True])
def test_bf16_on_cpu_is_as_close_to_float64_as_sdpa(length: int, keys: int, masked: bool) -> None:
    shapes = [(2, 3, length, 16), (2, 3, keys, 16), (2, 3, keys, 16)]
    inputs = [torch.randn(shape).to(torch.bfloat16).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    visible = torch.rand(2, keys) < 0.6
    visible[:, -1] = True
    mask = key_mask(visible) if masked else None
    weight = torch.randn(shapes[0])

    def everything(out: Tensor, of: list[Tensor]) -> list[Tensor]:
        return [out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), of)]

    q, k, v = exact
    scores = torch.einsum("bnlh,bnmh->bnlm", q, k) / 4.0
    unnormalised = scores.exp() * (mask.double() if mask is not None else 1.0)
    wanted = everything(torch.einsum("bnlm,bnmh->bnlh", unnormalised / unnormalised.sum(-1, keepdim=True), v), exact)
    ours = everything(attend(*inputs, mask), inputs)
    theirs = everything(F.scaled_dot_product_attention(*inputs, attn_mask=mask), inputs)
    for name, want, got, reference in zip(("out", "q", "k", "v"), wanted, ours, theirs, strict=True):
        error, usual = (got.double() - want).norm(), (reference.double() - want).norm()
        assert error <= max(2.0 * usual, 0.01 * want.norm()), (name, error / want.norm(), usual / want.norm())


@pytest.mark.parametrize(
    ("length", "keys", "dtype", "plain"),
    [
        (2, LONGEST_PLAIN, torch.bfloat16, True),
        (LONGEST_PLAIN, 2, torch.bfloat16, True),
        (1, 8, torch.bfloat16, False),
        (2, LONGEST_PLAIN + 1, torch.bfloat16, False),
        (LONGEST_PLAIN + 1, 2, torch.bfloat16, False),
        (8, 8, torch.float32, False),
    ],
)
def test_each_case_goes_to_its_kernel(length: int, keys: int, dtype: torch.dtype, plain: bool) -> None:
    query, key, value = (torch.randn(1, 2, n, 12).to(dtype) for n in (length, keys, keys))
    assert is_plain(query, key) is plain
    by_hand = plain_attend(query, key, value) if plain else F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(attend(query, key, value), by_hand)


def test_a_query_that_sees_nothing_does_not_spoil_plain_gradients() -> None:
    inputs = [torch.randn(2, 2, 4, 8).to(torch.bfloat16).requires_grad_() for _ in range(3)]
    mask = torch.tensor([[True, False, True, True], [False] * 4])[:, None, None, :]
    out = plain_attend(*inputs, mask)
    grads = torch.autograd.grad(out[0].sum(), inputs)
    alone = [x[:1] for x in inputs]
    assert torch.equal(out[:1], plain_attend(*alone, mask[:1]))
    torch.testing.assert_close(
        out[1].float(), inputs[2][1].float().mean(1, keepdim=True).expand(2, 4, 8), atol=0.02, rtol=0
    )
    assert all(torch.isfinite(g).all() and not g[1].any() for g in grads)


def test_key_masks() -> None:
    states = torch.zeros(3, 2, 7), torch.zeros(3, 1, 7)
    first = torch.tensor([[True, False], [False, False], [False, False]])
    second = torch.tensor([[True], [False], [True]])
    assert key_mask(None) is None
    assert joined_key_mask((None, states[0]), (None, states[1])) is None
    found = {
        "both": joined_key_mask((first, states[0]), (second, states[1])),
        "first": joined_key_mask((first, states[0]), (None, states[1])),
        "second": joined_key_mask((None, states[0]), (second, states[1])),
        "alone": key_mask(first),
    }
    wanted = {
        "both": [[1, 0, 1], [1, 1, 1], [0, 0, 1]],  # the middle row would see nothing
        "first": [[1, 0, 1], [0, 0, 1], [0, 0, 1]],
        "second": [[1, 1, 1], [1, 1, 0], [1, 1, 1]],
        "alone": [[1, 0], [1, 1], [1, 1]],
    }
    for name, want in wanted.items():
        assert torch.equal(found[name], torch.tensor(want, dtype=torch.bool)[:, None, None, :]), name


def test_joined_keys_are_in_order() -> None:
    first, second = ((torch.full((1, 1, n, 2), n), torch.full((1, 1, n, 2), -n)) for n in (1, 2))
    key, value = joined(first, second)
    assert key[0, 0, :, 0].tolist() == [1, 2, 2]
    assert value[0, 0, :, 0].tolist() == [-1, -2, -2]
    assert joined(None, second) is second


def test_sizes_need_no_torch() -> None:
    tree = ast.parse(Path(sizes.__file__).read_text())
    imported = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert [n.module for n in imported if isinstance(n, ast.ImportFrom)] == ["__future__"]
    assert len(imported) == 1
