"""Latent generation at the shapes of the published speed figures, random weights; see `benchmarks/ldlm_inference.py`.

The one point at a time that the suite measures: most wanted first, so that a run that is cut short has the targets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import ceilings, ldlm_inference
from benchmarks.gpu import targets
from benchmarks.gpu.parts import Context, Measured, release
from benchmarks.gpu.profiling import profile_a_miss
from benchmarks.latent_models import random_model
from dllm_core.methods.ldlm.fast import FastSampler
from dllm_core.methods.ldlm.method import Method
from dllm_core.methods.ldlm.plans import Shape as Work

Point = tuple[str, int, int, int]
"""(shape, tokens, batch, steps)."""
LARGE, LARGER, PROMPT = "qwen3_6_35b_a3b", "qwen3_6_27b", 32
POINTS: tuple[Point, ...] = (
    (LARGE, 64, 1, 10),
    (LARGE, 64, 1, 4),
    (LARGE, 64, 16, 10),
    *((LARGE, 64, batch, 10) for batch in (4, 32)),
    *((LARGE, tokens, 1, 10) for tokens in (128, 512)),
    *((LARGE, 64, 1, steps) for steps in (1, 2, 20)),
    (LARGER, 64, 1, 10),
    (LARGER, 64, 1, 4),
    (LARGER, 64, 16, 10),
    ("qwen3_1_7b", 64, 1, 10),
    ("paper", 64, 1, 10),
)
FIRST = ((LARGE, 64, 1, 10), (LARGE, 64, 1, 4), (LARGE, 64, 16, 10), (LARGER, 64, 1, 10))
"""Those with targets."""
SMOKE: Point = ("smoke", 16, 2, 2)
"""What stands in for every point in a smoke run."""
NEEDS_S = 30.0
"""Seconds that a point is taken to need on a GPU: compiling, capturing, ten seconds of rounds."""


def row_name(point: Point) -> str:
    """Return what a point is called in the record."""
    shape, tokens, batch, steps = point
    return f"{shape}, {tokens} tokens, batch {batch}, {steps} steps"


class Loaded:
    """The model of one shape at a time."""

    def __init__(self, context: Context) -> None:
        self.context, self.name = context, ""
        self.model: tuple[Method, FastSampler] | None = None

    def of(self, name: str) -> tuple[Method, FastSampler]:
        """Return model and sampler of a shape; another shape's are let go of first."""
        if self.model is None or name != self.name:
            self.model = None
            release(self.context.device)
            method = random_model(name, self.context.device, torch.bfloat16, self.context.seed)
            self.name, self.model = name, (method, FastSampler(method))
        return self.model


def run(context: Context) -> dict[str, Any]:
    """Measure every point that fits, those with targets first."""
    args = _arguments(context)
    found = context.ceilings("bf16")
    whole = {"weights": ldlm_inference.WEIGHTS_NOTE, "roofline": ceilings.DEFINITION, "prompt_tokens": PROMPT}
    if found is None:
        return whole
    loaded = Loaded(context)
    for point in FIRST if context.smoke else (*FIRST, *(point for point in POINTS if point not in FIRST)):
        name, ran = row_name(point), SMOKE if context.smoke else point
        settings = {"ran": ran, "prompt_tokens": PROMPT, "dtype": "bf16", "seconds": args.point_seconds}
        row = context.row(
            name,
            _measuring(loaded, ran, args, found),
            settings=settings,
            needs_s=0.0 if context.smoke else NEEDS_S,
        )
        profile_a_miss(context, name, row, lambda ran=ran: _call(loaded, ran, args))  # type: ignore[misc]
    return whole


def _arguments(context: Context) -> argparse.Namespace:
    words = ["--device", context.device.type, "--dtype", "bf16", "--seed", str(context.seed)]
    return ldlm_inference.arguments([*words, *(["--quick"] if context.smoke else ["--point-seconds", "6"])])


def _bench(loaded: Loaded, point: Point, args: argparse.Namespace) -> ldlm_inference.Bench:
    shape, tokens, batch, steps = point
    method, sampler = loaded.of(shape)
    return ldlm_inference.Bench(method, sampler, Work(batch, PROMPT, tokens, steps, "ddim"), args)


def _call(loaded: Loaded, point: Point, args: argparse.Namespace) -> Callable[[], object]:
    bench = _bench(loaded, point, args)
    return lambda: bench.fast(0)


def _measuring(
    loaded: Loaded, point: Point, args: argparse.Namespace, limits: dict[str, float]
) -> Callable[[], Measured]:
    def measure() -> Measured:
        bench = _bench(loaded, point, args)
        detail = ldlm_inference.measure(bench, point[0], limits)
        sampler = bench.sampler
        path = {"compiled": sampler.compiled, "graphs": sampler.graphs, "notes": sampler.notes}
        shared = {"passed": detail["check"]["passed"], "fast_path": path, "detail": detail}
        if not detail["check"]["passed"]:
            return {"why": "fast and eager differ: not timed", **shared}
        fast = detail["fast"]
        return {
            "headline": {
                "tokens_per_s": fast["tokens_per_s"]["median"],
                "share_of_roofline": fast["share_of_roofline"],
                "fast_over_eager": detail["fast_over_eager"]["ratio"],
                "p50_ms": fast["latency_ms"]["p50"],
                "p99_ms": fast["latency_ms"]["p99"],
            },
            "seconds": fast["latency_ms"]["p50"] / 1e3,
            "two_numbers": targets.two_numbers(detail["demand"], limits),
            **shared,
        }

    return measure
