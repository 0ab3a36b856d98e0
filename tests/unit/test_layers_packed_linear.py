"""Products with weights laid out for oneDNN against the same in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_core.layers import packed_linear as packed

CPU = torch.device("cpu")


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("shape", [(10,), (1,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_plain_weights(dtype: torch.dtype, shape: tuple[int, ...], laid_out: bool) -> None:
    """Also for other numbers of rows than the layout was made for; nothing given is written to."""
    if laid_out and not packed.reorders(dtype):
        pytest.skip("this torch does not reorder weights")
    lay = packed.layout(CPU, dtype, 10) if laid_out else torch.Tensor.detach
    x, other = torch.randn(*shape, 24).to(dtype), torch.randn(*shape, 40).to(dtype)
    weight, up = torch.randn(40, 24).to(dtype), torch.randn(40, 24).to(dtype)
    bias, up_bias = torch.randn(40).to(dtype), torch.randn(40).to(dtype)
    given = [t.clone() for t in (x, other, weight, up, bias, up_bias)]
    laid, laid_up = lay(weight), lay(up)
    assert laid.is_mkldnn == laid_out
    x64, w64, up64 = x.double(), weight.double(), up.double()
    bound = 1e-6 if dtype is torch.float32 else 8e-3
    with torch.no_grad():
        for b, up_b in ((None, None), (bias, up_bias)):
            exact = F.linear(x64, w64, None if b is None else b.double())
            exact_up = F.linear(x64, up64, None if up_b is None else up_b.double())
            assert error(packed.linear(x, laid, b), exact) < bound
            assert error(packed.linear(x, laid, b, gelu=True), F.gelu(exact, approximate="tanh")) < bound
            assert error(packed.linear_plus(x, laid, other, b), exact + other.double()) < bound
            assert error(packed.gated(x, laid, laid_up, b, up_b), F.silu(exact) * exact_up) < bound
    assert all(torch.equal(a, b) for a, b in zip(given, (x, other, weight, up, bias, up_bias), strict=True))


def test_a_dtype_that_onednn_does_not_know_stays_as_it_is() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64)
    assert not packed.reorders(torch.float64)
    assert packed.layout(CPU, torch.float64, 1)(weight).data_ptr() == weight.data_ptr()


def test_a_torch_without_the_operation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed.reorders.cache_clear()
    monkeypatch.setattr(packed, "gated", lambda *_: torch.zeros(3, 32))
    try:
        assert not packed.reorders(torch.float32), "a wrong product must not be used"
    finally:
        packed.reorders.cache_clear()
