"""The common order in which every cell sees the training sequences. Imports no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from random import Random

_KEPT_EPOCHS = 4


@dataclass(frozen=True)
class SampleOrder:
    """An endless sequence of (sample id, epoch): epoch after epoch, each a fresh permutation of all samples.

    `order[i]` depends on (num_sequences, seed, i) alone, so that cells, processes and resumed runs agree on it.

    Attributes:
        num_sequences: samples per epoch, at least 1.
        seed: the run's seed; together with the epoch it keys the permutation.
    """

    num_sequences: int
    seed: int
    _permutations: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.num_sequences >= 1, "an order needs at least one sequence"

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return (sample id, epoch) of the `index`-th presentation, counted from 0 over all epochs."""
        if index < 0:
            raise IndexError(f"an order has no end to count back from, got index {index}")
        epoch, place = divmod(index, self.num_sequences)
        return self._permutation(epoch)[place], epoch

    def looped(self, index: int, sequences: int | None) -> tuple[int, int]:
        """Return (sample id, epoch) of a presentation when only the first `sequences` of the order are looped over."""
        if sequences is None or sequences >= self.num_sequences:
            return self[index]
        epoch, place = divmod(index, sequences)
        return self[place][0], epoch

    def presented(self, count: int) -> list[int]:
        """Return the distinct sample ids among the first `count` presentations, ascending."""
        if count >= self.num_sequences:
            return list(range(self.num_sequences))
        return sorted(self._permutation(0)[:count])

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._permutations:
            if len(self._permutations) >= _KEPT_EPOCHS:
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[epoch] = _permute(self.num_sequences, self.seed, epoch)
        return self._permutations[epoch]


def _permute(size: int, seed: int, epoch: int) -> list[int]:
    """Fisher-Yates on `Random.random()`, the one generator call Python promises to keep the same across versions."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/order".encode(), digest_size=8).digest()
    draw = Random(int.from_bytes(digest, "little")).random
    values = list(range(size))
    for last in range(size - 1, 0, -1):
        other = int(draw() * (last + 1))
        values[last], values[other] = values[other], values[last]
    return values
