"""Every kernel against float64, then its time and bandwidth beside the reference and torch.compile.

See `benchmarks/kernels.py` and `benchmarks/gpu/kernel_errors.py`. Needs no pydantic but for the latent sampler's parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import _report
from benchmarks import kernels as timing
from benchmarks.gpu import kernel_errors, targets
from benchmarks.gpu.parts import Context, Measured

Point = tuple[str, str, int, str]
"""(operation, shape, rows, dtype)."""
SHAPES = ("qwen3_1_7b", "smollm2_135m")
STATS_ROWS, LOSS_ROWS, CHUNK_ROWS = (1, 64, 128, 1024, 8192), (1024, 8192), (1536,)
ROWS = {"token_stats": STATS_ROWS, "token_losses": LOSS_ROWS, "chunk_losses": CHUNK_ROWS}
ROUNDS = 20
NEEDS_S = 12.0
"""Seconds that a point is taken to need on a GPU, torch.compile included."""
LATENT_POINTS = ((2048, 16, 1, 64), (2048, 16, 16, 64), (5120, 40, 1, 64))
"""(width, heads, batch, length) at which the latent sampler's parts are timed."""


def points(smoke: bool) -> list[Point]:
    """Return what is timed, bf16 first."""
    if smoke:
        return [(operation, "tiny", 5, dtype) for dtype in ("bf16", "fp32") for operation in ROWS]
    return [
        (operation, shape, rows, dtype)
        for dtype in ("bf16", "fp32")
        for shape in SHAPES
        for operation, counts in ROWS.items()
        for rows in counts
    ]


def run(context: Context) -> dict[str, Any]:
    """Compare, then time what fits."""
    context.row(targets.ERRORS, lambda: errors(context))
    limits = {dtype: context.ceilings(dtype) for dtype in ("bf16", "fp32")}
    args = _arguments(context)
    clock = timing.Clock(context.device)
    for dtype in ("bf16", "fp32"):
        found = limits[dtype]
        for point in points(context.smoke):
            operation, shape, rows, wanted = point
            if found is not None and wanted == dtype:
                context.row(
                    f"{operation}, {shape}, {rows} rows, {dtype}",
                    _timing(context, point, args, clock, found),
                    settings={"rounds": args.rounds, "implementations": args.implementations},
                    needs_s=0.0 if context.smoke else NEEDS_S,
                )
        if found is not None and dtype == "bf16" and find_spec("pydantic"):
            _time_latent_parts(context, args, clock, found)
    return {"errors": kernel_errors.DEFINITION, "times": timing.DEFINITION}


def _time_latent_parts(
    context: Context, args: argparse.Namespace, clock: timing.Clock, limits: dict[str, float]
) -> None:
    for point in [(48, 3, 1, 5)] if context.smoke else LATENT_POINTS:
        width, heads, batch, length = point
        context.row(
            f"latent sampler's parts, width {width}, {batch} x {length} tokens, bf16",
            _latent_timing(context, point, args, clock, limits),
            settings={"heads": heads, "rounds": args.rounds},
            needs_s=0.0 if context.smoke else 2 * NEEDS_S,
        )


def errors(context: Context) -> Measured:
    """Return the errors of all kernels, and the worst over its tolerance."""
    options: dict[str, Any] = {"quick": context.smoke, "seed": context.seed}
    found = kernel_errors.measure(context.device, ("fp32", "bf16"), **options)
    parts = _report.NOT_MEASURED + ": pydantic is not installed"
    if find_spec("pydantic"):
        found += kernel_errors.measure_parts(context.device, ("fp32", "bf16"), **options)
        parts = "measured"
    worst = max(row["error"] / row["tolerance"] for row in found)
    made = {row["kernel"] for row in found if row["implementation"] in ("triton", "compiled")}
    return {
        "headline": {"worst_over_tolerance": worst, "kernels": len(made)},
        # a suite that compared the reference with itself has compared nothing
        "passed": context.device.type == "cpu" or made >= set(kernel_errors.KERNELS),
        "latent_parts": parts,
        "detail": found,
    }


def _arguments(context: Context) -> argparse.Namespace:
    words = ["--device", context.device.type, "--seed", str(context.seed)]
    if context.smoke:  # a CPU has no Triton, and its compiler takes longer than the suite may
        return timing.arguments([*words, "--rounds", "2", "--implementations", "reference", "triton"])
    return timing.arguments([*words, "--rounds", str(ROUNDS)])


def _timing(
    context: Context, point: Point, args: argparse.Namespace, clock: timing.Clock, limits: dict[str, float]
) -> Callable[[], Measured]:
    operation, shape, rows, dtype = point

    def measure() -> Measured:
        case = timing.case_of(operation, shape, rows, timing.DTYPES[dtype], context.device, context.seed)
        with kernel_errors.implementation("auto"):
            found = timing.measure(case, args, dtype, clock, limits)
        torch._dynamo.reset()
        return _told(found, limits, "triton")

    return measure


def _told(found: dict[str, Any], limits: dict[str, float], ours: str) -> Measured:
    """Return a comparison with its numbers in front: the row that is ours, and by how much it leads."""
    rows = {name: row for name, row in found["implementations"].items() if isinstance(row, dict)}
    headline = {f"{name}_ms": row["ms"] for name, row in rows.items()}
    if ours in rows:
        headline["share_of_roofline"] = rows[ours]["share_of_roofline"]
        others = {name: row for name, row in rows.items() if name != ours}
        headline |= {f"over_{name}": row["ms"] / rows[ours]["ms"] for name, row in others.items()}
    return {"headline": headline, "two_numbers": targets.two_numbers(found, limits), "detail": found}


def _latent_timing(
    context: Context,
    point: tuple[int, int, int, int],
    args: argparse.Namespace,
    clock: timing.Clock,
    limits: dict[str, float],
) -> Callable[[], Measured]:
    """Return a measurement of all parts at one shape: as written (`reference`) and through torch.compile."""

    def measure() -> Measured:
        from dllm_core.methods.ldlm import parts

        width, heads, batch, length = point
        kinds = {"reference": parts.eager()}
        if context.device.type == "cuda":
            kinds["compiled"] = parts.compiled()
        cases = kernel_errors.part_cases(width, heads, batch, length, torch.bfloat16, context.device, context.seed)
        found: Measured = {"headline": {}, "detail": {}}
        for part, (call, want) in cases.items():
            calls = {name: (lambda kind=kind, call=call: call(kind)) for name, kind in kinds.items()}
            # what goes in is about what comes out; the exact count is the larger by a few vectors
            moved = 2.0 * sum(x.numel() for x in want) * 2
            case = timing.Case(moved, 0.0, calls)  # type: ignore[arg-type]
            options = argparse.Namespace(**{**vars(args), "implementations": [*kinds]})
            told = _told(timing.measure(case, options, "bf16", clock, limits), limits, "compiled")
            found["headline"] |= {f"{part} {name}": value for name, value in told["headline"].items()}
            found["detail"][part] = told["detail"]
        return found

    return measure
