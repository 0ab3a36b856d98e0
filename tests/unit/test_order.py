from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from collections import Counter

import pytest

from dllm_core.data.order import SampleOrder


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_each_epoch_presents_every_sample_once(size: int) -> None:
    order = SampleOrder(size, seed=3)
    for epoch in range(6):
        shown = [order[epoch * size + i] for i in range(size)]
        assert sorted(s for s, _ in shown) == list(range(size))
        assert {e for _, e in shown} == {epoch}


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    order = SampleOrder(50, seed=0)
    first = [order[i][0] for i in range(50)]
    second = [order[50 + i][0] for i in range(50)]
    assert first != second
    assert first != [SampleOrder(50, seed=1)[i][0] for i in range(50)]
    # asked for in any order, by another object, after the epoch was dropped from memory
    other = SampleOrder(50, seed=0)
    assert [other[i] for i in reversed(range(1000))][::-1] == [order[i] for i in range(1000)]
    assert [pickle.loads(pickle.dumps(order))[i][0] for i in range(50)] == first


def test_presented_is_the_set_of_the_prefix() -> None:
    order = SampleOrder(20, seed=5)
    for count in range(45):
        assert order.presented(count) == sorted({order[i][0] for i in range(count)})


def test_all_permutations_are_equally_likely() -> None:
    counts = Counter(tuple(SampleOrder(3, seed=s)[i][0] for i in range(3)) for s in range(3000))
    assert set(counts) == set(itertools.permutations(range(3)))
    # 500 expected each, standard deviation 20.4; five of them leave one false alarm in about 300,000
    assert max(abs(c - 500) for c in counts.values()) < 103


def test_negative_index_is_refused() -> None:
    with pytest.raises(IndexError, match="-1"):
        SampleOrder(3, seed=0)[-1]


def test_order_is_pinned_and_torch_free() -> None:
    order = SampleOrder(6, seed=0)
    assert [order[i] for i in range(6)] == PINNED
    code = "import sys, dllm_core.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Written down once: a change here means that every cached training run sees other data.
PINNED = [(3, 0), (5, 0), (1, 0), (0, 0), (2, 0), (4, 0)]


def test_a_looped_order_repeats_its_first_sequences_and_counts_the_rounds() -> None:
    order = SampleOrder(10, seed=3)
    first = [order[i][0] for i in range(4)]
    assert [order.looped(i, 4) for i in range(10)] == [(first[i % 4], i // 4) for i in range(10)]
    for sequences in (None, 10, 99):
        assert [order.looped(i, sequences) for i in range(25)] == [order[i] for i in range(25)]
