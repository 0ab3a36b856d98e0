"""Most probable token, its log-probability, the runner-up's, and the entropy of each row.

M rows, D hidden, V vocabulary. Logits exist for one chunk of rows at a time.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_core.kernels.dispatch import rows_per_chunk
from dllm_core.layers.packed_linear import linear

CACHED_ELEMENTS = 2**19
"""fp32 numbers that are worked on together on a CPU: 2 MB."""
ARGMAX_PIECE = 1024
LOG2_E = 1 / log(2)


class TokenStats(NamedTuple):
    """Statistics of M distributions at temperature 1.

    Attributes:
        argmax_M: int64; the lowest id among equals.
        top_logprob_M: log p of it, nats, fp32.
        second_logprob_M: log p of the runner-up (an equal of the first where there is a tie), nats, fp32; -inf where
            only one id is allowed; None when not asked for.
        entropy_M: nats, fp32; None when not asked for.
    """

    argmax_M: Tensor
    top_logprob_M: Tensor
    second_logprob_M: Tensor | None
    entropy_M: Tensor | None


@torch.no_grad()
def stats(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    blocked_V: Tensor | None = None,
    chunk_rows: int | None = None,
    *,
    second: bool = True,
    entropy: bool = False,
) -> TokenStats:
    """Return what `token_stats.stats` describes, a chunk of logits at a time; autocast applies to the product."""
    num_rows, device = len(hidden_MD), hidden_MD.device
    argmax_M = torch.empty(num_rows, dtype=torch.long, device=device)
    top_M, second_M, entropy_M = (torch.empty(num_rows, device=device) for _ in range(3))
    step = chunk_rows or rows_per_chunk(weight_VD.shape[0], device.type)
    # the product wants many rows at once; what follows wants a piece that stays in the CPU's cache
    piece = step if device.type != "cpu" else max(1, CACHED_ELEMENTS // weight_VD.shape[0])
    for start in range(0, num_rows, step):
        logits_CV = linear(hidden_MD[start : start + step], weight_VD)
        for offset in range(0, len(logits_CV), piece):
            part_CV = logits_CV[offset : offset + piece]
            rows = slice(start + offset, start + offset + len(part_CV))
            if blocked_V is not None:
                part_CV.masked_fill_(blocked_V, -torch.inf)
            argmax_M[rows] = argmax(part_CV)
            at_C1 = argmax_M[rows][:, None]
            part_CV = part_CV.float()
            best_C1 = part_CV.gather(-1, at_C1)
            if second:
                part_CV.scatter_(-1, at_C1, -torch.inf)
                second_M[rows] = part_CV.amax(-1) - best_C1[:, 0]
                part_CV.scatter_(-1, at_C1, best_C1)
            # logits relative to the best one: log p(top) = -log sum exp
            part_CV.sub_(best_C1)
            # to base 2, since torch's exp2 takes a third of the time of its exp on some CPUs
            p_CV = (part_CV * LOG2_E if entropy else part_CV.mul_(LOG2_E)).exp2_()
            norm_C = p_CV.sum(-1)
            top_M[rows] = -norm_C.log()
            if entropy:
                # 0 * -inf of blocked ids must be 0
                weighted_C = p_CV.mul_(part_CV.clamp_(min=torch.finfo(torch.float32).min)).sum(-1)
                entropy_M[rows] = norm_C.log() - weighted_C / norm_C
    return TokenStats(argmax_M, top_M, top_M + second_M if second else None, entropy_M if entropy else None)


def argmax(logits_MV: Tensor) -> Tensor:
    """Return int64 [M], the lowest id among equals.

    By pieces: maxima without places pass over memory several times faster on a CPU than `torch.argmax` does, and on a
    GPU there is work for every multiprocessor.
    """
    vocab = logits_MV.shape[-1]
    whole = vocab // ARGMAX_PIECE * ARGMAX_PIECE
    best = [logits_MV[:, :whole].unflatten(-1, (-1, ARGMAX_PIECE)).amax(-1)] if whole else []
    if whole < vocab:
        best.append(logits_MV[:, whole:].amax(-1, keepdim=True))
    start_M1 = torch.cat(best, dim=-1).argmax(-1, keepdim=True) * ARGMAX_PIECE
    within = torch.arange(ARGMAX_PIECE, device=logits_MV.device)
    # past the end the last id stands again: behind itself, where it cannot win against itself
    candidates = logits_MV.gather(-1, (start_M1 + within).clamp(max=vocab - 1))
    return start_M1[:, 0] + candidates.argmax(-1)
