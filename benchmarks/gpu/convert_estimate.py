"""What a conversion is expected to take on an H200, from the plan's own counts of operations and passes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from params import GridSpec
    from steps.machine import Machine

RATES = ((0.30, 0.020), (0.40, 0.010))
"""(share of the matrix rate that training reaches, seconds that a step or a pass costs whatever its size)."""
MATRIX_FLOPS, MEMORY_BYTES_PER_S, MEMORY_BYTES = 790e12, 3.6e12, 139e9
"""Of one H200: a bf16 product of 8192 x 8192 x 8192, most of a device copy, and what is free."""


def h200(share: float, overhead_s: float) -> Machine:
    """Return an H200 as a plan needs to know it."""
    from steps.machine import probe

    flops = share * MATRIX_FLOPS
    return replace(
        probe("cuda"),
        name=f"an H200 at {share:.0%} of {MATRIX_FLOPS / 1e12:.0f} TFLOP/s, {1e3 * overhead_s:.0f} ms a step or pass",
        visible=True,
        native_bf16=True,
        memory_total=MEMORY_BYTES,
        memory_free=MEMORY_BYTES,
        flops_bf16=flops,
        flops_fp32=flops / 4,
        bytes_per_s=MEMORY_BYTES_PER_S,
        overhead_s=overhead_s,
    )


def estimate(spec: GridSpec) -> str:
    """Return the seconds of every row and of the whole, at both ends of what is likely; nothing of it is measured."""
    from steps import plan

    lines = []
    for share, overhead_s in RATES:
        machine = h200(share, overhead_s)
        cost = plan.validate(spec, dry_run=True, machine=machine).cost
        lines += [
            f"{machine.name}: {cost.total_s / 60:.0f} min",
            "  row  train s  evaluate s  benchmark s  train PFLOP",
        ]
        for name, row in cost.rows.items():
            work = (row.train_flops + row.teacher_flops) / 1e15
            lines.append(f"  {name}  {row.train_s:.0f}  {row.evaluate_s:.0f}  {row.benchmark_s:.0f}  {work:.2f}")
        lines += [f"  {name}  {seconds:.0f} s" for name, seconds in cost.shared_s.items()]
    return "\n".join(lines)
