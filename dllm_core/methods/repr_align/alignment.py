"""The alignment term and the teacher's side of it. R forwarded rows, L length, M aligned tokens, D hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dllm_core.data.anchors import AnchorStore

_FP32 = torch.float32
_TINY = 1e-8


def alignment_loss(
    student: Mapping[str, Tensor], rows: tuple[Tensor, Tensor], teacher: Mapping[str, Tensor], weight_M: Tensor
) -> Tensor:
    """Return the sum over tokens m of weight_m times the mean over layers of 1 - cos(student, sg(teacher)), fp32.

    Args:
        student: layer name -> states [R, L, D], with gradient.
        rows: (r, i), int64 [M] each: the student's states to compare; no pair twice.
        teacher: the same layers -> states [M, D]; moved to the student's device.
        weight_M: share of each token in the global mean.
    """
    row_M, position_M = rows
    total = torch.zeros((), device=weight_M.device)
    for name, target_MD in teacher.items():
        states_RLD = student[name]
        flat_M = row_M * states_RLD.shape[1] + position_M
        target_MD = target_MD.detach().to(states_RLD.device)
        total = total + _CosineDistance.apply(states_RLD, flat_M, target_MD, weight_M.detach())
    return total / max(1, len(teacher))


class _CosineDistance(torch.autograd.Function):
    """Sum of weight * (1 - cos) over chosen rows; the gradient of those rows is made while they are at hand.

    d cos / d s = (t / |t| - cos s / |s|) / |s|. Autograd through the textbook formula would keep several copies of the
    rows for every layer and walk over each of them again.
    """

    @staticmethod
    def forward(ctx: Any, states_RLD: Tensor, flat_M: Tensor, target_MD: Tensor, weight_M: Tensor) -> Tensor:
        state_MD = states_RLD.flatten(0, 1).index_select(0, flat_M).to(torch.promote_types(states_RLD.dtype, _FP32))
        target_MD = target_MD.to(state_MD.dtype)
        scale_M1 = torch.linalg.vector_norm(state_MD, dim=-1, keepdim=True).clamp(min=_TINY).reciprocal()
        target_MD = target_MD / torch.linalg.vector_norm(target_MD, dim=-1, keepdim=True).clamp(min=_TINY)
        state_MD = state_MD.mul_(scale_M1)
        cosine_M1 = torch.linalg.vecdot(state_MD, target_MD)[:, None]
        if ctx.needs_input_grad[0]:
            factor_M1 = scale_M1.mul_(-weight_M[:, None])
            grad_MD = state_MD.mul_(-cosine_M1).add_(target_MD).mul_(factor_M1)
            ctx.save_for_backward(grad_MD.to(states_RLD.dtype), flat_M)
            ctx.shape = states_RLD.shape
        return (weight_M * (1.0 - cosine_M1[:, 0])).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad_MD, flat_M = ctx.saved_tensors
        grad_RLD = grad_MD.new_zeros(ctx.shape)
        grad_RLD.flatten(0, 1).index_copy_(0, flat_M, grad_MD * grad.to(grad_MD.dtype))
        return grad_RLD, None, None, None


def read_anchors(
    store: AnchorStore, keys: Sequence[str], layers: Sequence[str], rows: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Return layer -> stored teacher states [M, D] at (b, i), in the order of `rows`; only these rows are read.

    Args:
        store: of the frozen teacher.
        keys: sequence key of each row b.
        layers: what to read.
        rows: (b, i), int64 [M] each.
    """
    row_M, position_M = (index.cpu() for index in rows)
    order_M = torch.argsort(row_M, stable=True)
    wanted = sorted(set(row_M.tolist()))
    stored = store.gather(
        [keys[row] for row in wanted], layers, [position_M[order_M][row_M[order_M] == row] for row in wanted]
    )
    back_M = torch.argsort(order_M)
    return {layer: states_MD.index_select(0, back_M) for layer, states_MD in stored.items()}
