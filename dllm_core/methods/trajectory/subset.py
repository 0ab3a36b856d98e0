"""Which sequences the trajectory phase trains on. Torch-free: the extraction step asks before it loads anything."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm_core.data.order import SampleOrder


@lru_cache(maxsize=8)
def subset(order: SampleOrder, first_index: int, responses: int) -> tuple[tuple[int, int], ...]:
    """Return (sample id, epoch) of the first `responses` distinct sequences of the common order after the branch.

    Args:
        order: the grid's common order.
        first_index: place in the order of the first sequence after the branch (steps before it times batch size).
        responses: how many; fewer are returned when the training set holds fewer.
    """
    chosen: dict[int, int] = {}
    index = first_index
    while len(chosen) < min(responses, order.num_sequences):
        sample_id, epoch = order[index]
        chosen.setdefault(sample_id, epoch)
        index += 1
    return tuple(chosen.items())


def looped(chosen: tuple[tuple[int, int], ...], start: int, count: int) -> list[tuple[int, int]]:
    """Return presentations start..start+count-1 of the subset repeated for ever; every round counts the epoch up."""
    size = len(chosen)
    places = (divmod(index, size) for index in range(start, start + count))
    return [(chosen[place][0], chosen[place][1] + round_) for round_, place in places]
