"""Token losses against plain float64 loops with autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_core.kernels.masked_ce import TokenLosses, token_losses

SIZES = [(1, 3, 5), (7, 5, 33), (13, 8, 97), (4, 1, 2)]
BLOCKED = 2


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, ce, path, entropy, temperature: float, num_allowed: int):
    """One row at a time, float64; returns total, nll, correct, entropy."""
    total = torch.zeros((), dtype=torch.float64)
    nlls, hits, entropies = [], [], []
    for m in range(len(hidden)):
        z = torch.stack([torch.dot(hidden[m], weight[v]) for v in range(num_allowed)])
        logp = z - torch.log(torch.exp(z - z.max()).sum()) - z.max()
        nll = -logp[targets[m]]
        hit = int(z.argmax()) == int(targets[m])
        total = total + ce[m] * nll
        if path is not None:
            total = total + path[m] * torch.exp(-nll).detach() * nll
        value = torch.zeros((), dtype=torch.float64)
        if entropy is not None and hit:
            y = z / temperature
            logq = y - torch.log(torch.exp(y - y.max()).sum()) - y.max()
            value = -(torch.exp(logq) * logq).sum()
            total = total + entropy[m] * value
            value = value if entropy[m] != 0 else torch.zeros(())
        nlls.append(nll.detach())
        hits.append(hit)
        entropies.append(value.detach())
    return total, torch.stack(nlls), torch.tensor(hits), torch.stack(entropies)


def case(size: tuple[int, int, int], seed: int = 0):
    m, d, v = size
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m, d, generator=gen, dtype=torch.float64)
    weight = torch.randn(v, d, generator=gen, dtype=torch.float64)
    allowed = v - BLOCKED if v > BLOCKED else v
    targets = torch.randint(0, allowed, (m,), generator=gen)
    # every second row is made correct, else the entropy term would hardly be tested
    best = (hidden @ weight[:allowed].T).argmax(-1)
    targets[::2] = best[::2]
    weights = [torch.rand(m, generator=gen, dtype=torch.float64) for _ in range(3)]
    weights[2][-1] = 0
    return hidden, weight, targets, weights, allowed


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "M{}-D{}-V{}".format(*s))
@pytest.mark.parametrize("terms", ["ce", "path", "entropy", "all"])
def test_value_and_gradients_equal_the_naive_loop(size: tuple[int, int, int], terms: str) -> None:
    hidden, weight, targets, (ce, path, entropy), allowed = case(size)
    path = path if terms in ("path", "all") else None
    entropy = entropy if terms in ("entropy", "all") else None
    blocked = torch.arange(len(weight)) >= allowed
    h64, w64 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, nll, correct, value = naive(h64, w64, targets, ce, path, entropy, 0.5, allowed)
    total.backward()
    for chunk in sorted({1, 2, 3, size[0], size[0] + 5}):
        h32, w32 = hidden.float().requires_grad_(), weight.float().requires_grad_()
        out = token_losses(
            h32, w32, targets, ce_M=ce, path_M=path, entropy_M=entropy, blocked_V=blocked, chunk_rows=chunk
        )
        (3 * out.total).backward()
        torch.testing.assert_close(out.total, total.detach().float(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(out.nll_M, nll.float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(out.correct_M, correct)
        torch.testing.assert_close(out.entropy_M, value.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(h32.grad, 3 * h64.grad.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(w32.grad, 3 * w64.grad.float(), rtol=1e-5, atol=1e-5)


def run(hidden: Tensor, weight: Tensor, **options) -> TokenLosses:
    rows = len(hidden)
    defaults = {"ce_M": torch.ones(rows), "targets_M": torch.zeros(rows, dtype=torch.long)}
    return token_losses(hidden, weight, **{**defaults, **options})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_entropy_temperature(temperature: float) -> None:
    hidden, weight, targets, (ce, _, entropy), _ = case((6, 4, 11))
    h64 = hidden.clone().requires_grad_()
    total, *_ = naive(h64, weight, targets, ce, None, entropy, temperature, len(weight))
    total.backward()
    h32 = hidden.float().requires_grad_()
    options = {"ce_M": ce, "entropy_M": entropy, "entropy_temperature": temperature, "targets_M": targets}
    run(h32, weight.float(), **options).total.backward()
    torch.testing.assert_close(h32.grad, h64.grad.float(), rtol=1e-5, atol=1e-6)


def test_no_rows_give_zero_and_zero_gradients() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    out = run(hidden, weight, path_M=torch.ones(0), entropy_M=torch.ones(0))
    out.total.backward()
    assert out.total == 0
    assert out.nll_M.shape == out.correct_M.shape == out.entropy_M.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros(9, 4))
    assert hidden.grad.shape == (0, 4)


def test_weights_of_zero_give_no_gradient_to_those_rows() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    run(hidden, weight, ce_M=torch.tensor([1.0, 0, 1, 0, 1])).total.backward()
    assert ((hidden.grad != 0).any(-1) == torch.tensor([True, False, True, False, True])).all()


def test_blocked_rows_get_no_gradient_and_change_nothing() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(12, 4, requires_grad=True)
    blocked = torch.arange(12) >= 9
    out = run(hidden, weight, blocked_V=blocked, path_M=torch.ones(5), entropy_M=torch.ones(5))
    out.total.backward()
    short = run(hidden, weight.detach()[:9], path_M=torch.ones(5), entropy_M=torch.ones(5))
    torch.testing.assert_close(out.total, short.total)
    assert (weight.grad[9:] == 0).all()
    assert torch.isfinite(weight.grad).all()
    assert (weight.grad[:9] != 0).any()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[3e4], [-3e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    out = run(hidden, weight, path_M=torch.ones(2), entropy_M=torch.ones(2))
    out.total.backward()
    torch.testing.assert_close(out.nll_M, torch.tensor([0.0, 6e4]))
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_no_gradient_work_without_gradients() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with torch.no_grad():
        assert not run(hidden, weight).total.requires_grad
    only_hidden = run(hidden, weight.detach())
    only_hidden.total.backward()
    assert weight.grad is None
    assert hidden.grad is not None
    with pytest.raises(RuntimeError):
        only_hidden.total.backward()


def test_logits_of_all_rows_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor larger than a chunk (or the inputs) is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return out

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(200, 4, requires_grad=True)
    with Watch():
        run(hidden, weight, path_M=torch.ones(64), entropy_M=torch.ones(64), chunk_rows=8).total.backward()
    assert largest <= 8 * 200


def test_autocast_and_bf16_stay_close_to_fp32() -> None:
    hidden, weight = torch.randn(40, 32), 0.2 * torch.randn(50, 32)
    options = {"path_M": torch.ones(40), "entropy_M": torch.ones(40), "targets_M": torch.arange(40)}

    def gradients(h: Tensor, w: Tensor, autocast: bool) -> tuple[TokenLosses, Tensor, Tensor]:
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = run(h, w, **options)
        out.total.backward()
        return out, h.grad, w.grad

    exact = gradients(hidden, weight, False)
    for got in (gradients(hidden, weight, True), gradients(hidden.bfloat16(), weight.bfloat16(), False)):
        assert got[0].nll_M.dtype == torch.float32
        torch.testing.assert_close(got[0].nll_M, exact[0].nll_M, rtol=0.02, atol=0.02)
        for ours, theirs in zip(got[1:], exact[1:], strict=True):
            error = (ours.float() - theirs).norm() / theirs.norm()
            assert 1e-6 < error < 0.03, error
    assert gradients(hidden, weight, True)[2].dtype == torch.float32
