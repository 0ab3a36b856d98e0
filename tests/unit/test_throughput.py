"""Timing in turns, intervals and verdicts, with a clock that the test turns."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from dllm_core.evals.intervals import Interval, centre_interval, median_interval
from dllm_core.evals.rounds import rounds_for
from dllm_core.evals.throughput import (
    Timing,
    compare,
    in_laps,
    interleave,
    order_of,
    paired_ratio,
    summary,
    takes_part,
    verdict,
)
from dllm_core.methods.protocol import GenerationOutput


class World:
    """A machine with a clock; decodes advance it and leave their names."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.now

    def decode(self, name: str, seconds: Callable[[int], float], tokens: int = 10) -> Callable[[int], GenerationOutput]:
        def run(index: int) -> GenerationOutput:
            self.calls.append((name, index))
            self.now += seconds(index)
            return GenerationOutput([torch.zeros(tokens + 3)], [tokens], 4, 0.25)

        return run


def timing(seconds: float, tokens: int = 100) -> Timing:
    return Timing(seconds, tokens, 8, 0.1, 1)


def test_rounds_interleave_and_warm_up_is_out() -> None:
    world = World()
    slow_start = {"a": world.decode("a", lambda i: 100.0 if i < 0 else 1.0), "b": world.decode("b", lambda i: 2.0)}
    found = interleave({"8": slow_start}, rounds={"8": 3}, warmup_rounds=1, clock=world.clock)["8"]
    assert [t.seconds for t in found["a"]] == [1.0, 1.0, 1.0]
    assert [t.tokens_per_s for t in found["b"]] == [5.0, 5.0, 5.0]
    assert [index for _, index in world.calls] == [-1, -1, 0, 0, 1, 1, 2, 2]
    assert all({n for n, i in world.calls if i == index} == {"a", "b"} for index in (-1, 0, 1, 2))


def test_every_row_gets_every_place_and_neighbour_equally() -> None:
    names = ["a", "b", "c", "d"]
    orders = [order_of(names, i) for i in range(8)]
    for place in range(4):
        assert sorted(o[place] for o in orders) == sorted(names * 2)
    before = [(x, y) for o in orders for x, y in itertools.pairwise(o)]
    assert all(before.count((x, y)) == before.count((y, x)) for x, y in itertools.combinations(names, 2))


def test_groups_share_rounds_and_stay_paired() -> None:
    world = World()
    rows = {g: {r: world.decode(f"{g}{r}", lambda i: 1.0) for r in "ab"} for g in ("8", "32")}
    found = interleave(rows, rounds={"8": 8, "32": 3}, warmup_rounds=1, clock=world.clock)
    assert {g: {r: len(t) for r, t in rows.items()} for g, rows in found.items()} == {
        "8": {"a": 8, "b": 8},
        "32": {"a": 3, "b": 3},
    }
    assert sum(i < 0 for _, i in world.calls) == 2, "each row warms up once, in the lightest group"
    for _, calls in itertools.groupby(world.calls, key=lambda c: (c[0][:-1], c[1])):
        assert {c[0][-1] for c in calls} == {"a", "b"}, "compared rows run next to each other"


@pytest.mark.parametrize(("rounds", "of"), [(1, 7), (3, 8), (8, 8)])
def test_spread_rounds_number_right(rounds: int, of: int) -> None:
    assert sum(takes_part(i, rounds, of) for i in range(of)) == rounds


def test_rounds_follow_work_but_keep_an_interval() -> None:
    assert rounds_for({"8": 8, "32": 32, "128": 128}, 32) == {"8": 32, "32": 8, "128": 6}
    assert rounds_for({"8": 8, "32": 32}, 3) == {"8": 3, "32": 3}


def test_laps_load_one_row_at_a_time() -> None:
    world, resident = World(), []

    def turn(name: str):
        @contextmanager
        def loaded() -> Iterator[dict]:
            resident.append(name)
            assert resident == [name], "one at a time"
            yield {"8": world.decode(name, lambda i: 50.0 if i < 0 else 1.0)}
            resident.remove(name)

        return loaded

    found = in_laps({n: turn(n) for n in "ab"}, rounds={"8": 7}, laps=3, clock=world.clock)
    assert {n: [t.seconds for t in ts] for n, ts in found["8"].items()} == {"a": [1.0] * 7, "b": [1.0] * 7}
    assert [i for n, i in world.calls if n == "a" and i >= 0] == list(range(7))


def test_pairing_removes_drift_that_overlap_would_hide() -> None:
    """The machine slows to a third; medians overlap wildly, the paired ratio of 1.10 is found."""
    random.seed(0)
    drift = [1.0 + 2.0 * i / 20 for i in range(20)]
    a = [timing(d * random.uniform(0.995, 1.005)) for d in drift]
    b = [timing(1.10 * d * random.uniform(0.995, 1.005)) for d in drift]
    low, high = summary(a)["tokens_per_s"]["ci95"]
    assert low < summary(b)["tokens_per_s"]["median"] < high
    ratio = paired_ratio(a, b)
    assert ratio.value == pytest.approx(1.10, abs=0.005)
    assert verdict(ratio) == "faster"
    assert verdict(paired_ratio(b, a)) == "slower"


def test_tie_needs_the_whole_interval_in_the_band() -> None:
    assert verdict(Interval(1.0, 0.98, 1.02)) == "tie"
    assert verdict(Interval(1.015, 1.005, 1.025)) == "tie", "a difference can be real and still within the band"
    assert verdict(Interval(1.0, 0.95, 1.05)) == "not resolved"
    assert verdict(Interval(1.03, 1.01, 1.05)) == "faster"
    assert verdict(Interval(0.97, 0.95, 0.99)) == "slower"
    assert verdict(Interval(1.0, 0.9705, 1.0)) == "not resolved", "the band is symmetric: 1 / 1.03 = 0.9709"
    assert verdict(Interval(1.0, None, None)) == "not resolved"


def test_few_rounds_prove_nothing() -> None:
    a = [timing(1.0 + 0.001 * i) for i in range(5)]
    assert verdict(paired_ratio(a, a)) == "not resolved"
    assert verdict(paired_ratio([*a, *a], [*a, *a])) == "tie"
    assert paired_ratio(a[:1], a[:1]).as_list() == [None, None]


def test_comparison_names_the_rows() -> None:
    rows = {"x": [timing(1.0)] * 8, "y": [timing(2.0)] * 8}
    assert compare(rows, [("x", "y")]) == [{"rows": ["x", "y"], "ratio": 2.0, "ci95": [2.0, 2.0], "verdict": "faster"}]


def test_summary_counts_valid_tokens_only() -> None:
    world = World()

    def decode(index: int) -> GenerationOutput:
        world.now += 2.0
        return GenerationOutput([torch.zeros(40), torch.zeros(40)], [30, 10], 8, 0.5)

    timings = interleave({"8": {"a": decode}}, rounds={"8": 2}, warmup_rounds=0, clock=world.clock)["8"]["a"]
    found = summary(timings)
    assert found["tokens_per_s"]["median"] == 20.0
    assert found["tokens_per_forward"] == pytest.approx(20 / 8)
    assert (found["num_forwards"], found["first_token_s"], found["sequence_s"]) == (8, 0.5, [2.0, 2.0])


def order_statistics_oracle(n: int) -> int:
    """Smallest coverage argument by enumerating all sides of the median: the j dropped from each end."""
    for j in range(n // 2, -1, -1):
        outside = sum(1 for signs in itertools.product([0, 1], repeat=n) if sum(signs) <= j or sum(signs) >= n - j)
        if outside / 2**n <= 0.05:
            return j
    return -1


@pytest.mark.parametrize("n", [5, 6, 8, 9, 12])
def test_median_interval_by_enumeration(n: int) -> None:
    values = [float(i) for i in range(n)]
    j = order_statistics_oracle(n)
    found = median_interval(values)
    assert found.assumes_normal == (j < 0)
    if j >= 0:
        assert (found.low, found.high) == (values[j], values[n - 1 - j])


@pytest.mark.parametrize("n", [6, 7, 10])
def test_centre_interval_inverts_the_signed_rank_test(n: int) -> None:
    """A point is inside exactly if the two-sided test, by enumeration of all signs, does not reject it."""
    random.seed(n)
    values = [random.gauss(0.3, 1.0) for _ in range(n)]
    found = centre_interval(values)

    def p_value(point: float) -> float:
        shifted = sorted((v - point for v in values), key=abs)
        observed = sum(r for r, v in enumerate(shifted, 1) if v > 0)
        sums = [sum(r for r, s in enumerate(signs, 1) if s) for signs in itertools.product([0, 1], repeat=n)]
        lower = sum(s <= observed for s in sums) / len(sums)
        upper = sum(s >= observed for s in sums) / len(sums)
        return 2 * min(lower, upper)

    assert found.low is not None
    assert found.high is not None
    for end, outwards in ((found.low, -1), (found.high, 1)):
        assert p_value(end + outwards * 1e-9) <= 0.05
        assert p_value(end - outwards * 1e-9) > 0.05
    assert found.low < found.value < found.high


def test_intervals_cover() -> None:
    """Ratios of equal rows under skewed noise: at least 95 % of intervals hold the truth."""
    random.seed(1)
    hits_centre = hits_median = 0
    trials = 400
    for _ in range(trials):
        noise = [random.lognormvariate(0, 0.3) for _ in range(24)]
        a, b = noise[:12], noise[12:]
        centre = centre_interval([math.log(x / y) for x, y in zip(a, b, strict=True)])
        median = median_interval(a)
        assert centre.low is not None
        assert centre.high is not None
        assert median.low is not None
        assert median.high is not None
        hits_centre += centre.low <= 0 <= centre.high
        hits_median += median.low <= 1.0 <= median.high
    assert hits_centre / trials > 0.92
    assert hits_median / trials > 0.92


def test_student_for_few_values() -> None:
    found = median_interval([1.0, 2.0, 6.0])
    half = 4.302652730 * math.sqrt(7.0) / math.sqrt(3)
    assert (found.value, found.assumes_normal) == (2.0, True)
    assert (found.low, found.high) == pytest.approx((3.0 - half, 3.0 + half))
