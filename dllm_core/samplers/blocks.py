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


def block_table(blocks_of_rows: Sequence[Sequence[Sequence[int]]], length: int) -> Tensor:
    """Return the block index of every position to fill, -1 elsewhere, int64 [B, C]."""
    block_BC = torch.full((len(blocks_of_rows), length), -1)
    for row, blocks in enumerate(blocks_of_rows):
        for index, places in enumerate(blocks):
            block_BC[row, list(places)] = index
    return block_BC


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
        block_B: int64; the active block of each row, `FINISHED` for rows that are done.
        keep_B: int64; candidates to accept in each row (at least, for adaptive rules).
        num_scored: candidates in the whole batch.
        spans: where each row works, None for rows that are done.
        shares_left: of each row, (passes left, this one included) / passes of its block.
    """

    block_B: Tensor
    keep_B: Tensor
    num_scored: int
    spans: tuple[Span | None, ...]
    shares_left: tuple[float, ...]


class RowPlan:
    """One row's way through its blocks.

    Args:
        blocks: places to fill of each block.
        steps: most forwards for the row.

    Attributes:
        schedule: tokens per step of each block.
        block: index of the active block.
        step: steps taken in it.
        left: tokens of it still masked.
        finished: nothing more to do.
    """

    def __init__(self, blocks: Sequence[Sequence[int]], steps: int) -> None:
        self.blocks = blocks
        self.schedule = block_schedule([len(places) for places in blocks], steps)
        self.block = self.step = 0
        self.finished = not self.schedule
        self.left = 0 if self.finished else sum(self.schedule[0])

    @property
    def span(self) -> Span | None:
        """Where the row works now; None once it is finished."""
        if self.finished:
            return None
        places = self.blocks[self.block]
        return Span(places[0], places[-1] + 1, self.block)

    @property
    def share_left(self) -> float:
        """Passes that are left in the active block, of those it has; 0 once the row is finished."""
        if self.finished:
            return 0.0
        passes = len(self.schedule[self.block])
        return (passes - self.step) / passes

    def keep(self, rule: AcceptanceRule) -> tuple[int, int]:
        """Return (candidates to accept, candidates) of the next forward."""
        if self.finished:
            return 0, 0
        counts = self.schedule[self.block]
        if rule.adaptive:
            return -(-self.left // (len(counts) - self.step)), self.left
        if rule.revises:
            return sum(counts[: self.step + 1]), sum(counts)
        return counts[self.step], self.left

    def advance(self, rule: AcceptanceRule, accepted: int | None) -> None:
        """Take one step; `accepted` is by how many the open places became fewer, None where the schedule says it."""
        if self.finished:
            return
        self.left -= self.schedule[self.block][self.step] if accepted is None else accepted
        self.step += 1
        if self.left == 0:
            self.block, self.step = self.block + 1, 0
            self.finished = self.block == len(self.schedule)
            self.left = 0 if self.finished else sum(self.schedule[self.block])


class Plan:
    """The plans of all rows.

    Args:
        blocks_of_rows: of each row, the places of each block.
        steps: most forwards for a row.
        rule: says whether counts are known in advance and whether placed tokens compete again.
    """

    def __init__(self, blocks_of_rows: Sequence[Sequence[Sequence[int]]], steps: int, rule: AcceptanceRule) -> None:
        self.rule = rule
        self.rows = [RowPlan(blocks, steps) for blocks in blocks_of_rows]

    def next_step(self, device: torch.device) -> StepPlan | None:
        """Return what the next forward has to do, None when every row is finished."""
        if all(row.finished for row in self.rows):
            return None
        keeps = [row.keep(self.rule) for row in self.rows]
        table = torch.tensor(
            [[FINISHED if row.finished else row.block for row in self.rows], [keep for keep, _ in keeps]]
        )
        block_B, keep_B = table.to(device, non_blocking=True)
        spans, shares = tuple(row.span for row in self.rows), tuple(row.share_left for row in self.rows)
        return StepPlan(block_B, keep_B, sum(scored for _, scored in keeps), spans, shares)

    def advance(self, accepted: Sequence[int] | None) -> None:
        """Take one step in every row.

        Args:
            accepted: by how many the open places of each row became fewer; None where the schedule says it.
        """
        for i, row in enumerate(self.rows):
            row.advance(self.rule, None if accepted is None else accepted[i])

    def finish(self, row: int) -> None:
        """Stop a row before its schedule ends."""
        self.rows[row].finished = True
