"""How many tokens each denoising step accepts: exact counts, known before the first forward.

Every step makes progress, none is wasted, nothing is left over: `n` masked tokens in `S` steps take `min(S, n)`
forwards of `n // S` tokens, the first `n % S` of them one more (the quota of LLaDA's generate.py, arXiv 2502.09992).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def tokens_per_step(num_masked: int, steps: int) -> list[int]:
    """Return the tokens accepted at each step.

    Args:
        num_masked: tokens to fill, >= 0.
        steps: most steps to take, >= 1; more steps than tokens are not taken.

    Returns:
        `min(steps, num_masked)` counts, each at least 1, that sum to `num_masked`; larger ones first.
    """
    if num_masked < 0 or steps < 1:
        raise ValueError(f"tokens_per_step needs num_masked >= 0 and steps >= 1, got {num_masked} and {steps}")
    steps = min(steps, num_masked)
    if steps == 0:
        return []
    base, remainder = divmod(num_masked, steps)
    return [base + 1] * remainder + [base] * (steps - remainder)


def block_sizes(num_masked: int, block_size: int | None) -> list[int]:
    """Return the tokens of each block from left to right; only the last may be shorter."""
    size = block_size or max(1, num_masked)
    return [min(size, num_masked - start) for start in range(0, num_masked, size)]


def steps_per_block(blocks: Sequence[int], steps: int) -> list[int]:
    """Split the steps over blocks so that the largest number of tokens per step is as small as it can be.

    Args:
        blocks: tokens of each block, each at least 1.
        steps: steps for all blocks together, at least one for each.

    Returns:
        Steps of each block: between 1 and its number of tokens, `min(steps, sum(blocks))` in all. Among equals the
        leftmost block gets the spare step.
    """
    if steps < len(blocks):
        raise ValueError(f"{len(blocks)} blocks need at least as many steps, got {steps}")
    split = [1] * len(blocks)
    waiting = [(-float(size), i) for i, size in enumerate(blocks) if size > 1]
    heapq.heapify(waiting)
    for _ in range(min(steps, sum(blocks)) - len(blocks)):
        _, i = heapq.heappop(waiting)
        split[i] += 1
        if split[i] < blocks[i]:
            heapq.heappush(waiting, (-blocks[i] / split[i], i))
    return split


def block_schedule(blocks: Sequence[int], steps: int) -> list[list[int]]:
    """Return the tokens accepted at each step of each block, given the tokens of each block."""
    splits = steps_per_block(blocks, steps)
    return [tokens_per_step(size, split) for size, split in zip(blocks, splits, strict=True)]


def inspect_schedule(num_masked: int, steps: int, block_size: int | None = None) -> list[int]:
    """Return the tokens accepted at each forward of a scheduled rule; its length is the number of forwards."""
    return [count for block in block_schedule(block_sizes(num_masked, block_size), steps) for count in block]
