"""Where each row of a batch stands: its blocks from left to right, and what the next forward has to accept.

The plan lives on the host and every row has its own, so that a row's result does not depend on its neighbours. For
scheduled rules it never reads anything back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm_core.samplers.acceptance import AcceptanceRule
from dllm_core.samplers.schedule import block_schedule

FINISHED = -2  # never equal to a block index, nor to the -1 of positions outside all blocks


def block_of_positions(to_fill_BC: Tensor, block_size: int | None) -> Tensor:
    """Return the block index of every position to fill, -1 elsewhere.

    Blocks are counted over the positions to fill, so that masks anywhere (infilling) make full blocks too.
    """
    rank_BC = to_fill_BC.cumsum(-1) - 1
    block_BC = torch.zeros_like(rank_BC) if block_size is None else rank_BC // block_size
    return torch.where(to_fill_BC, block_BC, -1)


@dataclass(frozen=True)
class StepPlan:
    """What one forward has to do.

    Attributes:
        block_B: int64; the active block of each row, `FINISHED` for rows that are done.
        keep_B: int64; candidates to accept in each row (at least, for adaptive rules).
        num_scored: candidates in the whole batch.
    """

    block_B: Tensor
    keep_B: Tensor
    num_scored: int


@dataclass
class RowPlan:
    """One row's way through its blocks.

    Attributes:
        schedule: tokens per step of each block.
        block: index of the active block.
        step: steps taken in it.
        left: tokens of it still masked.
        finished: nothing more to do.
    """

    schedule: list[list[int]]
    block: int = 0
    step: int = 0
    left: int = 0
    finished: bool = field(default=False)

    def __post_init__(self) -> None:
        self.finished = not self.schedule
        self.left = 0 if self.finished else sum(self.schedule[0])

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
        """Take one step; `accepted` is the number of tokens fixed by an adaptive rule."""
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
        num_to_fill: tokens to generate in each row.
        steps: most forwards for a row.
        block_size: tokens per block; None is one block.
        rule: says whether counts are known in advance and whether placed tokens compete again.
    """

    def __init__(self, num_to_fill: Sequence[int], steps: int, block_size: int | None, rule: AcceptanceRule) -> None:
        self.rule = rule
        self.rows = [RowPlan(block_schedule(n, steps, block_size)) for n in num_to_fill]

    def next_step(self, device: torch.device) -> StepPlan | None:
        """Return what the next forward has to do, None when every row is finished."""
        if all(row.finished for row in self.rows):
            return None
        keeps = [row.keep(self.rule) for row in self.rows]
        table = torch.tensor(
            [[FINISHED if row.finished else row.block for row in self.rows], [keep for keep, _ in keeps]]
        )
        block_B, keep_B = table.to(device, non_blocking=True)
        return StepPlan(block_B, keep_B, sum(scored for _, scored in keeps))

    def advance(self, accepted: Sequence[int] | None) -> None:
        """Take one step in every row.

        Args:
            accepted: tokens fixed in each row; None for scheduled rules, which know.
        """
        for i, row in enumerate(self.rows):
            row.advance(self.rule, None if accepted is None else accepted[i])

    def finish(self, row: int) -> None:
        """Stop a row before its schedule ends."""
        self.rows[row].finished = True
