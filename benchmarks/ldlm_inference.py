"""Speed of latent diffusion generation, fast path and eager reference taking turns. The weights are random.

    python benchmarks/ldlm_inference.py                                   # all shapes on a GPU, the laptop's on a CPU
    python benchmarks/ldlm_inference.py --shapes qwen3_6_35b_a3b,qwen3_6_27b
    python benchmarks/ldlm_inference.py --quick --shapes laptop

From a base point (64 tokens, batch 1, 10 steps, 32 prompt tokens) one factor at a time is changed; every number is
measured. A call begins with prompt ids in host memory and ends with token ids in host memory; it draws its noise on
the device. Before a point is timed, both paths generate from the same noise and are compared. Points that an earlier
run of the same commit on the same hardware measured are kept, so that a run stopped by --time-limit can be continued.
Needs torch, transformers (whose version is noted), pydantic and this library.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import _report, ceilings
from benchmarks.latent_models import BASES, passes, random_model
from dllm_core.evals import throughput
from dllm_core.hardware import memory_gb, synchronise
from dllm_core.methods.ldlm import generation
from dllm_core.methods.ldlm.fast import FastSampler
from dllm_core.methods.ldlm.method import Method
from dllm_core.methods.ldlm.plans import Plan
from dllm_core.methods.ldlm.plans import Shape as Work
from dllm_core.methods.protocol import GenerationOutput
from dllm_core.samplers.config import DiffusionGenerationConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ("qwen3_6_35b_a3b", "qwen3_6_27b", "qwen3_1_7b", "laptop", "paper")
CPU_SHAPES = ("laptop",)
BASE_POINT = {"tokens": 64, "batch": 1, "steps": 10}
FACTORS = {"tokens": (128, 256, 512), "batch": (2, 4, 8, 16, 32), "steps": (1, 2, 4, 20)}
QUICK_FACTORS: dict[str, tuple[int, ...]] = {"tokens": (96,), "batch": (2,), "steps": (2,)}
LATENT_BOUND = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest accepted ||fast - eager|| / ||eager|| of the latents, from the same noise."""
WEIGHTS_NOTE = "random weights: speed only, the tokens mean nothing"
LEAST_ROUNDS = 6
NO_MEMORY = f"{_report.NOT_MEASURED}: out of memory"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        unknown = [n for n in found if n not in BASES]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown shapes {unknown}; known: {', '.join(BASES)}")
        return found

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=names, help=f"default: {','.join(SHAPES)}; on a CPU {','.join(CPU_SHAPES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bf16")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--solver", choices=["ddim", "ddpm", "sde"], default="ddim")
    parser.add_argument("--compile", choices=["auto", "yes", "no"], default="auto", help="auto: on a GPU")
    parser.add_argument("--rounds", type=int, default=100, help=f"at most, of each point; at least {LEAST_ROUNDS}")
    parser.add_argument("--point-seconds", type=float, default=10.0, help="aim for the rounds of a point")
    parser.add_argument("--time-limit", type=float, default=440.0, help="seconds after which no point is begun")
    parser.add_argument("--quick", action="store_true", help="few points and rounds: a test, no measurement")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ldlm_inference-<device>.json")
    return parser.parse_args(argv)


def points(quick: bool) -> list[dict[str, int]]:
    """Return the base point and those that differ from it in one factor."""
    factors = QUICK_FACTORS if quick else FACTORS
    return [dict(BASE_POINT), *({**BASE_POINT, name: value} for name, values in factors.items() for value in values)]


@dataclass
class Bench:
    """What is timed at one point.

    Attributes:
        method: with random weights.
        sampler: its fast path.
        work: the point.
        args: of the command line.
    """

    method: Method
    sampler: FastSampler
    work: Work
    args: argparse.Namespace

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.args.seed)
        shape, work = (self.work.batch, self.work.prompt), self.work
        self.prompt_BP = torch.randint(self.method.base.contract.num_tokens, shape, generator=generator)
        self.noise = torch.Generator(device=self.method.device).manual_seed(self.args.seed)
        self.config = DiffusionGenerationConfig(
            max_new_tokens=work.tokens, max_denoising_steps=work.steps, stop_at_eos=False
        )
        self.plan: Plan = self.sampler.plan(work)

    def _output(self, tokens_BL: Tensor) -> GenerationOutput:
        work = self.work
        return GenerationOutput(list(tokens_BL.cpu()), [work.tokens] * work.batch, work.steps + 3, 0.0)

    def fast(self, index: int) -> GenerationOutput:
        """Generate on the fast path; all calls do equal work."""
        self.plan.ids_BP.copy_(self.prompt_BP, non_blocking=True)
        self.plan.noise_RBLK.normal_(generator=self.noise)
        return self._output(self.plan.run())

    def _eager(self, noises: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        job = generation.job_of(
            self.method, list(self.prompt_BP), self.config, solver=self.work.solver, guidance=self.work.guidance
        )
        latents_BLK, real_BL, _ = generation.latents(self.method, job, noises)
        return latents_BLK, generation.tokens_of(self.method, job, latents_BLK, real_BL)

    @torch.no_grad()
    def eager(self, index: int) -> GenerationOutput:
        """Generate on the reference path."""
        like = self.plan.noise_RBLK[0]

        def noises(k: int) -> Tensor:
            return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=self.noise)

        return self._output(self._eager(noises)[1])

    @torch.no_grad()
    def check(self) -> dict[str, Any]:
        """Compare both paths from the same noise."""
        self.plan.noise_RBLK.normal_(generator=self.noise)
        self.plan.ids_BP.copy_(self.prompt_BP)
        latents_BLK, tokens_BL = self._eager(lambda k: self.plan.noise_RBLK[k])
        found_BL = self.plan.run()
        difference = (self.plan.latents_BLK.double() - latents_BLK.double()).norm() / latents_BLK.double().norm()
        bound = LATENT_BOUND[self.args.dtype]
        return {
            "latents_relative_difference": float(difference),
            "bound": bound,
            "same_tokens": float((found_BL == tokens_BL).double().mean()),
            "passed": bool(difference < bound),
        }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99 in ms, by nearest rank: every one is a latency that was measured."""
    ordered = sorted(seconds)
    return {f"p{p}": 1e3 * ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in (50, 90, 99)}


def _peak_gb(run: Callable[[int], object], device: torch.device) -> float | None:
    """Return the peak allocation of one call; None on a CPU, where only a process has a peak."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run(0)
    synchronise(device)
    return memory_gb(device)[1]


def measure(bench: Bench, name: str, limits: dict[str, float]) -> dict[str, Any]:
    """Check a point, time it, and put the times against the ceilings."""
    args, work, device = bench.args, bench.work, bench.method.device
    point: dict[str, Any] = {"tokens": work.tokens, "batch": work.batch, "steps": work.steps, "check": bench.check()}
    if not point["check"]["passed"]:
        return point
    rows = {"fast": bench.fast, "eager": bench.eager}
    once = sum(throughput.timed(row, 0).seconds for row in rows.values())
    wanted = min(args.rounds, int(args.point_seconds / once))
    timings = throughput.interleave(
        {"point": rows}, rounds={"point": LEAST_ROUNDS if args.quick else max(LEAST_ROUNDS, wanted)}
    )["point"]
    element_bytes = torch.empty((), dtype=bench.plan.noise_RBLK.dtype).element_size()
    needed = ceilings.demand(passes(name, work), element_bytes, limits)
    for row, values in timings.items():
        found = throughput.summary(values)
        seconds = [t.seconds for t in values]
        at_median = ceilings.achieved(needed, work.batch * work.tokens / found["tokens_per_s"]["median"])
        point[row] = {
            "tokens_per_s": found["tokens_per_s"],
            "latency_ms": percentiles(seconds),
            "peak_gb": _peak_gb(rows[row], device),
            **at_median,
            "rounds": found["rounds"],
        }
    (point["fast_over_eager"],) = throughput.compare(timings, [("fast", "eager")])
    point["demand"] = needed
    return point


def measure_shape(
    name: str, args: argparse.Namespace, deadline: float, kept: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Measure every point of a shape that begins before the deadline and is not among the kept ones."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    limits = ceilings.measure(device, dtype, quick=args.quick)
    method = random_model(name, device, dtype, args.seed)
    sampler = FastSampler(method, compiled={"auto": None, "yes": True, "no": False}[args.compile])
    done = {_place(point): point for point in kept}
    for point in points(args.quick):
        if _place(point) in done or time.monotonic() > deadline:
            continue
        work = Work(point["batch"], args.prompt_tokens, point["tokens"], point["steps"], args.solver)
        begun = time.perf_counter()
        try:
            bench = Bench(method, sampler, work, args)
            prepared = time.perf_counter() - begun
            found = {**measure(bench, name, limits), "prepare_s": prepared, "ceilings": limits}
        except torch.OutOfMemoryError:
            found = {**point, "fast": NO_MEMORY, "eager": NO_MEMORY}
        done[_place(point)] = found
        print(line(name, found), file=sys.stderr, flush=True)
    not_yet = {"fast": _report.NOT_MEASURED, "eager": _report.NOT_MEASURED}
    shape = {
        "parameters": sum(p.numel() for p in method.networks.parameters()),
        "points": [done.get(_place(point), {**point, **not_yet}) for point in points(args.quick)],
        "memory_gb": dict(zip(("now", "peak"), memory_gb(device), strict=True)),
        "fast_path": {"compiled": sampler.compiled, "graphs": sampler.graphs, "notes": sampler.notes},
    }
    del method, sampler
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return shape


def _place(point: dict[str, Any]) -> tuple[int, ...]:
    return tuple(point[name] for name in BASE_POINT)


def line(name: str, point: dict[str, Any]) -> str:
    """Return a point as a row of the table."""
    start = f"{name:<16} {point['tokens']:>6} {point['batch']:>5} {point['steps']:>5}"
    if "fast_over_eager" not in point:
        differs = "check" in point and not point["check"]["passed"]
        return f"{start}  {'fast and eager differ: not timed' if differs else point['fast']}"
    fast, ratio = point["fast"], point["fast_over_eager"]
    low, high = (float("nan") if end is None else end for end in ratio["ci95"])
    return (
        f"{start} {fast['tokens_per_s']['median']:>9.0f} {point['eager']['tokens_per_s']['median']:>9.0f}"
        f" {ratio['ratio']:>6.2f} ({low:.2f} to {high:.2f}) {fast['latency_ms']['p50']:>9.2f}"
        f" {fast['latency_ms']['p99']:>9.2f} {fast['gb_per_s']:>7.0f} {fast['tflop_per_s']:>8.2f}"
        f" {100 * fast['share_of_roofline']:>6.1f} %"
    )


def table(record: dict[str, Any]) -> str:
    """Return a record as text."""
    heads = (
        f"{'shape':<16} {'tokens':>6} {'batch':>5} {'steps':>5} {'fast t/s':>9} {'eager t/s':>9} {'ratio (95 %)':>21}"
        f" {'p50 ms':>9} {'p99 ms':>9} {'GB/s':>7} {'TFLOP/s':>8}    roof"
    )
    lines = [f"Weights: {record['weights']}.", heads]
    for name, shape in record["shapes"].items():
        if isinstance(shape, str):
            lines.append(f"{name:<16} {shape}")
        else:
            lines += [line(name, point) for point in shape["points"]]
    return "\n".join(lines)


def earlier(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of a record on disk that comes from an earlier part of the same measurement."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = ("schema_version", "commit", "hardware", "versions", "settings", "seed")
    if record["dirty"] or old.get("dirty") or any(old.get(key) != record[key] for key in same):
        return {}
    return {name: shape for name, shape in old.get("shapes", {}).items() if isinstance(shape, dict)}


def measured(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the points of a shape that need no further run."""
    return [point for point in shape["points"] if point.get("fast") != _report.NOT_MEASURED]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 0, or 1 where the two paths differ."""
    args = arguments(argv)
    deadline = time.monotonic() + args.time_limit
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    wanted = args.shapes or [*(CPU_SHAPES if args.device == "cpu" else SHAPES)]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "shapes", "time_limit")}
    record = _report.header("ldlm_inference", args.seed, settings)
    record |= {"weights": WEIGHTS_NOTE, "roofline": ceilings.DEFINITION}
    path = args.out or _report.RESULTS / f"ldlm_inference-{'gpu' if record['hardware']['gpu'] else 'cpu'}.json"
    old = earlier(path, record)
    record["shapes"] = {n: old.get(n, _report.NOT_MEASURED) for n in dict.fromkeys((*SHAPES, *wanted))}
    for name in wanted:
        kept = measured(old[name]) if name in old else []
        if len(kept) < len(points(args.quick)) and time.monotonic() < deadline:
            record["shapes"][name] = measure_shape(name, args, deadline, kept)
            _report.write(record, path)
    print(table(record))
    print(json.dumps({"written": str(_report.write(record, path))}))
    checks = [p["check"] for s in record["shapes"].values() if isinstance(s, dict) for p in s["points"] if "check" in p]
    return 0 if all(check["passed"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
