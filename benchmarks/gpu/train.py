"""Training at the shape of Qwen3-1.7B, sequences of 2,048 tokens: share of the peak rate, price of alignment, memory.

Rows and timing are those of `benchmarks/train.py` and `benchmarks/loss_memory.py`; weights and tokens are random.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import loss_memory, train
from benchmarks.gpu import targets
from benchmarks.gpu.parts import Context, Measured
from benchmarks.gpu.profiling import profile_a_miss
from benchmarks.gpu.random_backbone import SHAPES, WEIGHTS_NOTE, random_backbone
from dllm_core.backbone.backbone import Backbone
from dllm_core.hardware import memory_gb, synchronise

VENDOR_BF16_TFLOP_PER_S = {"H200": 989.4, "H100": 989.4, "A100": 312.0}
"""Dense bf16 rate of the SXM parts by the vendor's datasheets."""
NAMES = ("ours_random_mask", "ours_repr_align_all")
SEQUENCES_IN_STORE = 16
"""Distinct ones, so that the store is about 4 GB: they come round again, from the page cache."""
LOSS_ROWS = (4096, 16384)
NEEDS_S = {"mfu": 60.0, "aligned": 120.0, "memory": 150.0}
DEFINITION = (
    "MFU = operations of the step / (seconds x rate). Operations: 3 x (2 per weight of the blocks and position,"
    " attention over the whole sequence, 2 per weight of the head and masked row); a backward costs two forwards."
    " The rate is the vendor's dense bf16 one where the GPU is known, else that of a large product measured in the same"
    " run; mfu_of_measured is over the latter. A step is whole: corruption, forward, backward, clipping, AdamW on fp32"
    " masters."
)


class RandomBench(train.Bench):
    """The training benchmark on a random model made in memory.

    Args:
        shape: a key of `SHAPES`.
        args: of `benchmarks/train.py`.
        scratch: directory for anchors.
    """

    def __init__(self, shape: str, args: argparse.Namespace, scratch: Path) -> None:
        self.shape = shape
        super().__init__(args, Path(shape), scratch)

    def num_tokens(self) -> int:
        """Return the shape's vocabulary."""
        return SHAPES[self.shape]["vocab_size"]

    def backbone(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Backbone:
        """Return the model: the same one every time."""
        return random_backbone(self.shape, torch.device(device), dtype, self.args.seed)


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder and remove it afterwards; what a process that was killed left there goes first."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def vendor_rate(gpu: str | None) -> float | None:
    """Return the vendor's dense bf16 rate of a GPU in TFLOP/s, None for one that is not known."""
    return next((rate for name, rate in VENDOR_BF16_TFLOP_PER_S.items() if gpu and name in gpu), None)


def run(context: Context) -> dict[str, Any]:
    """Measure MFU, alignment and memory."""
    whole = {"weights": WEIGHTS_NOTE, "mfu": DEFINITION}
    limits = context.ceilings("bf16")
    if limits is None:
        return whole
    shape = "tiny" if context.smoke else "qwen3_1_7b"
    args = _arguments(context)
    settings = {"shape": shape, "batch": args.batch_size, "micro_batch": args.micro_batch_size, "length": args.length}

    def row(name: str, kind: str, measure: Callable[[], Measured]) -> Measured | None:
        return context.row(name, measure, settings=settings, needs_s=0.0 if context.smoke else NEEDS_S[kind])

    found = row(targets.MFU, "mfu", lambda: _mfu(context, shape, args, limits))
    profile_a_miss(context, targets.MFU, found, lambda: _call(context, shape, args))
    row(targets.ALIGNED, "aligned", lambda: _aligned(context, shape, args, limits))
    row(targets.LOSS_MEMORY, "memory", lambda: _loss_memory(context))
    return whole


def _arguments(context: Context) -> argparse.Namespace:
    words = ["--device", context.device.type, "--dtype", "bf16", "--seed", str(context.seed), "--warmup", "2"]
    words += ["--prompt-tokens", "1"]
    if context.smoke:
        sizes = ["--batch-size", "2", "--micro-batch-size", "1", "--length", "16", "--rounds", "3", "--sequences", "4"]
    else:
        sizes = ["--batch-size", "8", "--micro-batch-size", "4", "--length", "2048", "--rounds", "8"]
        sizes += ["--sequences", str(SEQUENCES_IN_STORE)]
    return train.arguments([*words, *sizes])


def _rates(context: Context, limits: dict[str, float]) -> tuple[float, float]:
    """Return (rate that MFU is of, measured rate) in FLOP/s."""
    measured = 1e12 * limits["tflop_per_s"]
    gpu = torch.cuda.get_device_name() if context.device.type == "cuda" else None
    vendor = vendor_rate(gpu)
    return (measured if vendor is None else 1e12 * vendor), measured


def _timed(bench: RandomBench, rows: dict[str, train.Step]) -> dict[str, Any]:
    """Time rows in turns; return timings by row, without a line for every round."""
    with redirect_stderr(StringIO()):
        return train.run(bench, rows, "main")


def _of_metrics(bench: RandomBench, name: str) -> tuple[float, float]:
    """Return (operations of a step, seconds of a step), medians of the rounds that count."""
    kept = bench.metrics[name][bench.args.warmup :]
    # the trainer was told a peak rate of 1: its MFU is the rate itself
    return median(m["train/mfu"] * m["train/step_s"] for m in kept), median(m["train/step_s"] for m in kept)


def _mfu(context: Context, shape: str, args: argparse.Namespace, limits: dict[str, float]) -> Measured:
    with fresh_folder(context.work / "scratch") as scratch:
        bench = RandomBench(shape, args, scratch)
        method = bench.method("random_mask")
        rows = {NAMES[0]: bench.ours(bench.trainer(method, None), NAMES[0], method)}
        if context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timings = _timed(bench, rows)
        flops, seconds = _of_metrics(bench, NAMES[0])
        weights = sum(p.numel() for p in method.parameters())
    rate, measured = _rates(context, limits)
    # at least: the weights of forward and backward in bf16, masters, gradients and moments of AdamW in fp32
    demand = {"bytes": weights * (2 * 2 + 2 + 2 * 16), "flops": flops}
    return {
        "headline": {
            "mfu": flops / seconds / rate,
            "mfu_of_measured": flops / seconds / measured,
            "tokens_per_s": bench.tokens / seconds,
            "step_s": seconds,
            "peak_gb": memory_gb(context.device)[1],
        },
        "rate_tflop_per_s": rate / 1e12,
        "seconds": seconds,
        "demand": demand,
        "two_numbers": targets.two_numbers(demand, limits),
        "detail": train.speeds(timings),
    }


def _call(context: Context, shape: str, args: argparse.Namespace) -> Callable[[], object]:
    bench = RandomBench(shape, args, context.work / "profile")
    method = bench.method("random_mask")
    step = bench.ours(bench.trainer(method, None), NAMES[0], method)
    return lambda: step(0)


def host_to_device(device: torch.device) -> float:
    """Return the bytes per second of the best of a few copies from pageable host memory."""
    source, best = torch.ones(2**20 if device.type == "cpu" else 2**28, dtype=torch.uint8), float("inf")
    for _ in range(4):
        synchronise(device)
        start = time.perf_counter()
        source.to(device, copy=True)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return source.numel() / best


def _aligned(context: Context, shape: str, args: argparse.Namespace, limits: dict[str, float]) -> Measured:
    with fresh_folder(context.work / "scratch") as scratch:
        bench = RandomBench(shape, args, scratch)
        rows, per_sequence = bench.our_rows()
        timings = _timed(bench, rows)
        store_bytes = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    (faster,) = train.throughput.compare(timings, [(NAMES[0], NAMES[1])])
    (_, plain_s), (flops, seconds) = (_of_metrics(bench, name) for name in NAMES)
    # a mask hides half of a sequence on average, and its states come from the host
    read, link = store_bytes * args.batch_size / len(bench.data) / 2, host_to_device(context.device)
    return {
        "headline": {
            "over_random_mask": faster["ratio"],
            "step_s": seconds,
            "random_mask_step_s": plain_s,
            "extraction_s_per_sequence": per_sequence,
            "store_gb": store_bytes / 1e9,
        },
        "ratio": faster,
        "seconds": seconds,
        "demand": {"bytes_from_host": read, "flops": flops, "host_to_device_gb_per_s": link / 1e9},
        "two_numbers": {"bytes_s": read / link, "operations_s": flops / (1e12 * limits["tflop_per_s"])},
        "detail": train.speeds(timings),
    }


def _loss_memory(context: Context) -> Measured:
    """Return peaks of the loss with all logits and in chunks at two sizes, and what a further token takes."""
    vocab, hidden = (301, 32) if context.smoke else (SHAPES["qwen3_1_7b"]["vocab_size"], 2048)
    sizes = (64, 128) if context.smoke else LOSS_ROWS
    words = ["--vocab", str(vocab), "--hidden", str(hidden), "--device", context.device.type]
    found = {
        rows: loss_memory.measure(loss_memory.arguments([*words, "--rows", str(rows), "--seed", str(context.seed)]))
        for rows in sizes
    }
    small, large = (found[rows] for rows in sizes)
    headline = {}
    for kind in ("chunked", "full"):
        if "peak_gb" in small[kind] and "peak_gb" in large[kind]:
            grown = 1e9 * (large[kind]["peak_gb"] - small[kind]["peak_gb"])
            headline[f"{kind}_bytes_per_token"] = grown / (sizes[1] - sizes[0])
            headline[f"{kind}_peak_gb"] = large[kind]["peak_gb"]
    if large.get("full_over_chunked") is not None:
        headline["full_over_chunked"] = large["full_over_chunked"]
    if "chunked_peak_gb" not in headline:
        raise RuntimeError(f"the chunked loss did not run: {large['chunked']}")
    return {"headline": headline, "vocab": vocab, "hidden": hidden, "detail": {str(k): v for k, v in found.items()}}
