"""The Triton token statistics against float64, on a GPU (`-m gpu`) or interpreted (`test_triton_interpreted.py`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_core.kernels.token_stats import TokenStats, reference, stats

pytestmark = pytest.mark.gpu
SMALL = [(1, 3, 5), (7, 33, 130), (20, 16, 1349), (40, 130, 200), (70, 17, 700), (150, 9, 300)]
LARGE = [(1, 576, 49153), (17, 2047, 49152), (64, 2048, 151936), (129, 1024, 50257), (1000, 576, 49155)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(hidden: Tensor, weight: Tensor, blocked: Tensor | None) -> tuple[Tensor, TokenStats]:
    """Return float64 logits and the statistics read off them."""
    logits = hidden.double() @ weight.double().T
    if blocked is not None:
        logits = logits.masked_fill(blocked, -torch.inf)
    logp = logits.log_softmax(-1)
    top = logp.topk(min(2, logp.shape[1]), dim=-1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)
    return logits, TokenStats(top.indices[:, 0], top.values[:, 0], top.values[:, -1], entropy)


def close(got: Tensor | None, want: Tensor | None, tolerance: float) -> None:
    assert got is not None
    assert want is not None
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SMALL + LARGE, ids=lambda s: "M{}-D{}-V{}".format(*s))
@pytest.mark.usefixtures("poisoned")
def test_against_float64(
    kernel_device: torch.device, size: tuple[int, int, int], masked: bool, dtype: torch.dtype
) -> None:
    if kernel_device.type == "cpu" and size in LARGE:
        pytest.skip("too large for the interpreter")
    m, d, v = size
    hidden = torch.randn(m, d, device=kernel_device).to(dtype)
    weight = (torch.randn(v, d, device=kernel_device) * 3 * d**-0.5).to(dtype)
    blocked = None
    if masked:
        blocked = torch.rand(v, device=kernel_device) < 0.3
        blocked[:2] = False
        blocked[-1] = True
    logits, want = exact(hidden, weight, blocked)
    got = stats(hidden, weight, blocked, second=True, entropy=True)
    assert got.argmax_M.dtype == torch.long
    assert (got.argmax_M >= 0).all()
    # rounding may decide between ids that are all but equal
    chosen = logits.gather(1, got.argmax_M[:, None])[:, 0]
    # the matrix units round their fp32 sums towards zero
    tolerance = 3e-5 if dtype == torch.float32 or kernel_device.type == "cpu" else 3e-4
    torch.testing.assert_close(chosen, logits.amax(-1), rtol=tolerance, atol=tolerance)
    for part in ("top_logprob_M", "second_logprob_M", "entropy_M"):
        close(getattr(got, part), getattr(want, part), tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 50, 140])
def test_ties_go_to_the_lowest_id(kernel_device: torch.device, rows: int, dtype: torch.dtype) -> None:
    """Whole numbers are exact in every dtype, and four of them make many ties within and across splits."""
    hidden, weight = (torch.randint(-1, 2, (n, 4), device=kernel_device).to(dtype) for n in (rows, 1500))
    logits = hidden.double() @ weight.double().T
    got = stats(hidden, weight, entropy=True)
    ties = logits == logits.amax(-1, keepdim=True)
    assert ties.sum() > 2 * rows
    assert torch.equal(got.argmax_M, ties.int().argmax(-1))
    assert torch.equal(got.second_logprob_M[ties.sum(-1) > 1], got.top_logprob_M[ties.sum(-1) > 1])


@pytest.mark.usefixtures("poisoned")
def test_only_what_is_asked_for(kernel_device: torch.device) -> None:
    hidden, weight = torch.randn(9, 6, device=kernel_device), torch.randn(411, 6, device=kernel_device)
    full = stats(hidden, weight, entropy=True)
    for second in (False, True):
        for entropy in (False, True):
            got = stats(hidden, weight, second=second, entropy=entropy)
            assert torch.equal(got.argmax_M, full.argmax_M)
            torch.testing.assert_close(got.top_logprob_M, full.top_logprob_M, rtol=1e-6, atol=1e-6)
            assert (got.second_logprob_M is not None) == second
            assert (got.entropy_M is not None) == entropy


def test_edges(kernel_device: torch.device) -> None:
    empty = stats(torch.randn(0, 6, device=kernel_device), torch.randn(41, 6, device=kernel_device), entropy=True)
    assert [x.shape for x in empty] == [(0,)] * 4
    blocked = torch.ones(300, dtype=torch.bool, device=kernel_device)
    blocked[200] = False
    one = stats(
        torch.randn(2, 4, device=kernel_device), torch.randn(300, 4, device=kernel_device), blocked, entropy=True
    )
    assert one.argmax_M.tolist() == [200, 200]
    assert one.top_logprob_M.tolist() == [0, 0]
    assert one.second_logprob_M.tolist() == [-torch.inf] * 2
    assert one.entropy_M.tolist() == [0, 0]
    far = stats(
        torch.tensor([[3e4]], device=kernel_device), torch.tensor([[1.0], [-1.0]], device=kernel_device), entropy=True
    )
    assert [x.item() for x in far] == [0, 0, -6e4, 0]


def test_a_diverged_row_is_nan_with_a_legal_id_and_spoils_no_other(kernel_device: torch.device) -> None:
    hidden, weight = torch.randn(5, 6, device=kernel_device), torch.randn(700, 6, device=kernel_device)
    clean = stats(hidden, weight, entropy=True)
    hidden[2] = torch.nan
    blocked = torch.arange(700, device=kernel_device) < 3
    got = stats(hidden, weight, entropy=True)
    assert got.top_logprob_M[2].isnan()
    assert got.entropy_M[2].isnan()
    assert got.argmax_M[2] == 0
    assert stats(hidden, weight, blocked).argmax_M[2] == 3
    others = torch.tensor([0, 1, 3, 4], device=kernel_device)
    for ours, theirs in zip(got, clean, strict=True):
        assert torch.equal(ours[others], theirs[others])
    weight[500] = torch.nan
    assert (stats(torch.ones_like(hidden), weight).argmax_M == 500).all()


def test_rows_that_are_not_contiguous(kernel_device: torch.device) -> None:
    hidden, weight = torch.randn(9, 20, device=kernel_device), torch.randn(300, 20, device=kernel_device)
    want = stats(hidden[:, 3:10].contiguous(), weight[:, 5:12].contiguous())
    for got in (
        stats(hidden[:, 3:10], weight[:, 5:12]),
        stats(hidden.T.contiguous().T[:, 3:10], weight.T.contiguous().T[:, 5:12]),
    ):
        assert torch.equal(got.argmax_M, want.argmax_M)
        torch.testing.assert_close(got.top_logprob_M, want.top_logprob_M)


def test_no_less_exact_than_the_reference_and_autocast_applies(kernel_device: torch.device) -> None:
    hidden = torch.randn(30, 64, device=kernel_device)
    weight = torch.randn(500, 64, device=kernel_device)
    half = stats(hidden.bfloat16(), weight.bfloat16(), entropy=True)
    _, want = exact(hidden.bfloat16(), weight.bfloat16(), None)
    rounded = reference.stats(hidden.bfloat16(), weight.bfloat16(), entropy=True)
    error = (half.top_logprob_M - want.top_logprob_M).abs().max()
    assert error < 0.1 * (rounded.top_logprob_M - want.top_logprob_M).abs().max()
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        cast = stats(hidden, weight, entropy=True)
    for ours, theirs in zip(cast, half, strict=True):
        assert torch.equal(ours, theirs)
