"""From a chunk of logits to its losses and their gradient, in torch: the CPU path and the oracle.

C rows of a chunk, V vocabulary, E rows whose entropy enters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_core.kernels.dispatch import rows_per_chunk
from dllm_core.kernels.masked_ce.terms import Terms


def usual_rows(num_columns: int, device: torch.device) -> int:
    """Return how many rows of logits to hold at a time."""
    return rows_per_chunk(num_columns, device.type)


def chunk_losses(
    logits_CV: Tensor, targets_C: Tensor, weights_3C: Tensor, parts_3C: Tensor, terms: Terms
) -> Tensor | None:
    """Fill the losses of a chunk and return d total / d logits.

    Args:
        logits_CV: in the dtype of the matrix products; overwritten.
        targets_C: int64 ids.
        weights_3C: weights of cross-entropy, path term and entropy, fp32.
        parts_3C: filled with nll and correct (0 or 1), fp32; with the entropy (0 where it does not count) if the terms
            name it, else its part must hold 0 already.
        terms: what enters the total.

    Returns:
        The gradient in the dtype of `logits_CV`; None when none is wanted.
    """
    dtype, logits_CV = logits_CV.dtype, logits_CV.float()
    if terms.blocked_V is not None:
        logits_CV.masked_fill_(terms.blocked_V, -torch.inf)
    ce_C, path_C, entropy_weight_C = weights_3C
    correct_C = logits_CV.argmax(-1) == targets_C
    logp_CV = logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))
    nll_C = -logp_CV.gather(-1, targets_C[:, None])[:, 0]
    parts_3C[0] = nll_C
    parts_3C[1] = correct_C
    entropy_rows = torch.empty(0, dtype=torch.long, device=logits_CV.device)
    if terms.entropy:
        entropy_rows = (correct_C & (entropy_weight_C != 0)).nonzero()[:, 0]
    if len(entropy_rows):
        logq_EV = (logp_CV[entropy_rows] / terms.temperature).log_softmax(-1)
        # 0 * -inf of blocked ids must be 0
        logq_EV.clamp_(min=torch.finfo(torch.float32).min)
        q_EV = logq_EV.exp()
        entropy_E = -(q_EV * logq_EV).sum(-1)
        parts_3C[2, entropy_rows] = entropy_E
    if not terms.gradient:
        return None
    scale_C = ce_C + path_C * torch.exp(-nll_C)
    grad_CV = logp_CV.exp_().mul_(scale_C[:, None])
    grad_CV.scatter_add_(-1, targets_C[:, None], -scale_C[:, None])
    if len(entropy_rows):
        factor_E = -entropy_weight_C[entropy_rows] / terms.temperature
        grad_CV[entropy_rows] += logq_EV.add_(entropy_E[:, None]).mul_(q_EV).mul_(factor_E[:, None])
    return grad_CV.to(dtype)
