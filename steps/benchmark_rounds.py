"""What the benchmark times and how often, as the plan and the benchmark itself both need it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from dllm_core.evals.rounds import rounds_for
from params.schema import BenchSpec

AR = "ar"
"""Group of rows that write token by token, for which a number of steps means nothing."""
LEAST_ROUNDS = 2
LEAST_ROUNDS_OF_LONG = 4
"""Long decodes get fewer rounds than `bench.rounds`, but no fewer than these."""


def group_name(bench: BenchSpec, steps: int | None, batch_size: int) -> str:
    """Return the name of a group: the steps, and the batch size where it is not the first."""
    name = AR if steps is None else str(steps)
    return name if batch_size == bench.batch_sizes[0] else f"{name} x{batch_size}"


def groups_of(bench: BenchSpec, *, causal: bool) -> Iterator[tuple[str, int | None, int]]:
    """Yield (group, steps, batch size) of a row, in the order of the benchmark; a row warms up in the first.

    Args:
        bench: the settings.
        causal: the row writes token by token: its steps are None.
    """
    for size in bench.batch_sizes:
        for steps in [None] if causal else sorted(bench.steps):
            yield group_name(bench, steps, size), steps, size


def rounds_by_group(bench: BenchSpec) -> dict[str, int]:
    """Return group -> rounds that count, of all groups that rows can have; work is in forwards of a prompt."""
    work = {}
    for size in bench.batch_sizes:
        for steps in sorted(bench.steps):
            work[group_name(bench, steps, size)] = float(steps * size)
        # with a cache, a forward of one token costs about a quarter of one over the whole canvas
        work[group_name(bench, None, size)] = bench.new_tokens * size / 4
    return rounds_for(work, max(LEAST_ROUNDS, bench.rounds), least=LEAST_ROUNDS_OF_LONG)


def decodes_by_group(bench: BenchSpec, *, causal: bool) -> dict[tuple[int | None, int], int]:
    """Return (steps, batch size) -> decodes of one row in the whole benchmark, its warm-up included.

    The first warm-up is the decode on which memory is measured; it takes place in any case.
    """
    rounds = rounds_by_group(bench)
    decodes = {(steps, size): rounds[group] for group, steps, size in groups_of(bench, causal=causal)}
    decodes[next(iter(decodes))] += max(1, bench.warmup_rounds)
    return decodes
