"""From a chunk of logits to its losses and their gradient, in place: two readings of the logits and one writing.

C rows of a chunk, V vocabulary. The three matrix products around this kernel (logits, gradient of the states, gradient
of the head) stay with cuBLAS, as in Liger (arXiv 2410.10989). Kernels that never write a logit (Cut Your Losses, arXiv
2411.09009) recompute them for each of the two gradients: five products instead of three, where the products already
take most of the time, unless small gradients are dropped, which would not be exact. They would save one chunk, a
constant; the passes of the reference over fp32 copies of the chunk, about ten, go here too.

One program works on one row. In the first reading each of its lanes keeps the largest logit m it has seen, its id and
sums of exp(x - m), rescaled when a larger one comes along, with one exponential per logit; lanes meet once at the end.
Everything between the reading and the writing is fp32; gradients are rounded to the dtype of the products, as they are
by the reference. Nothing waits for the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_core.kernels.launch import scope
from dllm_core.kernels.masked_ce.terms import Terms

CHUNK_ELEMENTS = 2**28
"""Logits held at a time: 512 MB in bf16. Fewer and larger chunks: each one adds to all of the head's fp32 gradient."""
_ROW_MULTIPLE = 128
_BLOCK = 2048
_WARPS = 8
_LOWEST = tl.constexpr(-1e30)
"""Stands for -inf: differences from it are finite and their exponential is 0."""


def usual_rows(num_columns: int) -> int:
    """Return how many rows of logits to hold at a time, a whole number of the products' tiles."""
    rows = CHUNK_ELEMENTS // max(1, num_columns)
    return max(1, rows // _ROW_MULTIPLE * _ROW_MULTIPLE or rows)


def chunk_losses(
    logits_CV: Tensor, targets_C: Tensor, weights_3C: Tensor, parts_3C: Tensor, terms: Terms
) -> Tensor | None:
    """Do what `reference.chunk_losses` describes; the gradient is written over the logits."""
    num_rows, num_columns = logits_CV.shape
    assert logits_CV.is_contiguous()
    assert weights_3C.stride(1) == parts_3C.stride(1) == 1
    with scope(logits_CV.device):
        _row_losses[(num_rows,)](
            logits_CV,
            # any tensor does where it is not read
            logits_CV if terms.blocked_V is None else terms.blocked_V.contiguous().view(torch.uint8),
            targets_C.contiguous(),
            weights_3C,
            parts_3C,
            num_columns,
            weights_3C.stride(0),
            parts_3C.stride(0),
            1.0 / terms.temperature,
            HAS_BLOCKED=terms.blocked_V is not None,
            ENTROPY=terms.entropy,
            GRADIENT=terms.gradient,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return logits_CV if terms.gradient else None


@triton.jit
def _load_logits(
    row_logits: tl.tensor,
    blocked: tl.tensor,
    columns: tl.tensor,
    num_columns: tl.tensor,
    HAS_BLOCKED: tl.constexpr,
) -> tl.tensor:
    inside = columns < num_columns
    x = tl.load(row_logits + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BLOCKED:
        inside = inside & (tl.load(blocked + columns, mask=inside, other=1) == 0)
    return tl.where(inside, x, _LOWEST)


@triton.jit
def _read_row(
    row_logits: tl.tensor,
    blocked: tl.tensor,
    num_columns: tl.tensor,
    inverse_temperature: tl.tensor,
    HAS_BLOCKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple:
    """Return, for each lane, the largest logit and its id, sum exp(x - m), and sum and moment of y = x / T."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), _LOWEST, tl.float32)
    best_at = lane.to(tl.int32)
    norm = tl.zeros((BLOCK,), tl.float32)
    warm_norm = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + lane
        x = _load_logits(row_logits, blocked, columns, num_columns, HAS_BLOCKED)
        higher = x > best
        gap = -tl.abs(x - best)
        decay = tl.exp(gap)
        norm = tl.where(higher, norm * decay + 1.0, norm + decay)
        if ENTROPY:
            warm_gap = gap * inverse_temperature
            warm_decay = tl.exp(warm_gap)
            # what is 0 stays 0 times any gap
            moved = tl.where(warm_decay > 0, warm_decay * (moment + warm_norm * warm_gap), 0.0)
            added = moment + tl.where(warm_decay > 0, warm_decay * warm_gap, 0.0)
            moment = tl.where(higher, moved, added)
            warm_norm = tl.where(higher, warm_norm * warm_decay + 1.0, warm_norm + warm_decay)
        best_at = tl.where(higher, columns, best_at)
        best = tl.where(higher, x, best)
    return best, best_at, norm, warm_norm, moment


@triton.jit
def _row_losses(
    logits: tl.tensor,
    blocked: tl.tensor,
    targets: tl.tensor,
    weights: tl.tensor,
    parts: tl.tensor,
    num_columns: tl.tensor,
    weights_stride: tl.tensor,
    parts_stride: tl.tensor,
    inverse_temperature: tl.tensor,
    HAS_BLOCKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    row_logits = logits + row.to(tl.int64) * num_columns
    target = tl.load(targets + row)
    # read before the reductions below, whose barriers keep it before the first gradient is written
    target_logit = tl.load(row_logits + target).to(tl.float32)
    best, best_at, norm, warm_norm, moment = _read_row(
        row_logits, blocked, num_columns, inverse_temperature, HAS_BLOCKED, ENTROPY, BLOCK
    )
    top = tl.max(best, axis=0)
    # the lowest id among equals
    correct = tl.min(tl.where(best == top, best_at, num_columns), axis=0) == target
    gap = best - top
    # relative to the largest logit: sums and differences of large logits would lose digits
    lse = tl.log(tl.sum(norm * tl.exp(gap), axis=0))
    nll = lse - (target_logit - top)
    tl.store(parts + row, nll)
    tl.store(parts + parts_stride + row, correct.to(tl.float32))
    scale = tl.load(weights + row) + tl.load(weights + weights_stride + row) * tl.exp(-nll)
    entropy, factor, warm_lse = 0.0, 0.0, 0.0
    if ENTROPY:
        weight = tl.load(weights + 2 * weights_stride + row)
        warm_gap = gap * inverse_temperature
        warm_decay = tl.exp(warm_gap)
        total = tl.sum(warm_norm * warm_decay, axis=0)
        mean = tl.sum(tl.where(warm_decay > 0, warm_decay * (moment + warm_norm * warm_gap), 0.0), axis=0) / total
        warm_lse = tl.log(total)
        counts = correct & (weight != 0.0)
        entropy = tl.where(counts, warm_lse - mean, 0.0)
        factor = tl.where(counts, -weight * inverse_temperature, 0.0)
        tl.store(parts + 2 * parts_stride + row, entropy)
    if GRADIENT:
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            relative = _load_logits(row_logits, blocked, columns, num_columns, HAS_BLOCKED) - top
            gradient = scale * (tl.exp(relative - lse) - tl.where(columns == target, 1.0, 0.0))
            if ENTROPY:
                logq = relative * inverse_temperature - warm_lse
                q = tl.exp(logq)
                gradient += tl.where(q > 0, factor * q * (logq + entropy), 0.0)
            tl.store(row_logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < num_columns)
