"""Which stretch of a row each pass runs, for every kind of cache. On the host; imports no torch.

A stretch reaches one further to the left than the tokens it is to predict where the state before a token predicts it,
so that the first token of a block is predicted from a state of this pass.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dllm_core.samplers.blocks import Span
    from dllm_core.samplers.cache_settings import CacheConfig


@dataclass(frozen=True)
class Stretch:
    """Positions that one pass runs and whose keys and values it writes.

    Attributes:
        start, stop: the positions start..stop-1.
        final: end of what no later pass runs again (exact caches only); start <= final <= stop.
    """

    start: int
    stop: int
    final: int = 0


class Policy(Protocol):
    """Says what to run. Rows are independent of each other."""

    def stretch(self, row: int, span: Span, length: int) -> Stretch:
        """Return what the next pass runs of a row of `length` tokens that works in `span`; called once per pass."""


class _Refreshed:
    """Runs whole rows when they are due, and what `_part` says in between."""

    def __init__(self, cache: CacheConfig, num_rows: int, shift: int) -> None:
        self.cache, self.shift = cache, shift
        self._block: list[int | None] = [None] * num_rows
        self._passes = [0] * num_rows

    def stretch(self, row: int, span: Span, length: int) -> Stretch:
        """Return the whole row where it is due, else a part; see `Policy`."""
        part = self._part(row, span, length)
        every = self.cache.refresh_every
        if self._is_due(row, span) or (every is not None and self._passes[row] % every == 0):
            part, self._passes[row] = Stretch(0, length), 0
        self._block[row] = span.block
        self._passes[row] += 1
        return part

    def _is_due(self, row: int, span: Span) -> bool:
        return self._block[row] != span.block

    def _part(self, row: int, span: Span, length: int) -> Stretch:
        raise NotImplementedError


class PrefixPolicy(_Refreshed):
    """Whole rows when a block begins, then from the block to the end."""

    def _part(self, row: int, span: Span, length: int) -> Stretch:
        return Stretch(max(0, span.start - self.shift), length)


class DualPolicy(_Refreshed):
    """Whole rows when a block begins, then the block alone."""

    def _part(self, row: int, span: Span, length: int) -> Stretch:
        return Stretch(max(0, span.start - self.shift), span.stop)


class DelayedPolicy(_Refreshed):
    """Whole rows at first, then from the first token that has not been final for `delay` passes to the end."""

    def __init__(self, cache: CacheConfig, num_rows: int, shift: int) -> None:
        super().__init__(cache, num_rows, shift)
        self._starts: list[deque[int]] = [deque(maxlen=cache.delay + 1) for _ in range(num_rows)]

    def _is_due(self, row: int, span: Span) -> bool:
        return self._block[row] is None

    def _part(self, row: int, span: Span, length: int) -> Stretch:
        starts = self._starts[row]
        starts.append(span.start)
        return Stretch(max(0, starts[0] - self.shift), length)


class ExactPolicy:
    """The model's own blocks: those that work now, and once more those that have become final since."""

    def __init__(self, num_rows: int, block_size: int) -> None:
        self.block_size = block_size
        self._final = [0] * num_rows

    def stretch(self, row: int, span: Span, length: int) -> Stretch:
        """Return the blocks of the span and those before it that were not run with their last tokens; see `Policy`."""
        start, size = self._final[row], self.block_size
        stop = min(-(-span.stop // size) * size, length)
        self._final[row] = span.start // size * size
        return Stretch(start, stop, self._final[row])


APPROXIMATE: dict[str, type[_Refreshed]] = {"prefix": PrefixPolicy, "dual": DualPolicy, "delayed": DelayedPolicy}


def policy_for(cache: CacheConfig, num_rows: int, shift: int, block_size: int | None) -> Policy:
    """Return the policy that the settings name.

    Args:
        cache: of any kind but `none`.
        num_rows: rows of the batch.
        shift: how far before a token the state stands that predicts it.
        block_size: tokens of a block of a block-causal model; for `exact`.
    """
    if cache.kind == "exact":
        assert block_size is not None, "exact caches are for models with blocks of their own"
        return ExactPolicy(num_rows, block_size)
    return APPROXIMATE[cache.kind](cache, num_rows, shift)
