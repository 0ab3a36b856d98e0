"""Cross-entropy, path term and entropy of chosen rows, chunk by chunk, with gradients made in the forward pass.

M rows, D hidden, V vocabulary. Logits exist for one chunk of rows at a time; because the losses are sums with weights
that are known beforehand, each chunk's gradient is final as soon as its logits are there, and the backward pass only
scales it (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_core.kernels.dispatch import rows_per_chunk


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
    weight is accumulated in fp32. Peak extra memory: about four fp32 buffers [chunk_rows, V] and one [V, D].

    Args:
        hidden_MD: states the head reads, float.
        weight_VD: rows of the head, float.
        targets_M: int64 ids; never a blocked one.
        ce_M: weights of the cross-entropy, fp32, without gradient.
        path_M: weights of the path term; None leaves it out.
        entropy_M: weights of the entropy term; None leaves it out.
        entropy_temperature: T > 0.
        blocked_V: bool; ids whose logit is -inf.
        chunk_rows: rows of logits held at a time; default by vocabulary and device.
    """
    wants = torch.is_grad_enabled()
    needs = (wants and hidden_MD.requires_grad, wants and weight_VD.requires_grad)
    zeros_M = torch.zeros_like(ce_M, dtype=torch.float32)
    weights_3M = torch.stack([ce_M.float(), *(zeros_M if w is None else w.float() for w in (path_M, entropy_M))])
    rows = chunk_rows or rows_per_chunk(weight_VD.shape[0], hidden_MD.device.type)
    settings = _Settings(entropy_M is not None, entropy_temperature, blocked_V, rows, _product_dtype(hidden_MD), needs)
    total, nll_M, correct_M, entropy_out_M = _TokenLosses.apply(
        hidden_MD, weight_VD, targets_M, weights_3M.detach(), settings
    )
    return TokenLosses(total, nll_M, correct_M, entropy_out_M)


@dataclass(frozen=True)
class _Settings:
    entropy: bool
    temperature: float
    blocked_V: Tensor | None
    chunk_rows: int
    dtype: torch.dtype
    needs: tuple[bool, bool]


def _product_dtype(hidden_MD: Tensor) -> torch.dtype:
    kind = hidden_MD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_MD.dtype


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
        logits_CV = (hidden_CD @ weight_cast_VD.T).float()
        if settings.blocked_V is not None:
            logits_CV.masked_fill_(settings.blocked_V, -torch.inf)
        grad_CV = _chunk(logits_CV, targets_M[rows], weights_3M[:, rows], parts_3M[:, rows], settings)
        if grad_CV is None:
            continue
        grad_CV = grad_CV.to(settings.dtype)
        if grad_hidden_MD is not None:
            grad_hidden_MD[rows] = (grad_CV @ weight_cast_VD).to(hidden_MD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD += grad_CV.T @ hidden_CD
    return parts_3M, grad_hidden_MD, grad_weight_VD


def _chunk(
    logits_CV: Tensor, targets_C: Tensor, weights_3C: Tensor, parts_3C: Tensor, settings: _Settings
) -> Tensor | None:
    """Fill nll, correct and entropy of a chunk; return d total / d logits in the buffer of `logits_CV`."""
    ce_C, path_C, entropy_weight_C = weights_3C
    correct_C = logits_CV.argmax(-1) == targets_C
    logp_CV = logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))
    nll_C = -logp_CV.gather(-1, targets_C[:, None])[:, 0]
    parts_3C[0] = nll_C
    parts_3C[1] = correct_C
    entropy_rows = torch.empty(0, dtype=torch.long, device=logits_CV.device)
    if settings.entropy:
        entropy_rows = (correct_C & (entropy_weight_C != 0)).nonzero()[:, 0]
    if len(entropy_rows):
        logq_EV = (logp_CV[entropy_rows] / settings.temperature).log_softmax(-1)
        # 0 * -inf of blocked ids must be 0
        logq_EV.clamp_(min=torch.finfo(torch.float32).min)
        q_EV = logq_EV.exp()
        entropy_E = -(q_EV * logq_EV).sum(-1)
        parts_3C[2, entropy_rows] = entropy_E
    if not any(settings.needs):
        return None
    scale_C = ce_C + path_C * torch.exp(-nll_C)
    grad_CV = logp_CV.exp_().mul_(scale_C[:, None])
    grad_CV.scatter_add_(-1, targets_C[:, None], -scale_C[:, None])
    if len(entropy_rows):
        factor_E = -entropy_weight_C[entropy_rows] / settings.temperature
        grad_CV[entropy_rows] += logq_EV.add_(entropy_E[:, None]).mul_(q_EV).mul_(factor_E[:, None])
    return grad_CV
