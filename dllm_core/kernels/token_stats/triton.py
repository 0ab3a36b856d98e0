"""Token statistics in one pass over the rows of the head: no logit ever reaches memory.

M rows, D hidden, V vocabulary, S splits of the vocabulary. A program multiplies a block of rows with some tiles of the
vocabulary and keeps, for each row, the largest logit m, its id, the runner-up, sum exp(x - m) and the moment
sum exp(x - m) (x - m); when a larger m comes along, the sums are rescaled (online softmax, arXiv 1805.02867; the
entropy is log sum - moment / sum). With one row or 64 the reading of the head decides, so the vocabulary is split over
as many programs as keep every multiprocessor busy, and a second small kernel merges their partial results. Programs
that differ in their rows alone are neighbours: they find the tile of the head in the L2 cache.

Products accumulate in fp32 and are not rounded to the input dtype, as a logit of the reference is. A row with a nan
returns nan statistics and the id of its first nan, as torch does.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_core.kernels.dispatch import interpreted, product_dtype
from dllm_core.kernels.launch import multiprocessors, scope, shared_memory
from dllm_core.kernels.token_stats.reference import TokenStats

PROGRAMS_PER_MULTIPROCESSOR = 8
"""Enough that the last round of programs, when some multiprocessors idle, is a small part of the whole."""


class Tiling(NamedTuple):
    """Sizes of a launch: rows, ids and hidden units of a tile, warps of a program, stages of its pipeline."""

    rows: int
    ids: int
    depth: int
    warps: int
    stages: int


def tiling(num_rows: int, element_bytes: int, shared_bytes: int) -> Tiling:
    """Return the tile sizes for a number of rows; few rows leave small tiles, of which several fit a multiprocessor."""
    if num_rows <= 32:
        rows, ids, row_bytes, warps = 16 if num_rows <= 16 else 32, 64, 256, 4
    elif num_rows <= 64:
        rows, ids, row_bytes, warps = 64, 128, 128, 4
    else:
        rows, ids, row_bytes, warps = 128, 128, 128, 8
    # a tenth is left for the reductions
    stages = int(0.9 * shared_bytes) // ((rows + ids) * row_bytes)
    return Tiling(rows, ids, row_bytes // element_bytes, warps, max(2, min(4, stages)))


def stats(
    hidden_MD: Tensor, weight_VD: Tensor, blocked_V: Tensor | None = None, *, second: bool = True, entropy: bool = False
) -> TokenStats:
    """Return what `token_stats.stats` describes. Extra memory: 20 bytes per row and split."""
    dtype, device = product_dtype(hidden_MD), hidden_MD.device
    hidden_MD, weight_VD = (x.to(dtype) for x in (hidden_MD, weight_VD))
    hidden_MD, weight_VD = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden_MD, weight_VD))
    (num_rows, depth), num_columns = hidden_MD.shape, len(weight_VD)
    tile = tiling(num_rows, dtype.itemsize, shared_memory(device))
    blocks, tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(num_columns, tile.ids)
    per_split = max(1, tiles * blocks // (PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device)))
    splits = triton.cdiv(tiles, per_split)
    argmax_M = torch.empty(num_rows, dtype=torch.long, device=device)
    out_3M = torch.empty(3, num_rows, device=device)
    if num_rows:
        partial_4SM = torch.empty(4, splits, num_rows, device=device)
        at_SM = torch.empty(splits, num_rows, dtype=torch.int32, device=device)
        asked = {"SECOND": second, "ENTROPY": entropy}
        with scope(device):
            _partial_stats[(blocks, splits)](
                hidden_MD,
                weight_VD,
                # any tensor does where it is not read
                hidden_MD if blocked_V is None else blocked_V.contiguous().view(torch.uint8),
                partial_4SM,
                at_SM,
                num_rows,
                num_columns,
                depth,
                hidden_MD.stride(0),
                weight_VD.stride(0),
                per_split,
                HAS_BLOCKED=blocked_V is not None,
                PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
                # the interpreter keeps bf16 as bits and would multiply those
                WIDEN=interpreted(),
                BLOCK_M=tile.rows,
                BLOCK_V=tile.ids,
                BLOCK_D=tile.depth,
                **asked,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
            _merged_stats[(num_rows,)](
                partial_4SM, at_SM, argmax_M, out_3M, num_rows, splits, BLOCK_S=triton.next_power_of_2(splits), **asked
            )
    top_M, second_M, entropy_M = out_3M
    return TokenStats(argmax_M, top_M, second_M if second else None, entropy_M if entropy else None)


@triton.jit
def _tile_logits(
    hidden_rows: tl.tensor,
    weight_rows: tl.tensor,
    row_exists: tl.tensor,
    column_exists: tl.tensor,
    depth: tl.tensor,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    logits = tl.zeros((hidden_rows.shape[0], weight_rows.shape[0]), tl.float32)
    for start in range(0, depth, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)[None, :]
        states = tl.load(hidden_rows + at, mask=row_exists & (at < depth), other=0.0)
        head = tl.load(weight_rows + at, mask=column_exists & (at < depth), other=0.0)
        if WIDEN:
            states, head = states.to(tl.float32), head.to(tl.float32)
        logits = tl.dot(states, tl.trans(head), logits, input_precision=PRECISION)
    return logits


@triton.jit
def _partial_stats(
    hidden: tl.tensor,
    weight: tl.tensor,
    blocked: tl.tensor,
    partial: tl.tensor,
    partial_at: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    depth: tl.tensor,
    hidden_stride: tl.tensor,
    weight_stride: tl.tensor,
    tiles_per_split: tl.tensor,
    HAS_BLOCKED: tl.constexpr,
    SECOND: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    hidden_rows = hidden + rows.to(tl.int64)[:, None] * hidden_stride
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    best_at = tl.zeros((BLOCK_M,), tl.int32)
    runner_up = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(num_columns, BLOCK_V))):
        lane = tl.arange(0, BLOCK_V)
        columns = tile * BLOCK_V + lane
        allowed = columns < num_columns
        weight_rows = weight + columns.to(tl.int64)[:, None] * weight_stride
        logits = _tile_logits(
            hidden_rows, weight_rows, (rows < num_rows)[:, None], allowed[:, None], depth, PRECISION, WIDEN, BLOCK_D
        )
        if HAS_BLOCKED:
            allowed = allowed & (tl.load(blocked + columns, mask=allowed, other=1) == 0)
        # nan counts as the largest, so that the id found is a real one
        key = tl.where(allowed[None, :], tl.where(logits != logits, float("inf"), logits), float("-inf"))
        tile_best, tile_at = tl.max(key, axis=1, return_indices=True)
        if SECOND:
            others = tl.max(tl.where(lane[None, :] == tile_at[:, None], float("-inf"), key), axis=1)
            runner_up = tl.maximum(tl.maximum(runner_up, others), tl.minimum(best, tile_best))
        new_best = tl.maximum(best, tile_best)
        best_at = tl.where(tile_best > best, tile * BLOCK_V + tile_at, best_at)
        # as long as nothing is allowed the best is -inf, and -inf less -inf is nan
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        gap = tl.where(best == float("-inf"), 0.0, best - shift)
        relative = tl.where(allowed[None, :], logits, float("-inf")) - shift[:, None]
        p = tl.exp(relative)
        decay = tl.exp(gap)
        if ENTROPY:
            moment = decay * (moment + norm * gap) + tl.sum(tl.where(p > 0, p * relative, 0.0), axis=1)
        norm = norm * decay + tl.sum(p, axis=1)
        best = new_best
    out = partial + split * num_rows + rows
    plane = tl.num_programs(1) * num_rows
    tl.store(partial_at + split * num_rows + rows, best_at, mask=rows < num_rows)
    tl.store(out, best, mask=rows < num_rows)
    tl.store(out + plane, norm, mask=rows < num_rows)
    if SECOND:
        tl.store(out + 2 * plane, runner_up, mask=rows < num_rows)
    if ENTROPY:
        tl.store(out + 3 * plane, moment, mask=rows < num_rows)


@triton.jit
def _merged_stats(
    partial: tl.tensor,
    partial_at: tl.tensor,
    argmax: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    SECOND: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    splits = tl.arange(0, BLOCK_S)
    inside = splits < num_splits
    at = splits * num_rows + row
    plane = num_splits * num_rows
    best = tl.load(partial + at, mask=inside, other=float("-inf"))
    norm = tl.load(partial + plane + at, mask=inside, other=0.0)
    ids = tl.load(partial_at + at, mask=inside, other=0)
    # splits are in the order of their ids: the first of equal ones holds the lowest id
    top, winner = tl.max(best, axis=0, return_indices=True)
    gap = tl.where(best == float("-inf"), 0.0, best - top)
    decay = tl.exp(gap)
    log_norm = tl.log(tl.sum(norm * decay, axis=0))
    tl.store(argmax + row, tl.sum(tl.where(splits == winner, ids, 0), axis=0).to(tl.int64))
    tl.store(out + row, -log_norm)
    if SECOND:
        runner_up = tl.load(partial + 2 * plane + at, mask=inside, other=float("-inf"))
        second = tl.max(tl.where(splits == winner, runner_up, best), axis=0)
        tl.store(out + num_rows + row, second - top - log_norm)
    if ENTROPY:
        moment = tl.load(partial + 3 * plane + at, mask=inside, other=0.0)
        mean = tl.sum(decay * (moment + norm * gap), axis=0) / tl.sum(norm * decay, axis=0)
        tl.store(out + 2 * num_rows + row, log_norm - mean)
