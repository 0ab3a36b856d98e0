"""Peak memory of a masked cross-entropy with its gradients: chunked over rows against full logits.

    python benchmarks/loss_memory.py                                  # 4,096 tokens, 151,936 words, bf16
    python benchmarks/loss_memory.py --rows 1024 --vocab 49216 --hidden 576

Each loss runs in a process of its own: peak resident set (CPU) or peak allocation (GPU), less what the inputs take.
M rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import _report
from dllm_core.kernels.masked_ce import token_losses

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=[*DTYPES], default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/loss_memory-<device>.json")
    parser.add_argument("--only", choices=["chunked", "full"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def full(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """Return the mean cross-entropy of full logits, taken in fp32."""
    return F.cross_entropy(F.linear(hidden_MD, weight_VD).float(), targets_M)


def chunked(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """Return the same, chunk by chunk."""
    ce_M = torch.full((len(targets_M),), 1.0 / len(targets_M), device=hidden_MD.device)
    return token_losses(hidden_MD, weight_VD, targets_M, ce_M=ce_M).total


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Run one loss forward and backward in this process."""
    generator = torch.Generator().manual_seed(args.seed)
    dtype = DTYPES[args.dtype]
    hidden_MD = torch.randn(args.rows, args.hidden, generator=generator).to(args.device, dtype).requires_grad_()
    weight_VD = torch.empty(args.vocab, args.hidden, dtype=dtype)
    for rows_CD in weight_VD.split(4096):  # in pieces: drawing it in fp32 at once would be the peak
        rows_CD.copy_(torch.randn(rows_CD.shape, generator=generator) * 0.02)
    weight_VD = weight_VD.to(args.device).requires_grad_()
    targets_M = torch.randint(args.vocab, (args.rows,), generator=generator).to(args.device)
    before = _peak_bytes(args.device)
    started = time.perf_counter()
    loss = {"full": full, "chunked": chunked}[args.only](hidden_MD, weight_VD, targets_M)
    loss.backward()
    value = float(loss)
    assert hidden_MD.grad is not None
    return {
        "loss_nats": value,
        "grad_norm": float(hidden_MD.grad.float().norm()),
        "peak_gb": (_peak_bytes(args.device) - before) / 1e9,
        "inputs_gb": before / 1e9,
        "seconds": time.perf_counter() - started,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run both losses, each in its own process."""
    found: dict[str, Any] = {}
    names = ("rows", "vocab", "hidden", "dtype", "device", "seed")
    shared = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    for kind in ("chunked", "full"):
        command = [sys.executable, str(Path(__file__).resolve()), *shared, "--only", kind]
        done = subprocess.run(command, capture_output=True, text=True)
        failure = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        found[kind] = json.loads(done.stdout) if done.returncode == 0 else {"failed": failure}
    if all("peak_gb" in found[kind] for kind in found):
        found["full_over_chunked"] = found["full"]["peak_gb"] / found["chunked"]["peak_gb"]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    args = arguments(argv)
    if args.only:
        print(json.dumps(one(args)))
        return 0
    found = measure(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "only")}
    record = _report.header("loss_memory", args.seed, settings)
    record["cpu" if args.device == "cpu" else "gpu"] = found
    record.setdefault("cpu", _report.NOT_MEASURED)
    record.setdefault("gpu", _report.NOT_MEASURED)
    print(json.dumps(found, indent=1))
    print(json.dumps({"written": str(_report.write(record, args.out))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
