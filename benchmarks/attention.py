"""Attention on the CPU: transformers' `sdpa` against plain products and a softmax, forward and backward, in turns.

    python benchmarks/attention.py                                   # lengths 64 to 1024, bf16 and fp32, 2 threads
    python benchmarks/attention.py --lengths 160 --rounds 24

This decides up to which length and in which dtype plain products are used (`dllm_core.layers.attention`). Both get the
same inputs of SmolLM2's shape, with grouped keys and values, no mask and no causality, as a bidirectional row has them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import _report
from dllm_core.backbone import attention
from dllm_core.evals import throughput
from dllm_core.methods.protocol import GenerationOutput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS: dict[str, Callable[..., tuple[Tensor, Any]]] = {
    "sdpa": sdpa_attention_forward,
    "plain": attention.plain_attention,
}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 160, 256, 512, 1024])
    parser.add_argument("--dtypes", choices=[*DTYPES], nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch: shorter sequences come in larger batches")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/attention-cpu.json")
    return parser.parse_args(argv)


def one(args: argparse.Namespace, length: int, dtype: str) -> dict[str, Any]:
    """Time both kinds at one length and dtype."""
    generator = torch.Generator().manual_seed(args.seed)
    batch = max(1, args.tokens // length)
    heads = (args.heads, args.kv_heads, args.kv_heads)
    inputs = [
        torch.randn(batch, h, length, args.head_dim, generator=generator).to(DTYPES[dtype]).requires_grad_()
        for h in heads
    ]
    upstream_BLHD = torch.randn(batch, length, args.heads, args.head_dim, generator=generator).to(DTYPES[dtype])
    module = SimpleNamespace(num_key_value_groups=args.heads // args.kv_heads, is_causal=False)

    def row(kind: str, backward: bool) -> Callable[[int], GenerationOutput]:
        def run(index: int) -> GenerationOutput:
            with torch.set_grad_enabled(backward):
                out_BLHD, _ = KINDS[kind](module, *inputs, None, is_causal=False)
            if backward:
                torch.autograd.grad(out_BLHD, inputs, upstream_BLHD)
            return GenerationOutput([], [batch * length], 1, 0.0)

        return run

    passes = {"forward": False, "forward_backward": True}
    timings = throughput.interleave(
        {name: {kind: row(kind, backward) for kind in KINDS} for name, backward in passes.items()},
        rounds=dict.fromkeys(passes, args.rounds),
        warmup_rounds=args.warmup,
    )
    found: dict[str, Any] = {"length": length, "batch": batch, "dtype": dtype}
    for name, rows in timings.items():
        found[name] = {
            "ms": {kind: median([1e3 * t.seconds for t in values]) for kind, values in rows.items()},
            **throughput.compare(rows, [("plain", "sdpa")])[0],
        }
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the results as text."""
    lines = [f"{'dtype':<6} {'length':>6} {'pass':<17} {'sdpa ms':>9} {'plain ms':>9}  plain over sdpa"]
    for case in found:
        for name in ("forward", "forward_backward"):
            result = case[name]
            low, high = result["ci95"]
            interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
            lines.append(
                f"{case['dtype']:<6} {case['length']:>6} {name:<17} {result['ms']['sdpa']:>9.2f} "
                f"{result['ms']['plain']:>9.2f}  {result['ratio']:.2f}x{interval}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    found = []
    for dtype in args.dtypes:
        for length in args.lengths:
            found.append(one(args, length, dtype))
            print(f"  {dtype}, {length} tokens done", file=sys.stderr, flush=True)
    record = _report.header("attention", args.seed, {k: v for k, v in vars(args).items() if k != "out"})
    record |= {"cpu": found, "gpu": _report.NOT_MEASURED}
    print(table(found))
    default = _report.RESULTS / "attention-cpu.json"  # the CPU's, also on a machine that has a GPU
    print(json.dumps({"written": str(_report.write(record, args.out or default))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
