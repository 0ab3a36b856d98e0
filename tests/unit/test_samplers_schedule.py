"""Counts per step: exact, complete, none wasted."""

from __future__ import annotations

from itertools import product

import pytest

from dllm_core.samplers.schedule import block_schedule, block_sizes, inspect_schedule, steps_per_block, tokens_per_step


def test_counts_are_exact_for_every_small_combination() -> None:
    for tokens, steps in product(range(0, 70), range(1, 75)):
        counts = tokens_per_step(tokens, steps)
        assert sum(counts) == tokens
        assert len(counts) == min(steps, tokens)
        assert all(count >= 1 for count in counts)
        assert not counts or max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("tokens", "steps", "expected"),
    [(128, 8, [16] * 8), (128, 128, [1] * 128), (128, 256, [1] * 128), (100, 64, [2] * 36 + [1] * 28)],
)
def test_published_examples(tokens: int, steps: int, expected: list[int]) -> None:
    """Where a floor schedule wastes its first forward (128/128) or most of them (128/256), this one does not."""
    assert tokens_per_step(tokens, steps) == expected


def test_split_over_blocks_minimises_the_busiest_step() -> None:
    """Against every possible split."""
    for blocks in ([5], [4, 4], [4, 4, 1], [6, 2], [3, 3, 3, 2]):
        for steps in range(len(blocks), sum(blocks) + 3):
            split = steps_per_block(blocks, steps)
            assert sum(split) == min(steps, sum(blocks))
            assert all(1 <= s <= size for s, size in zip(split, blocks, strict=True))
            best = min(
                max(-(-size // s) for size, s in zip(blocks, other, strict=True))
                for other in product(*(range(1, size + 1) for size in blocks))
                if sum(other) == min(steps, sum(blocks))
            )
            assert max(-(-size // s) for size, s in zip(blocks, split, strict=True)) == best


def test_inspector_lists_every_forward() -> None:
    assert inspect_schedule(10, 5, 4) == [2, 2, 2, 2, 2]
    assert inspect_schedule(10, 4, 4) == [2, 2, 4, 2]
    assert inspect_schedule(0, 4) == []
    for tokens, steps, size in product((1, 7, 16, 33), (8, 20, 50), (5, 16, None)):
        blocks = block_schedule(block_sizes(tokens, size), steps)
        assert [sum(b) for b in blocks[:-1]] == [size] * (len(blocks) - 1)
        assert sum(inspect_schedule(tokens, steps, size)) == tokens
        assert len(inspect_schedule(tokens, steps, size)) == min(steps, tokens)


@pytest.mark.parametrize(("tokens", "steps"), [(3, 0), (-1, 2)])
def test_nonsense_is_refused(tokens: int, steps: int) -> None:
    with pytest.raises(ValueError, match="tokens_per_step"):
        tokens_per_step(tokens, steps)
    with pytest.raises(ValueError, match="at least as many"):
        steps_per_block([2, 2], 1)
