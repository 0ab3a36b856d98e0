"""Token statistics against float64 softmax."""

from __future__ import annotations

import pytest
import torch

from dllm_core.kernels.token_stats import argmax, stats


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("chunk", [1, 3, 100, None])
def test_against_float64(rows: int, chunk: int | None) -> None:
    hidden, weight = torch.randn(rows, 6), torch.randn(41, 6)
    blocked = torch.zeros(41, dtype=torch.bool)
    blocked[[0, 5, 40]] = True
    allowed = [i for i in range(41) if not blocked[i]]
    got = stats(hidden, weight, blocked, chunk, second=True, entropy=True)
    for m in range(rows):
        z = hidden[m].double() @ weight[allowed].double().T
        p = torch.exp(z - z.max())
        p /= p.sum()
        best = sorted(range(len(allowed)), key=lambda k: -p[k])
        assert got.argmax_M[m] == allowed[best[0]]
        assert got.top_logprob_M[m].item() == pytest.approx(p[best[0]].log().item(), abs=1e-5)
        assert got.second_logprob_M[m].item() == pytest.approx(p[best[1]].log().item(), abs=1e-5)
        assert got.entropy_M[m].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)


def test_only_what_is_asked_for() -> None:
    hidden, weight = torch.randn(3, 6), torch.randn(41, 6)
    plain = stats(hidden, weight, second=False)
    assert plain.second_logprob_M is None
    assert plain.entropy_M is None
    full = stats(hidden, weight, second=True, entropy=True)
    assert torch.equal(plain.argmax_M, full.argmax_M)
    assert torch.equal(plain.top_logprob_M, full.top_logprob_M)


def test_ties_go_to_the_lowest_id_and_show_in_the_margin() -> None:
    got = stats(torch.ones(1, 1), torch.tensor([[0.0], [2.0], [2.0]]))
    assert got.argmax_M.tolist() == [1]
    assert got.second_logprob_M == got.top_logprob_M


def test_one_allowed_token() -> None:
    blocked = torch.tensor([True, False, True])
    got = stats(torch.randn(2, 4), torch.randn(3, 4), blocked, entropy=True)
    assert got.argmax_M.tolist() == [1, 1]
    assert got.top_logprob_M.tolist() == [0, 0]
    assert got.second_logprob_M.tolist() == [-torch.inf] * 2
    assert got.entropy_M.tolist() == [0, 0]


def test_extreme_logits() -> None:
    got = stats(torch.tensor([[3e4]]), torch.tensor([[1.0], [-1.0]]), entropy=True)
    assert got.top_logprob_M.item() == 0
    assert got.entropy_M.item() == 0
    assert got.second_logprob_M.item() == -6e4


def test_bf16_weights_give_fp32_statistics() -> None:
    hidden, weight = torch.randn(5, 6).bfloat16(), torch.randn(41, 6).bfloat16()
    got = stats(hidden, weight)
    assert got.top_logprob_M.dtype == torch.float32
    torch.testing.assert_close(got.top_logprob_M, stats(hidden.float(), weight.float()).top_logprob_M, atol=0.1, rtol=0)


@pytest.mark.parametrize(("rows", "vocab"), [(3, 5), (4, 1024), (4, 2048), (5, 2500), (2, 1025)])
def test_argmax_takes_the_lowest_of_equals(rows: int, vocab: int) -> None:
    logits_MV = torch.randint(3, (rows, vocab), generator=torch.Generator().manual_seed(vocab)).bfloat16()
    assert torch.equal(argmax(logits_MV), logits_MV.double().argmax(-1))
    last_MV = torch.zeros(rows, vocab)
    last_MV[:, -1] = 1
    assert argmax(last_MV).tolist() == [vocab - 1] * rows
