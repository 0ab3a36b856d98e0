"""Cross-entropy, path term and entropy of chosen rows, chunk by chunk, with gradients made in the forward pass.

M rows, C rows of a chunk, D hidden, V vocabulary. Logits exist for one chunk of rows at a time; because the losses are
sums with weights that are known beforehand, each chunk's gradient is final as soon as its logits are there, and the
backward pass only scales it (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989). The matrix products are
the library's; what happens between them (`ChunkLosses`) has a reference and a Triton kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_core.kernels.dispatch import choose, product_dtype
from dllm_core.kernels.masked_ce import reference
from dllm_core.kernels.masked_ce.terms import Terms

ChunkLosses = Callable[[Tensor, Tensor, Tensor, Tensor, Terms], Tensor | None]
"""See `reference.chunk_losses`."""


@dataclass(frozen=True)
class TokenLosses:
    """Result of `token_losses`.

    Attributes:
        total: scalar, fp32, in nats times the given weights; carries the gradient.
        nll_M: -log p(target) in nats, fp32, detached.
        correct_M: bool; the target is the most probable token.
        entropy_M: entropy in nats at the entropy temperature where it entered the total, else 0; fp32, detached.
    """

    total: Tensor
    nll_M: Tensor
    correct_M: Tensor
    entropy_M: Tensor


def token_losses(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    ce_M: Tensor,
    path_M: Tensor | None = None,
    entropy_M: Tensor | None = None,
    entropy_temperature: float = 0.5,
    blocked_V: Tensor | None = None,
    chunk_rows: int | None = None,
) -> TokenLosses:
    """Return sum_m ce * nll + path * sg(p) * nll + entropy * [correct] * H_T and its parts.

    nll = -log p(target), p = exp(-nll), sg stops the gradient, H_T is the entropy of softmax(logits / T), [correct]
    is 1 where the target is the argmax. Softmax arithmetic is fp32 whatever the dtype of the inputs; the matrix
    products run in the autocast dtype where autocast is on, else in the dtype of `hidden_MD`; the gradient of the
    weight is accumulated in fp32. Peak extra memory: one fp32 [V, D], and of [chunk_rows, V] about four fp32 buffers
    (reference) or one in the dtype of the products (Triton).

    Args:
        hidden_MD: states the head reads, float.
        weight_VD: rows of the head, float.
        targets_M: int64 ids; never a blocked one.
        ce_M: weights of the cross-entropy, fp32, without gradient.
        path_M: weights of the path term; None leaves it out.
        entropy_M: weights of the entropy term; None leaves it out.
        entropy_temperature: T > 0.
        blocked_V: bool; ids whose logit is -inf.
        chunk_rows: rows of logits held at a time; default by vocabulary, device and implementation.
    """
    dtype = product_dtype(hidden_MD)
    chunk_losses, usual_rows = _implementation(hidden_MD.device, dtype, len(weight_VD))
    wants = torch.is_grad_enabled()
    needs = (wants and hidden_MD.requires_grad, wants and weight_VD.requires_grad)
    zeros_M = torch.zeros_like(ce_M, dtype=torch.float32)
    weights_3M = torch.stack([ce_M.float(), *(zeros_M if w is None else w.float() for w in (path_M, entropy_M))])
    terms = Terms(entropy_M is not None, entropy_temperature, blocked_V, any(needs))
    settings = _Settings(terms, chunk_losses, chunk_rows or usual_rows, dtype, needs)
    total, nll_M, correct_M, entropy_out_M = _TokenLosses.apply(
        hidden_MD, weight_VD, targets_M, weights_3M.detach(), settings
    )
    return TokenLosses(total, nll_M, correct_M, entropy_out_M)


def _implementation(device: torch.device, dtype: torch.dtype, num_columns: int) -> tuple[ChunkLosses, int]:
    """Return what turns logits into gradients, and how many rows it is given at a time."""
    name, _ = choose("masked_ce", device, dtype)
    if name == "reference":
        return reference.chunk_losses, reference.usual_rows(num_columns, device)
    from dllm_core.kernels.masked_ce import triton

    return triton.chunk_losses, triton.usual_rows(num_columns)


@dataclass(frozen=True)
class _Settings:
    terms: Terms
    chunk_losses: ChunkLosses
    chunk_rows: int
    dtype: torch.dtype
    needs: tuple[bool, bool]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, weights_3M: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(hidden_MD.device.type, enabled=False):
            parts_3M, grad_hidden_MD, grad_weight_VD = _run(hidden_MD, weight_VD, targets_M, weights_3M, settings)
        nll_M, hit_M, entropy_M = parts_3M
        ce_M, path_M, entropy_weight_M = weights_3M
        total = ((ce_M + path_M * torch.exp(-nll_M)) * nll_M + entropy_weight_M * entropy_M).sum()
        ctx.grads = [grad_hidden_MD, grad_weight_VD]
        correct_M = hit_M.bool()
        ctx.mark_non_differentiable(nll_M, correct_M, entropy_M)
        return total, nll_M, correct_M, entropy_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("The gradients of token_losses were already used; run the forward pass again.")
        # handed on without a copy: the weight's gradient may be the largest tensor of the step
        grad_hidden_MD, grad_weight_VD = (None if g is None else g.mul_(grad_total) for g in ctx.grads)
        ctx.grads = None
        return grad_hidden_MD, grad_weight_VD, None, None, None


def _run(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, weights_3M: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    needs_hidden, needs_weight = settings.needs
    weight_cast_VD = weight_VD.to(settings.dtype)
    parts_3M = torch.zeros_like(weights_3M)
    grad_hidden_MD = torch.zeros_like(hidden_MD) if needs_hidden else None
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
    for start in range(0, len(hidden_MD), settings.chunk_rows):
        rows = slice(start, start + settings.chunk_rows)
        hidden_CD = hidden_MD[rows].to(settings.dtype)
        grad_CV = settings.chunk_losses(
            # no name for the logits: the buffer is the callee's to overwrite or to free
            hidden_CD @ weight_cast_VD.T,
            targets_M[rows],
            weights_3M[:, rows],
            parts_3M[:, rows],
            settings.terms,
        )
        if grad_CV is None:
            continue
        if grad_hidden_MD is not None:
            grad_hidden_MD[rows] = (grad_CV @ weight_cast_VD).to(hidden_MD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD += grad_CV.T @ hidden_CD
    return parts_3M, grad_hidden_MD, grad_weight_VD
