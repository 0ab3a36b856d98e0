"""Token-space decoding at the shape of Qwen3-1.7B, random weights, timed as `benchmarks/decode.py` does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers.utils import logging

from benchmarks import ceilings, decode, decode_parts
from benchmarks.decode_parts import Costs, Part, Setting
from benchmarks.decode_record import Measurement
from benchmarks.gpu import decode_demand, targets
from benchmarks.gpu.parts import Context, Measured
from benchmarks.gpu.profiling import profile_a_miss
from benchmarks.gpu.random_backbone import WEIGHTS_NOTE, RandomModels

BASE = Setting(prompt=32, new=128, batch=1, steps=8)
BATCHES, CANVASES, STEPS = (4, 16, 64), (128, 256, 512, 1024, 2048), (4, 16, 32, 128)
BLOCK_CANVAS, BLOCK_SIZE, STEPS_PER_BLOCK = (1024, 512), 32, 4
NEEDS_S = {"sweep": 30.0, "ar": 90.0, "block_causal": 60.0, "ours": 15.0, "compiled": 90.0}
"""Seconds that a row is taken to need on a GPU, with what is made or compiled on the first call."""


class Bench:
    """Models, settings and ceilings that the rows share.

    Args:
        context: of the part.
        limits: ceilings.
    """

    def __init__(self, context: Context, limits: dict[str, float]) -> None:
        self.context, self.limits = context, limits
        self.shape = "tiny" if context.smoke else "qwen3_1_7b"
        self.block_size = 4 if context.smoke else BLOCK_SIZE
        self.models = RandomModels(self.shape, context.device, torch.bfloat16, context.seed, self.block_size)

    def shrunk(self, setting: Setting) -> Setting:
        """Return a setting, in a smoke run a small one in its place."""
        if not self.context.smoke:
            return setting
        return Setting(prompt=4, new=8, batch=min(setting.batch, 2), steps=min(setting.steps, 4))

    def arguments(self, setting: Setting, *parts: str, compiled: bool = False) -> argparse.Namespace:
        """Return what `benchmarks/decode.py` would be told to measure these parts of one setting."""
        smoke = self.context.smoke
        canvas = (8, 8) if smoke else BLOCK_CANVAS
        words = ["--device", self.context.device.type, "--dtype", "bf16", "--seed", str(self.context.seed)]
        words += ["--parts", ",".join(parts), "--steps", str(setting.steps), "--batch-sizes", str(setting.batch)]
        words += ["--canvases", f"{setting.prompt}+{setting.new}", "--block-size", str(self.block_size)]
        words += ["--block-causal-canvas", f"{canvas[0]}+{canvas[1]}", "--steps-per-block", str(STEPS_PER_BLOCK)]
        words += ["--part-limit", "0" if smoke else "12", "--warmup", "1" if smoke else "2", "--quiet"]
        # the compiler of a CPU takes longer than a smoke run may
        return decode.arguments([*words, *(["--compile"] if compiled and not smoke else [])])

    def part(self, setting: Setting, name: str, *, compiled: bool = False) -> tuple[Part, argparse.Namespace]:
        """Return a part of the decoding benchmark at a setting."""
        args = self.arguments(setting, name, compiled=compiled)
        (part,) = decode_parts.parts(self.models, args)
        return part, args

    @cached_property
    def costs(self) -> Costs:
        """What rows take, learnt from the rows that were timed."""
        return decode.calibrate(self.models, self.arguments(self.shrunk(BASE), "sweep", "ar"))

    def measured(self, part: Part, args: argparse.Namespace) -> Measurement:
        """Time a part for as many rounds as its limit takes."""
        rounds, _ = self.costs.rounds(part, args.rounds, args.part_limit)
        return decode.measure(self.models, part, rounds, self.costs, args)

    def roofline(self, part: Part, name: str, found: Measurement) -> Measured:
        """Return a row of ours beside what it must move and compute."""
        setting, config, backbone = part.setting, part.rows[name].config, self.models.backbone
        assert config is not None
        model, num_tokens = backbone.config, backbone.contract.num_tokens
        if config.cache.kind == "exact":
            work = decode_demand.cached_passes(model, num_tokens, config, setting.prompt, self.block_size)
        else:
            work = decode_demand.passes(model, num_tokens, config, setting.prompt, setting.batch)
        demand = ceilings.demand(work, 2, self.limits)
        seconds = setting.batch * setting.new / found.rows[name].tokens_per_s.median
        return {
            "seconds": seconds,
            "demand": demand,
            "two_numbers": targets.two_numbers(demand, self.limits),
            "achieved": ceilings.achieved(demand, seconds),
        }


def ratio_of(found: Measurement, *rows: str) -> float | None:
    """Return how much faster a row is than another, None where that was not measured."""
    return next((r.ratio for r in found.ratios if r.rows == rows), None)


def run(context: Context) -> dict[str, Any]:
    """Measure the rows with targets, then the sweep against the roofline."""
    logging.disable_progress_bar()
    whole = {"weights": WEIGHTS_NOTE, "roofline": f"{ceilings.DEFINITION} {decode_demand.DEFINITION}"}
    limits = context.ceilings("bf16")
    if limits is None:
        return whole
    bench = Bench(context, limits)
    settings: dict[str, Any] = {"shape": bench.shape, "dtype": "bf16"}

    def row(name: str, kind: str, measure: Callable[[], Measured]) -> Measured | None:
        return context.row(name, measure, settings=settings, needs_s=0.0 if context.smoke else NEEDS_S[kind])

    headline = row(targets.HEADLINE_DECODE, "sweep", lambda: _sweep(bench))
    profile_a_miss(context, targets.HEADLINE_DECODE, headline, lambda: _call(bench, "sweep", "ours"))
    row(targets.AR, "ar", lambda: _against_ar(bench))
    in_blocks = row(targets.BLOCK_CAUSAL, "block_causal", lambda: _block_causal(bench))
    profile_a_miss(context, targets.BLOCK_CAUSAL, in_blocks, lambda: _call(bench, "block_causal", "exact"))
    for setting in _swept():
        name = f"{setting.prompt}+{setting.new} tokens, batch {setting.batch}, {setting.steps} steps"
        row(name, "ours", lambda setting=setting: _ours(bench, setting))  # type: ignore[misc]
    if not context.smoke:  # the compiler of a CPU takes longer than a smoke run may
        row(f"{targets.HEADLINE_DECODE}, without torch.compile", "compiled", lambda: _uncompiled(bench))
    return whole


def _swept() -> list[Setting]:
    """Return the settings that differ from the base in one factor."""
    return [
        *(replace(BASE, batch=batch) for batch in BATCHES),
        *(replace(BASE, new=canvas - BASE.prompt) for canvas in CANVASES),
        *(replace(BASE, steps=steps) for steps in STEPS),
    ]


def _call(bench: Bench, part_name: str, row: str) -> Callable[[], object]:
    part, _ = bench.part(bench.shrunk(BASE), part_name)
    decode_row = part.rows[row].decode
    return lambda: decode_row(0)


def _sweep(bench: Bench) -> Measured:
    part, args = bench.part(bench.shrunk(BASE), "sweep")
    found = bench.measured(part, args)
    told = bench.roofline(part, "ours", found)
    headline = {
        "tokens_per_s": found.rows["ours"].tokens_per_s.median,
        "share_of_roofline": told["achieved"]["share_of_roofline"],
        "over_plain": ratio_of(found, "ours", "plain"),
        "over_masked_rows": ratio_of(found, "ours", "masked_rows"),
        "first_token_ms": 1e3 * found.rows["ours"].first_token_s,
    }
    return {"headline": headline, **told, "detail": found.model_dump(mode="json")}


def _ours(bench: Bench, setting: Setting) -> Measured:
    """Return our loop alone: the sweep over batch, canvas and steps is against the roofline."""
    part, args = bench.part(bench.shrunk(setting), "sweep")
    part = replace(part, rows={"ours": part.rows["ours"]}, pairs=(), reference="ours")
    found = bench.measured(part, args)
    told = bench.roofline(part, "ours", found)
    headline = {
        "tokens_per_s": found.rows["ours"].tokens_per_s.median,
        "share_of_roofline": told["achieved"]["share_of_roofline"],
    }
    return {"headline": headline, **told, "detail": found.model_dump(mode="json")}


def _uncompiled(bench: Bench) -> Measured:
    """Return our loop with its element-wise parts as torch has them, beside the one that compiles them."""
    part, args = bench.part(BASE, "sweep", compiled=True)
    rows = {name: part.rows[name] for name in ("ours", "ours_uncompiled")}
    found = bench.measured(replace(part, rows=rows, pairs=(("ours_uncompiled", "ours"),), reference="ours"), args)
    told = bench.roofline(part, "ours_uncompiled", found)
    headline = {
        "tokens_per_s": found.rows["ours_uncompiled"].tokens_per_s.median,
        "share_of_roofline": told["achieved"]["share_of_roofline"],
        "over_ours": ratio_of(found, "ours_uncompiled", "ours"),
    }
    return {"headline": headline, **told, "detail": found.model_dump(mode="json")}


def _against_ar(bench: Bench) -> Measured:
    part, args = bench.part(bench.shrunk(BASE), "ar", compiled=True)
    found = bench.measured(part, args)
    assert found.ar_best is not None
    headline = {
        "over_ar_best": ratio_of(found, "ours", "ar_best"),
        "ar_best_tokens_per_s": found.rows[found.ar_best].tokens_per_s.median,
        **{f"{name} tok/s": row.tokens_per_s.median for name, row in found.rows.items()},
    }
    return {"headline": headline, "ar_best": found.ar_best, "detail": found.model_dump(mode="json")}


def _block_causal(bench: Bench) -> Measured:
    part, args = bench.part(bench.shrunk(BASE), "block_causal")
    found = bench.measured(part, args)
    assert found.check is not None
    told = bench.roofline(part, "exact", found)
    headline = {
        "over_uncached": ratio_of(found, "exact", "uncached"),
        "exact_tokens_per_s": found.rows["exact"].tokens_per_s.median,
        "uncached_tokens_per_s": found.rows["uncached"].tokens_per_s.median,
        "same_tokens_in_fp32": found.check.same_tokens,
        "share_of_roofline": told["achieved"]["share_of_roofline"],
    }
    return {"headline": headline, "passed": found.check.passed, **told, "detail": found.model_dump(mode="json")}
