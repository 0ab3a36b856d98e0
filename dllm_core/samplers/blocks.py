"""Where each row of a batch stands: its blocks from left to right, and what the next forward has to accept.

The plan lives on the host and every row has its own, so that a row's result does not depend on its neighbours. For
scheduled rules it never reads anything back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dllm_core.samplers.acceptance import AcceptanceRule
from dllm_core.samplers.pipeline_settings import MultiBlockConfig
from dllm_core.samplers.schedule import block_schedule

FINISHED = -2  # never equal to a block index, nor to the -1 of positions outside all blocks


def split_blocks(places: Sequence[int], block_size: int | None, model_block: int | None = None) -> list[list[int]]:
    """Return a row's places to fill, block by block from left to right.

    Blocks are counted over the places, so that masks anywhere (infilling) make full blocks too.

    Args:
        places: positions to fill, ascending.
        block_size: most places of a block; None is no limit.
        model_block: tokens of a block of a block-causal model, counted from the beginning of the row; no block crosses
            the border of one. None for models without.
    """
    groups = [list(g) for _, g in groupby(places, lambda p: p // model_block)] if model_block else [list(places)]
    size = block_size or max(1, len(places))
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def block_tables(blocks_of_rows: Sequence[Sequence[Sequence[int]]], length: int) -> tuple[Tensor, Tensor]:
    """Return (block_BC, place_BC), int64: the block of each position to fill, -1 elsewhere; its number in there."""
    block_BC = torch.full((len(blocks_of_rows), length), -1)
    place_BC = torch.zeros_like(block_BC)
    for row, blocks in enumerate(blocks_of_rows):
        for index, places in enumerate(blocks):
            block_BC[row, list(places)] = index
            place_BC[row, list(places)] = torch.arange(len(places))
    return block_BC, place_BC


@dataclass(frozen=True)
class Span:
    """Where a row works in one pass: its active blocks lie in positions start..stop-1.

    Attributes:
        start: first place of the leftmost active block; everything before it is final.
        stop: end of the rightmost one.
        block: index of the leftmost one.
    """

    start: int
    stop: int
    block: int


@dataclass(frozen=True)
class StepPlan:
    """What one forward has to do.

    Attributes:
        block_B: int64; the leftmost active block of each row, `FINISHED` for rows that are done.
        last_B: int64; the rightmost one: the same but in a pipeline.
        keep_BK: int64; candidates to accept (at least, for adaptive rules) in the active blocks of each row, from the
            leftmost on.
        num_scored: candidates in the whole batch.
        spans: where each row works, None for rows that are done.
        shares_left: of each row, (passes left, this one included) / passes of its block.
    """

    block_B: Tensor
    last_B: Tensor
    keep_BK: Tensor
    num_scored: int
    spans: tuple[Span | None, ...]
    shares_left: tuple[float, ...]


class RowPlan:
    """One row's way through its blocks.

    Args:
        blocks: places to fill of each block.
        steps: most forwards for the row.
        pipeline: when blocks join in before those on their left are done; None has one block active at a time.

    Attributes:
        schedule: tokens per step of each block.
        left: tokens of each block still masked.
        block: index of the leftmost active block, which the steps are counted for.
        last: index of the rightmost one.
        step: steps taken since `block` became the leftmost.
        finished: nothing more to do.
    """

    def __init__(self, blocks: Sequence[Sequence[int]], steps: int, pipeline: MultiBlockConfig | None = None) -> None:
        self.blocks, self.pipeline = blocks, pipeline
        self.left = [len(places) for places in blocks]
        self.schedule = block_schedule(self.left, steps)
        self.block = self.last = self.step = 0
        self.finished = not self.schedule
        self._end = len(blocks)  # blocks from here on are never begun

    @property
    def span(self) -> Span | None:
        """Where the row works now; None once it is finished."""
        if self.finished:
            return None
        return Span(self.blocks[self.block][0], self.blocks[self.last][-1] + 1, self.block)

    @property
    def share_left(self) -> float:
        """Passes that are left in the leftmost active block, of those it has; 0 once the row is finished."""
        if self.finished:
            return 0.0
        passes = len(self.schedule[self.block])
        return (passes - self.step) / passes

    def keep(self, rule: AcceptanceRule) -> tuple[list[int], int]:
        """Return (candidates to accept in each active block, candidates in all) of the next forward."""
        if self.finished:
            return [], 0
        counts = self.schedule[self.block]
        if rule.adaptive:
            joined = range(self.block + 1, self.last + 1)
            least = -(-self.left[self.block] // (len(counts) - self.step))
            return [least, *(self._forced(b) for b in joined)], sum(self.left[self.block : self.last + 1])
        if rule.revises:
            return [sum(counts[: self.step + 1])], sum(counts)
        return [counts[self.step]], self.left[self.block]

    def _forced(self, block: int) -> int:
        """Return how many tokens a block that joined gets in any case: one, if its left neighbour is far enough."""
        assert self.pipeline is not None
        return int(self.left[block] > 0 and self._progress(block - 1) >= self.pipeline.decoded_token_threshold)

    def _progress(self, block: int) -> float:
        size = len(self.blocks[block])
        return (size - self.left[block]) / size

    def advance(self, fixed_N: Sequence[int] | None) -> None:
        """Take one step; `fixed_N`: by how many the open places of each block became fewer, None as scheduled."""
        if self.finished:
            return
        if fixed_N is None:
            self.left[self.block] -= self.schedule[self.block][self.step]
        else:
            self.left = [left - fixed for left, fixed in zip(self.left, fixed_N, strict=False)]
        self.step += 1
        begun = self.last
        if self.left[self.block] == 0:
            self.step = 0
            while self.block <= self.last and self.left[self.block] == 0:
                self.block += 1
            self.last = max(self.last, self.block)
            self.finished = self.block == len(self.blocks)
        if self.pipeline and not self.finished and self.last == begun and self.last + 1 < self._end:
            far_enough = self._progress(self.last) >= self.pipeline.block_add_threshold
            self.last += int(far_enough or self.left[self.last] == 0)

    def end_at(self, position: int) -> None:
        """Begin no block behind a position, and leave those that were begun: the text ends there."""
        self._end = next(b for b, places in enumerate(self.blocks) if places[-1] >= position) + 1
        self.last = max(self.block, min(self.last, self._end - 1))


class Plan:
    """The plans of all rows.

    Args:
        blocks_of_rows: of each row, the places of each block.
        steps: most forwards for a row.
        rule: says whether counts are known in advance and whether placed tokens compete again.
        pipeline: when blocks join in before those on their left are done; None for one at a time.
    """

    def __init__(
        self,
        blocks_of_rows: Sequence[Sequence[Sequence[int]]],
        steps: int,
        rule: AcceptanceRule,
        pipeline: MultiBlockConfig | None = None,
    ) -> None:
        self.rule = rule
        self.rows = [RowPlan(blocks, steps, pipeline) for blocks in blocks_of_rows]

    def next_step(self, device: torch.device) -> StepPlan | None:
        """Return what the next forward has to do, None when every row is finished."""
        if all(row.finished for row in self.rows):
            return None
        keeps = [row.keep(self.rule) for row in self.rows]
        most = max(len(keep) for keep, _ in keeps)
        table = torch.tensor(
            [
                [FINISHED if row.finished else row.block for row in self.rows],
                [FINISHED if row.finished else row.last for row in self.rows],
                *zip(*(keep + [0] * (most - len(keep)) for keep, _ in keeps), strict=True),
            ]
        )
        block_B, last_B, *keep = table.to(device, non_blocking=True)
        spans, shares = tuple(row.span for row in self.rows), tuple(row.share_left for row in self.rows)
        return StepPlan(block_B, last_B, torch.stack(keep, 1), sum(scored for _, scored in keeps), spans, shares)

    def advance(self, fixed_BN: Sequence[Sequence[int]] | None) -> None:
        """Take one step in every row.

        Args:
            fixed_BN: by how many the open places of each block became fewer; None where the schedule says it.
        """
        for i, row in enumerate(self.rows):
            row.advance(None if fixed_BN is None else fixed_BN[i])

    def finish(self, row: int) -> None:
        """Stop a row before its schedule ends."""
        self.rows[row].finished = True
