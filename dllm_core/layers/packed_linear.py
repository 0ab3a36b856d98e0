"""Products with weights that are laid out once, for inference on a CPU, and what can be done inside a product.

Left as they are, oneDNN would reorder bf16 weights in every product, and fp32 products would go to a library that is
several times slower on some CPUs. A weight that `layout` could not reorder stays as it is, and every function here
takes both kinds. Without gradients.

R rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layout = Callable[[Tensor], Tensor]
"""A weight as it is -> as it is multiplied with."""


@cache
def reorders(dtype: torch.dtype) -> bool:
    """Say whether this torch multiplies with weights that oneDNN has reordered on the CPU, and gets it right."""
    x, weight, other = (torch.randn(rows, 32).to(dtype) for rows in (3, 32, 3))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        found = (
            linear(x, packed, gelu=True),
            gated(x, packed, packed),
            linear_plus(x, packed, other),
        )
    except (AttributeError, RuntimeError):
        return False
    x, weight, other = x.double(), weight.double(), other.double()
    exact = (linear(x, weight, gelu=True), gated(x, weight, weight), linear_plus(x, weight, other))
    close = ((a.double() - b).norm() < 1e-2 * b.norm() for a, b in zip(found, exact, strict=True))
    return packed.is_mkldnn and all(map(bool, close))


def layout(device: torch.device, dtype: torch.dtype, rows: int) -> Layout:
    """Return how weights are laid out: reordered once for oneDNN on a CPU, as they are elsewhere.

    Args:
        device: of the weights.
        dtype: of weights and states.
        rows: rows of a typical product.
    """
    if device.type != "cpu" or not reorders(dtype):
        return lambda weight: weight.detach()
    return lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Return x weight^T + bias, through GELU (tanh form) where asked; `weight` as `layout` returned it."""
    if weight.is_mkldnn:
        name, form = ("gelu", "tanh") if gelu else ("none", "")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], form)
        return out
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


def gated(
    x_RI: Tensor, gate_OI: Tensor, up_OI: Tensor, gate_O: Tensor | None = None, up_O: Tensor | None = None
) -> Tensor:
    """Return silu(x gate^T + gate bias) * (x up^T + up bias), [R, O]; weights as `layout` returned them."""
    if not gate_OI.is_mkldnn:
        return F.silu(F.linear(x_RI, gate_OI, gate_O)).mul_(F.linear(x_RI, up_OI, up_O))
    open_RO = torch.ops.mkldnn._linear_pointwise(x_RI, gate_OI, gate_O, "swish", [], "")
    out_RO: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_RI, open_RO, up_OI, up_O, "mul")
    return out_RO


def linear_plus(x_RI: Tensor, weight_OI: Tensor, other_RO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return other + x weight^T + bias, [R, O]; `weight_OI` as `layout` returned it."""
    if not weight_OI.is_mkldnn:
        return F.linear(x_RI, weight_OI, bias_O).add_(other_RO)
    out_RO: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_RI, other_RO, weight_OI, bias_O, "add")
    return out_RO


class Product(NamedTuple):
    """A matrix [O, I] as `layout` returned it, and its bias."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: nn.Linear, lay: Layout) -> Product:
        """Take a module's weights."""
        return cls(lay(module.weight), None if module.bias is None else module.bias.detach())

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product, with its bias."""
        return linear(x, self.weight, self.bias)

    def plus(self, x_RI: Tensor, other_RO: Tensor) -> Tensor:
        """Return the product added to another tensor."""
        return linear_plus(x_RI, self.weight, other_RO, self.bias)

    def onto(self, other_RO: Tensor, x_RI: Tensor) -> Tensor:
        """Return the product added to `other_RO`, in its place where that saves a launch."""
        if self.weight.is_mkldnn:
            return self.plus(x_RI, other_RO)
        other_RO.addmm_(x_RI, self.weight.t())
        return other_RO if self.bias is None else other_RO.add_(self.bias)


def products(modules: Sequence[nn.Linear], lay: Layout, *, join: bool) -> tuple[Product, ...]:
    """Return the products of modules that read the same states: a copy with one matrix over the other, or one each.

    Args:
        modules: either all of them have a bias or none has.
        lay: from `layout`.
        join: make one product of them.
    """
    if not join:
        return tuple(Product.of(module, lay) for module in modules)
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    assert len(biases) in (0, len(modules)), "either all have a bias or none"
    weight_OI = torch.cat([module.weight.detach() for module in modules])
    return (Product(lay(weight_OI), torch.cat(biases) if biases else None),)
