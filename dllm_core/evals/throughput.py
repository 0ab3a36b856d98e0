"""Decoding speed of several rows on one machine, so that its noise hits all alike.

Rows take turns: every round runs each row once, in an order that rotates and alternates in direction, so that neither
drift nor the neighbour before favours anyone. Rows are compared within rounds, by paired ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from dllm_core.evals.intervals import Interval, positive_median_interval, ratio_interval, verdict
from dllm_core.evals.rounds import rounds_for as rounds_for  # benchmarks take it from here
from dllm_core.methods.protocol import GenerationOutput

Decode = Callable[[int], GenerationOutput]


@dataclass(frozen=True)
class Timing:
    """One timed generation.

    Attributes:
        seconds: wall time of the call, device synchronised before and after.
        tokens: tokens that count: accepted, end-of-text included, nothing after it, no padding.
        forwards: network passes.
        first_token_s: seconds until the first token was final.
        sequences: prompts decoded together.
    """

    seconds: float
    tokens: int
    forwards: int
    first_token_s: float
    sequences: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def synchronize() -> None:
    """Wait for the device; a no-op without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(decode: Decode, index: int, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """Run `decode(index)` once and time it."""
    synchronize()
    start = clock()
    output = decode(index)
    synchronize()
    seconds = clock() - start
    return Timing(seconds, sum(output.new_tokens), output.num_forwards, output.first_token_s, len(output.sequences))


def order_of(names: Sequence[str], index: int) -> list[str]:
    """Return the order of a round: rotated by its index, every other one backwards."""
    shift = (index // 2) % max(1, len(names))
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if index % 2 else rotated


def takes_part(index: int, rounds: int, of: int) -> bool:
    """Return whether a group with `rounds` rounds runs in round `index` of `of`: they are spread evenly."""
    return (index + 1) * rounds // of > index * rounds // of


def interleave(
    groups: Mapping[str, Mapping[str, Decode]],
    *,
    rounds: Mapping[str, int],
    warmup_rounds: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, list[Timing]]]:
    """Time all rows in turns; warm-up rounds come first and are thrown away.

    A round runs group after group (rows that do equally long work, e.g. the same number of denoising steps) and, within
    a group, row after row, so that rows which are compared run next to each other.

    Args:
        groups: group -> row -> what to time; called with the round's index (negative in the warm-up), so that all
            rows can decode the same prompt within a round. A row warms up in the first group that names it.
        rounds: rounds that count, by group; the longest sets how many there are, the others are spread over them.
        warmup_rounds: rounds before those.
        clock: seconds; replaced in tests.
        on_round: called after each round with (done, total), warm-up included.

    Returns:
        group -> row -> timings, one a round; the k-th timings of a group's rows belong together.
    """
    timings: dict[str, dict[str, list[Timing]]] = {g: {row: [] for row in rows} for g, rows in groups.items()}
    first: dict[str, str] = {}
    for group, rows in groups.items():
        for row in rows:
            first.setdefault(row, group)
    total = max(rounds[g] for g in groups)
    for index in range(-warmup_rounds, total):
        for group, rows in groups.items():
            if index >= 0 and not takes_part(index, rounds[group], total):
                continue
            for row in order_of(list(rows), index):
                if index >= 0:
                    timings[group][row].append(timed(rows[row], index, clock))
                elif first[row] == group:
                    rows[row](index)
        if on_round:
            on_round(index + 1 + warmup_rounds, total + warmup_rounds)
    return timings


def in_laps(
    rows: Mapping[str, Callable[[], AbstractContextManager[Mapping[str, Decode]]]],
    *,
    rounds: Mapping[str, int],
    laps: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    on_turn: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, list[Timing]]]:
    """Time rows that do not fit into memory together: one after another, in several laps.

    Each turn loads a row, warms it up once, runs its share of all rounds and lets go of it. The neighbours of a round
    are now minutes apart, so ratios are noisier than with `interleave`.

    Args:
        rows: row -> a context that loads it and gives what to time, by group.
        rounds: rounds by group.
        laps: how often every row gets its turn.
        clock: seconds; replaced in tests.
        on_turn: called after each turn with (done, total).
    """
    timings: dict[str, dict[str, list[Timing]]] = {g: {} for g in rounds}
    for lap in range(laps):
        for turn, row in enumerate(order_of(list(rows), lap)):
            with rows[row]() as groups:
                next(iter(groups.values()))(-1)
                for group, decode in groups.items():
                    kept = timings[group].setdefault(row, [])
                    for index in range(lap * rounds[group] // laps, (lap + 1) * rounds[group] // laps):
                        kept.append(timed(decode, index, clock))
            if on_turn:
                on_turn(lap * len(rows) + turn + 1, laps * len(rows))
    return timings


def summary(timings: Sequence[Timing]) -> dict[str, Any]:
    """Return medians with their 95 % intervals, and every round behind them."""
    speeds = [t.tokens_per_s for t in timings]
    speed = positive_median_interval(speeds)
    last = timings[-1]
    return {
        "tokens_per_s": {"median": speed.value, "ci95": speed.as_list()},
        "first_token_s": median(t.first_token_s for t in timings),
        "num_forwards": last.forwards,
        "tokens_per_forward": last.tokens / max(1, last.sequences) / max(1, last.forwards),
        "rounds": speeds,
        "sequence_s": [t.seconds for t in timings],
    }


def paired_ratio(first: Sequence[Timing], second: Sequence[Timing]) -> Interval:
    """Return the speed of `first` over `second` with its 95 % interval, round by round."""
    return ratio_interval([t.tokens_per_s for t in first], [t.tokens_per_s for t in second])


def compare(timings: Mapping[str, Sequence[Timing]], pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return `{"rows", "ratio", "ci95", "verdict"}` of each pair; the ratio is first over second, in tokens/s."""
    results: list[dict[str, Any]] = []
    for a, b in pairs:
        ratio = paired_ratio(timings[a], timings[b])
        results.append({"rows": [a, b], "ratio": ratio.value, "ci95": ratio.as_list(), "verdict": verdict(ratio)})
    return results
