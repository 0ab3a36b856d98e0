"""Speed of the library's kernels: Triton, the reference and torch.compile of plain torch, taking turns.

    python benchmarks/kernels.py                                  # every operation, bf16 and fp32
    python benchmarks/kernels.py --operations token_stats --dtypes bf16

Operations: `token_stats` and `token_losses` (forward and backward) from hidden states, and `chunk_losses`, the part of
the latter between its matrix products. Sizes are those of a GPU, or small ones on a CPU, where Triton's rows read "not
measured". Before anything is timed, what the implementations return is compared. On a GPU, other data is written
between calls, so that the head never waits in the cache. Needs torch, transformers (whose version is noted) and this
library; triton and a C++ compiler where they are to be measured. M rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import _report
from dllm_core.evals.intervals import ratio_interval, verdict
from dllm_core.hardware import peak_flops, synchronise
from dllm_core.kernels import dispatch, masked_ce, token_stats
from dllm_core.kernels.masked_ce import reference
from dllm_core.kernels.masked_ce.terms import Terms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMPLEMENTATIONS = ("reference", "compiled", "triton")
OPERATIONS = ("token_stats", "token_losses", "chunk_losses")
SHAPES = {"smollm2_135m": (576, 49152), "qwen3_1_7b": (2048, 151936), "tiny": (16, 301)}
SIZES: dict[str, tuple[tuple[str, ...], dict[str, tuple[int, ...]]]] = {
    "cuda": (
        ("smollm2_135m", "qwen3_1_7b"),
        {"token_stats": (1, 16, 64, 512), "token_losses": (4096,), "chunk_losses": (1536,)},
    ),
    "cpu": (("smollm2_135m",), {"token_stats": (1, 16, 64), "token_losses": (128,), "chunk_losses": (128,)}),
    "quick": (("tiny",), {"token_stats": (3,), "token_losses": (5,), "chunk_losses": (5,)}),
}
TEMPERATURE = 0.5
BOUND = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest accepted ||got - reference|| / ||reference|| of any output."""
DEFINITION = (
    "GB/s and TFLOP/s are the least bytes and operations of the task over the median time. token_stats: the head and"
    " the states read once; one product. token_losses: head and states read twice, the gradient of the states and the"
    " fp32 gradient of the head written; three products. chunk_losses: the logits read twice and written once. Share of"
    " the roofline: max(bytes / bandwidth, operations / rate) over the median time, with the ceilings measured in the"
    " same run: a large copy (bytes read and written) and a large product. Ratios are speeds, first over second, paired"
    " within rounds, with an interval of 95 %."
)


@dataclass
class Case:
    """One operation at one size: what it must move and do, what to call, and what to restore before each call."""

    num_bytes: float
    flops: float
    calls: dict[str, Callable[[], list[Tensor]]]
    prepare: Callable[[], object] = lambda: None


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", choices=OPERATIONS, nargs="+", default=list(OPERATIONS))
    parser.add_argument("--implementations", choices=IMPLEMENTATIONS, nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--dtypes", choices=[*DTYPES], nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="default: 30 on a GPU, 9 on a CPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests; the numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/kernels-<device>.json")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (30 if args.device == "cuda" else 9)
    return args


def plain_stats(hidden_MD: Tensor, weight_VD: Tensor) -> list[Tensor]:
    """Return the statistics the way one would write them down, for torch.compile."""
    logits_MV = (hidden_MD @ weight_VD.T).float()
    logp_MV = logits_MV.log_softmax(-1)
    best_M2 = logp_MV.topk(2, dim=-1)
    return [best_M2.indices[:, 0], *best_M2.values.unbind(-1), -(logp_MV.exp() * logp_MV).sum(-1)]


def plain_losses(logits_MV: Tensor, targets_M: Tensor, weights_3M: Tensor) -> Tensor:
    """Return the total of `token_losses` from all logits."""
    logits_MV = logits_MV.float()
    nll_M = -logits_MV.log_softmax(-1).gather(1, targets_M[:, None])[:, 0]
    logq_MV = (logits_MV / TEMPERATURE).log_softmax(-1)
    entropy_M = -(logq_MV.exp() * logq_MV).sum(-1)
    correct_M = logits_MV.argmax(-1) == targets_M
    scale_M = weights_3M[0] + weights_3M[1] * torch.exp(-nll_M).detach()
    return (scale_M * nll_M + weights_3M[2] * torch.where(correct_M, entropy_M, 0.0)).sum()


def plain_chunk(logits_MV: Tensor, targets_M: Tensor, weights_3M: Tensor) -> list[Tensor]:
    """Return losses and gradient of a chunk, the gradient in closed form."""
    x_MV = logits_MV.float()
    logp_MV = x_MV.log_softmax(-1)
    logq_MV = (x_MV / TEMPERATURE).log_softmax(-1)
    q_MV = logq_MV.exp()
    entropy_M1 = -(q_MV * logq_MV).sum(-1, keepdim=True)
    nll_M1 = -logp_MV.gather(1, targets_M[:, None])
    correct_M1 = x_MV.argmax(-1, keepdim=True) == targets_M[:, None]
    ce_M1, path_M1, weight_M1 = weights_3M[:, :, None]
    target_MV = torch.arange(x_MV.shape[1], device=x_MV.device) == targets_M[:, None]
    gradient_MV = (ce_M1 + path_M1 * torch.exp(-nll_M1)) * (logp_MV.exp() - target_MV.float())
    gradient_MV -= torch.where(correct_M1, weight_M1 / TEMPERATURE, 0.0) * q_MV * (logq_MV + entropy_M1)
    return [nll_M1[:, 0], torch.where(correct_M1, entropy_M1, 0.0)[:, 0], gradient_MV.to(logits_MV.dtype)]


def under(name: str, call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Return a call that the dispatch sends to one implementation."""

    def run() -> list[Tensor]:
        os.environ["DLLM_KERNELS"] = name
        return call()

    return run


def stats_case(hidden_MD: Tensor, weight_VD: Tensor) -> Case:
    """Return the statistics of random rows."""
    compiled = torch.compile(plain_stats, dynamic=False)

    def ours() -> list[Tensor]:
        return [x for x in token_stats.stats(hidden_MD, weight_VD, entropy=True) if x is not None]

    (rows, depth), vocab = hidden_MD.shape, len(weight_VD)
    calls = {name: under(name, ours) for name in ("reference", "triton")}
    calls["compiled"] = torch.no_grad()(lambda: compiled(hidden_MD, weight_VD))
    return Case((rows + vocab) * depth * hidden_MD.itemsize + 20 * rows, 2.0 * rows * depth * vocab, calls)


def losses_case(hidden_MD: Tensor, weight_VD: Tensor) -> Case:
    """Return all three terms of the losses, forward and backward."""
    targets_M, weights_3M = _targets(hidden_MD, weight_VD)
    hidden_MD, weight_VD = (x.clone().requires_grad_() for x in (hidden_MD, weight_VD))
    ce_M, path_M, entropy_M = weights_3M
    compiled = torch.compile(lambda h, w: plain_losses(h @ w.T, targets_M, weights_3M), dynamic=False)

    def with_gradients(total: Tensor) -> list[Tensor]:
        return [total.detach(), *torch.autograd.grad(total, [hidden_MD, weight_VD])]

    def ours() -> list[Tensor]:
        terms = {"ce_M": ce_M, "path_M": path_M, "entropy_M": entropy_M, "entropy_temperature": TEMPERATURE}
        return with_gradients(masked_ce.token_losses(hidden_MD, weight_VD, targets_M, **terms).total)

    (rows, depth), vocab, size = hidden_MD.shape, len(weight_VD), hidden_MD.itemsize
    calls = {name: under(name, ours) for name in ("reference", "triton")}
    calls["compiled"] = lambda: with_gradients(compiled(hidden_MD, weight_VD))
    moved = (2 * vocab + 3 * rows) * depth * size + 4 * vocab * depth
    return Case(moved, 6.0 * rows * depth * vocab, calls)


def chunk_case(hidden_MD: Tensor, weight_VD: Tensor) -> Case:
    """Return what lies between the products, from fresh logits each time."""
    targets_M, weights_3M = _targets(hidden_MD, weight_VD)
    logits_MV = hidden_MD @ weight_VD.T
    buffer_MV, parts_3M = torch.empty_like(logits_MV), torch.zeros_like(weights_3M)
    compiled = torch.compile(plain_chunk, dynamic=False)
    terms = Terms(entropy=True, temperature=TEMPERATURE, blocked_V=None, gradient=True)

    def through(chunk_losses: Callable[..., Tensor | None]) -> list[Tensor]:
        gradient_MV = chunk_losses(buffer_MV, targets_M, weights_3M, parts_3M, terms)
        assert gradient_MV is not None
        return [parts_3M[0], parts_3M[2], gradient_MV]

    def by_triton() -> list[Tensor]:
        from dllm_core.kernels.masked_ce import triton

        return through(triton.chunk_losses)

    calls: dict[str, Callable[[], list[Tensor]]] = {
        "reference": lambda: through(reference.chunk_losses),
        "compiled": torch.no_grad()(lambda: compiled(buffer_MV, targets_M, weights_3M)),
        "triton": by_triton,
    }
    return Case(3.0 * buffer_MV.numel() * buffer_MV.itemsize, 0.0, calls, lambda: buffer_MV.copy_(logits_MV))


def _targets(hidden_MD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Return targets, every second of them the most probable id, and the weights of the terms."""
    targets_M = torch.randint(len(weight_VD), (len(hidden_MD),), device=hidden_MD.device)
    targets_M[::2] = token_stats.reference.stats(hidden_MD, weight_VD, second=False).argmax_M[::2]
    return targets_M, torch.rand(3, len(hidden_MD), device=hidden_MD.device) / len(hidden_MD)


CASES = {"token_stats": stats_case, "token_losses": losses_case, "chunk_losses": chunk_case}


def case_of(operation: str, shape: str, rows: int, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    """Return an operation at a named shape, on random states and weights whose logits have a spread of about 3."""
    depth, vocab = SHAPES[shape]
    torch.manual_seed(seed)
    hidden_MD = torch.randn(rows, depth, device=device).to(dtype)
    weight_VD = (torch.randn(vocab, depth, device=device) * 3 * depth**-0.5).to(dtype)
    return CASES[operation](hidden_MD, weight_VD)


class Clock:
    """Times a call: with device events and a cold cache on a GPU, with the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cold = torch.empty(2**28, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def seconds(self, case: Case, name: str) -> float:
        """Return the time of one call."""
        case.prepare()
        if self._cold is None:
            start = time.perf_counter()
            case.calls[name]()
            return time.perf_counter() - start
        self._cold.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        case.calls[name]()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read and written, of the best of a few large copies."""
    source = torch.empty(2**31 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).fill_(1)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(8):
        synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Return the largest ||got - want|| / ||want|| of the outputs; ids are not compared."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True) if b.is_floating_point()]
    found = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs]
    return max(float("inf") if x != x else x for x in found)


def obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why an implementation cannot be measured, None where it can as far as one can see."""
    return dispatch.triton_obstacle(device, dtype) if name == "triton" else None


def measure(case: Case, args: argparse.Namespace, dtype: str, clock: Clock, ceilings: dict[str, float]) -> dict:
    """Compare and time the implementations of a case in turns."""
    found: dict[str, Any] = {}
    device, ready, want = clock.device, [], None
    for name in (n for n in IMPLEMENTATIONS if n == "reference" or n in args.implementations):
        against = obstacle(name, device, DTYPES[dtype])
        try:
            if against is None:
                case.prepare()
                got = [x.detach().clone() for x in case.calls[name]()]
                want = want or got
                found[name] = {"difference": difference(got, want)}
                ready.append(name)
        except Exception as error:  # no compiler, no memory: the other rows still count
            against = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if against is not None:
            found[name] = f"{_report.NOT_MEASURED}: {against}"
    for name in ready:  # once more: the first call compiled
        clock.seconds(case, name)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for index in range(args.rounds):
        for shift in range(len(ready)):
            name = ready[(index + shift) % len(ready)]
            times[name].append(clock.seconds(case, name))
    floor = max(case.num_bytes / ceilings["gb_per_s"] / 1e9, case.flops / ceilings["tflop_per_s"] / 1e12)
    for name, values in times.items():
        middle = median(values)
        found[name] |= {
            "ms": 1e3 * middle,
            "fastest_ms": 1e3 * min(values),
            "gb_per_s": case.num_bytes / middle / 1e9,
            "tflop_per_s": case.flops / middle / 1e12,
            "share_of_roofline": floor / middle,
        }
    work = {"bytes": case.num_bytes, "flops": case.flops, "floor_ms": 1e3 * floor}
    return {**work, "implementations": found, "ratios": [ratio(times, name) for name in ready[1:]]}


def ratio(times: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Return how much faster than the reference an implementation is, over the same rounds."""
    found = ratio_interval(times["reference"], times[name])
    return {
        "rows": [name, "reference"],
        "ratio": found.value,
        "ci95": found.as_list(),
        "assumes_normal": found.assumes_normal,
        "verdict": verdict(found),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as text."""
    lines = [
        f"{'operation':<13}{'shape':<14}{'rows':>5} {'dtype':<5} {'':<10}{'ms':>10}{'GB/s':>9}{'TFLOP/s':>9}{'roof':>7}"
        "  over reference"
    ]
    for result in results:
        faster = {one["rows"][0]: one for one in result["ratios"]}
        for name, row in result["implementations"].items():
            start = f"{result['operation']:<13}{result['shape']:<14}{result['rows']:>5} {result['dtype']:<5} {name:<10}"
            if isinstance(row, str):
                lines.append(f"{start}{row}")
                continue
            lines.append(
                f"{start}{row['ms']:>10.3f}{row['gb_per_s']:>9.1f}{row['tflop_per_s']:>9.2f}"
                f"{row['share_of_roofline']:>7.0%}{_told(faster.get(name))}"
            )
    return "\n".join(lines)


def _told(faster: dict[str, Any] | None) -> str:
    if faster is None:
        return ""
    low, high = faster["ci95"]
    interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
    return f"  {faster['ratio']:.2f}x{interval}"


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure everything asked for; return the rows and the ceilings."""
    device = torch.device(args.device)
    shapes, sizes = SIZES["quick" if args.quick else args.device]
    clock, results, ceilings = Clock(device), [], dict[str, Any]()
    for dtype in args.dtypes:
        rate = peak_flops(args.device, DTYPES[dtype])
        ceilings[dtype] = {"gb_per_s": bandwidth(device) / 1e9, "tflop_per_s": rate / 1e12}
        for shape in shapes:
            depth, vocab = SHAPES[shape]
            for operation in args.operations:
                for rows in sizes[operation]:
                    case = case_of(operation, shape, rows, DTYPES[dtype], device, args.seed)
                    names = {"operation": operation, "shape": shape, "rows": rows, "hidden": depth, "vocab": vocab}
                    results.append(names | {"dtype": dtype, **measure(case, args, dtype, clock, ceilings[dtype])})
                    print(f"  {operation}, {shape}, {rows} rows, {dtype} done", file=sys.stderr, flush=True)
                    torch._dynamo.reset()
    return results, ceilings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status, 1 where an implementation strays from the reference."""
    args = arguments(argv)
    device, wish = torch.device(args.device), os.environ.get("DLLM_KERNELS")
    chosen = {name: dispatch.choices(device, DTYPES[name]) for name in args.dtypes}
    for name, lines in chosen.items():
        print("\n".join(f"{name}: {operation} runs {line}" for operation, line in lines.items()))
    try:
        results, ceilings = run(args)
    finally:
        os.environ.pop("DLLM_KERNELS", None)
        if wish is not None:
            os.environ["DLLM_KERNELS"] = wish
    record = _report.header("kernels", args.seed, {k: v for k, v in vars(args).items() if k not in ("out", "seed")})
    record |= {"definition": DEFINITION, "dispatch": chosen, "ceilings": ceilings}
    record |= {"cpu": _report.NOT_MEASURED, "gpu": _report.NOT_MEASURED, ("gpu", "cpu")[args.device == "cpu"]: results}
    print(table(results))
    out = args.out or _report.RESULTS / f"kernels-{'gpu' if args.device == 'cuda' else 'cpu'}.json"
    print(json.dumps({"written": str(_report.write(record, out))}))
    strays = [
        f"{r['operation']} {r['shape']} {r['rows']} rows {r['dtype']} {name}: {row['difference']:.1e}"
        for r in results
        for name, row in r["implementations"].items()
        if isinstance(row, dict) and row["difference"] > BOUND[r["dtype"]]
    ]
    print("\n".join(f"differs from the reference: {line}" for line in strays), end="\n" if strays else "")
    return int(bool(strays))


if __name__ == "__main__":
    sys.exit(main())
