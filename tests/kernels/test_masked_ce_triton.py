"""Triton token losses against float64 autograd, on a GPU (`-m gpu`) or interpreted (`test_triton_interpreted.py`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_core.kernels.dispatch import interpreted
from dllm_core.kernels.masked_ce import TokenLosses, reference, token_losses
from dllm_core.kernels.masked_ce.terms import Terms

pytestmark = pytest.mark.gpu
SMALL = [(1, 3, 5), (7, 5, 33), (13, 8, 97), (6, 16, 4321)]
LARGE = [(33, 64, 49153), (257, 576, 5003), (130, 127, 151936)]
TERMS = ["ce", "path", "entropy", "all"]


def case(size: tuple[int, int, int], device: torch.device, dtype: torch.dtype):
    """Return inputs in a dtype of which every second target is the most probable allowed id."""
    m, d, v = size
    hidden = torch.randn(m, d, device=device).to(dtype)
    weight = (torch.randn(v, d, device=device) * 2 * d**-0.5).to(dtype)
    blocked = torch.rand(v, device=device) < 0.2
    blocked[0], blocked[-1] = False, True
    logits = (hidden.double() @ weight.double().T).masked_fill(blocked, -torch.inf)
    allowed = (~blocked).nonzero()[:, 0]
    targets = allowed[torch.randint(len(allowed), (m,), device=device)]
    targets[::2] = logits.argmax(-1)[::2]
    weights = [torch.rand(m, device=device) for _ in range(3)]
    weights[2][-1] = 0
    return hidden, weight, targets, weights, blocked


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, weights: list, blocked: Tensor, temperature: float):
    """Return total, parts and gradients by autograd in float64, without the blocked ids."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    ce, path, entropy = (0.0 if x is None else x.double() for x in weights)
    z = h @ w[~blocked].T
    target = ((~blocked).cumsum(0) - 1)[targets]
    nll = -z.log_softmax(-1).gather(1, target[:, None])[:, 0]
    logq = (z / temperature).log_softmax(-1)
    hit = z.argmax(-1) == target
    value = torch.where(hit, -(logq.exp() * logq).sum(-1), 0.0)
    total = (ce * nll + path * torch.exp(-nll).detach() * nll + entropy * value).sum()
    grads = torch.autograd.grad(total, [h, w])
    counted = torch.zeros_like(value) if weights[2] is None else torch.where(weights[2] != 0, value, 0.0)
    return total.detach(), nll.detach(), hit, counted.detach(), *grads


def run(hidden: Tensor, weight: Tensor, targets: Tensor, weights: list, blocked: Tensor | None, **options):
    h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    ce, path, entropy = weights
    out = token_losses(h, w, targets, ce_M=ce, path_M=path, entropy_M=entropy, blocked_V=blocked, **options)
    out.total.backward()
    return out, h.grad, w.grad


@pytest.mark.parametrize("size", SMALL + LARGE, ids=lambda s: "M{}-D{}-V{}".format(*s))
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_value_and_gradients_against_float64(
    kernel_device: torch.device, size: tuple[int, int, int], terms: str, temperature: float
) -> None:
    if kernel_device.type == "cpu" and size in LARGE:
        pytest.skip("too large for the interpreter")
    hidden, weight, targets, weights, blocked = case(size, kernel_device, torch.float32)
    weights = [
        x if name == "ce" or terms in (name, "all") else None for x, name in zip(weights, TERMS[:3], strict=True)
    ]
    total, nll, hit, value, grad_hidden, grad_weight = exact(hidden, weight, targets, weights, blocked, temperature)
    for chunk in (2, None):
        if chunk and size in LARGE:
            chunk = 50
        out, got_hidden, got_weight = run(
            hidden, weight, targets, weights, blocked, entropy_temperature=temperature, chunk_rows=chunk
        )
        torch.testing.assert_close(out.total.double(), total, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.nll_M.double(), nll, rtol=1e-5, atol=1e-5)
        assert torch.equal(out.correct_M, hit)
        torch.testing.assert_close(out.entropy_M.double(), value, rtol=5e-5, atol=1e-5)
        for got, want in ((got_hidden, grad_hidden), (got_weight, grad_weight)):
            limit = 1e-5 if size in LARGE else 2e-6
            assert (got.double() - want).norm() <= limit * want.norm() + 1e-9
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2047), (2, 2049), (3, 6001)])
def test_a_chunk_equals_the_reference_and_fills_its_buffers(
    kernel_device: torch.device, shape: tuple[int, int], masked: bool, entropy: bool, dtype: torch.dtype
) -> None:
    """From the same logits, ties and all: nothing but fp32 arithmetic lies between the two."""
    from dllm_core.kernels.masked_ce import triton

    rows, columns = shape
    buffer = torch.randn(rows + 1, columns, device=kernel_device).mul_(4).to(dtype)
    blocked = torch.rand(columns, device=kernel_device) < 0.3 if masked and columns > 1 else None
    if blocked is not None:
        blocked[:2] = False
    targets = torch.zeros(rows, dtype=torch.long, device=kernel_device)
    targets[1:] = buffer[1:rows, :2].argmax(-1)
    # ties, which the lowest id wins: between lanes, and within the first one
    buffer[0, :2] = 40.0
    buffer[0, :: triton._BLOCK] = 40.0
    weights = torch.rand(3, rows + 2, device=kernel_device)[:, 1:-1]
    terms = Terms(entropy, 0.5, blocked, True)
    want_parts, got_parts = torch.zeros(3, rows, device=kernel_device), torch.full((3, rows), torch.nan)
    got_parts = got_parts.to(kernel_device)
    want = reference.chunk_losses(buffer[:-1].clone(), targets, weights, want_parts, terms)
    outside = buffer[-1].clone()
    got = triton.chunk_losses(buffer[:-1], targets, weights, got_parts, terms)
    assert got.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[-1], outside)
    filled = 3 if entropy else 2
    torch.testing.assert_close(got_parts[:filled], want_parts[:filled], rtol=1e-5, atol=1e-5)
    assert got_parts[1, 0] == 1
    assert got_parts[2:].isnan().all() or entropy
    step = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(got, want, rtol=step, atol=1e-6)
    untouched = Terms(entropy, 0.5, blocked, False)
    logits = torch.randn(rows, columns, device=kernel_device).to(dtype)
    before = logits.clone()
    assert triton.chunk_losses(logits, targets, weights, got_parts, untouched) is None
    assert torch.equal(logits, before)


def test_bf16_is_as_close_to_float64_as_the_reference(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets, weights, blocked = case((24, 32, 301), kernel_device, torch.bfloat16)
    weights[2] = None  # a flipped [correct] would hide the rest
    total, nll, *_, grad_hidden, grad_weight = exact(hidden, weight, targets, weights, blocked, 0.5)

    def errors() -> list[Tensor]:
        out, got_hidden, got_weight = run(hidden, weight, targets, weights, blocked)
        pairs = ((out.total, total), (out.nll_M, nll), (got_hidden, grad_hidden), (got_weight, grad_weight))
        return [(got.double() - want).norm() / want.norm() for got, want in pairs]

    # compiled code rounds to the nearest bf16, the interpreter towards zero
    slack = 2.2 if interpreted() else 1.2
    ours = errors()
    monkeypatch.setenv("DLLM_KERNELS", "reference")
    for error, usual in zip(ours, errors(), strict=True):
        assert error <= slack * usual + 1e-6
        assert usual < 0.02


def test_autocast_no_rows_and_no_gradient(kernel_device: torch.device) -> None:
    hidden, weight, targets, weights, blocked = case((9, 8, 55), kernel_device, torch.float32)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        _, got_hidden, got_weight = run(hidden, weight, targets, weights, blocked)
    _, half_hidden, half_weight = run(hidden.bfloat16(), weight.bfloat16(), targets, weights, blocked)
    assert got_hidden.dtype == got_weight.dtype == torch.float32
    torch.testing.assert_close(got_hidden, half_hidden.float(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(got_weight, half_weight.float(), rtol=0.01, atol=0.01)
    out, got_hidden, got_weight = run(hidden[:0], weight, targets[:0], [x[:0] for x in weights], blocked)
    assert out.total == 0
    assert got_hidden.shape == (0, 8)
    assert (got_weight == 0).all()
    with torch.no_grad():
        plain = token_losses(hidden, weight, targets, ce_M=weights[0])
    assert isinstance(plain, TokenLosses)
    assert not plain.total.requires_grad


def test_large_logits_lose_no_digits_and_a_nan_stays(kernel_device: torch.device) -> None:
    hidden = torch.tensor([[3e4], [-3e4]], device=kernel_device)
    weight = torch.tensor([[1.0], [-1.0], [0.0], [1.0]], device=kernel_device)
    targets = torch.zeros(2, dtype=torch.long, device=kernel_device)
    weights = [torch.ones(2, device=kernel_device) for _ in range(3)]
    out, grad_hidden, grad_weight = run(hidden, weight, targets, weights, None)
    torch.testing.assert_close(
        out.nll_M, torch.tensor([2.0, 1.0], device=kernel_device).log() + out.nll_M.new([0, 6e4])
    )
    assert torch.isfinite(grad_hidden).all()
    assert torch.isfinite(grad_weight).all()
    hidden[0] = torch.nan
    out, *_ = run(hidden, weight, targets, weights, None)
    assert out.nll_M.isnan().tolist() == [True, False]
