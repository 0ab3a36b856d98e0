"""What helps the latent diffusion cell at the laptop budget: one setting changed at a time, each a small grid run.

    python benchmarks/ldlm_ablations.py                              # every variant, about 3 minutes each on two cores
    python benchmarks/ldlm_ablations.py --variants base,open_gate --runs-dir runs/ablations
    python benchmarks/ldlm_ablations.py --threads 1

Every variant is `flows/compare_grid.py run --preset laptop --cells ldlm` with the settings below; model, data and the
frozen model's states are computed once and shared through the step cache. Needs the whole grid (`make install`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import _report

OPTIONS = "cells.ldlm.options."
VARIANTS: dict[str, dict[str, str]] = {
    "base": {},
    "open_gate": {"gate_ceiling": "1.0"},
    "gate_0.1": {"gate_ceiling": "0.1"},
    "random_start": {"start": "random"},
    "free_scale": {"normalise": "none"},
    "d5": {"schedule_d": "5.0"},
    "d7": {"schedule_d": "7.0"},
    "half_decoder_noise": {"decoder_noise": "0.866"},
    "double_decoder_noise": {"decoder_noise": "3.464"},
    "no_self_conditioning": {"self_condition": "0.0"},
    "uniform_times": {"adaptive_times": "false"},
    "all_tokens": {"token_fraction": "1.0"},
    "consistency": {"consistency": "1.0"},
}
"""Name -> options of the cell that differ from params/cells/ldlm.yaml and the preset."""
MEASURING = "bench.rounds=2,bench.steps=8,bench.warmup_rounds=0,eval.nelbo_sequences=16,eval.frontier_samples=8"
FIGURES = ("judge_ppl", "shuffled_judge_ppl", "unigram_entropy_nats", "repetition_4", "overlap_1", "overlap_1_other")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, comma-separated")
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--set", default="", help="settings for all variants, as for the grid")
    parser.add_argument("--runs-dir", type=Path, default=_report.ROOT / "runs")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ldlm_ablations-cpu.json")
    return parser.parse_args(argv)


def settings(options: dict[str, str], args: argparse.Namespace) -> str:
    """Return what `--set` gets for a variant."""
    parts = [MEASURING, *(f"{OPTIONS}{name}={value}" for name, value in options.items())]
    if args.threads:
        parts.append(f"runtime.threads={args.threads}")
    return ",".join([*parts, *([args.set] if args.set else [])])


def run_variant(options: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """Run the grid once and return the figures of its row."""
    command = [sys.executable, str(_report.ROOT / "flows" / "compare_grid.py"), "run", "--preset", args.preset]
    command += ["--cells", "ldlm", "--seeds", str(args.seed), "--runs-dir", str(args.runs_dir)]
    command += ["--set", settings(options, args)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stdout.strip().splitlines()[-3:] + done.stderr.strip().splitlines()[-3:]}
    results = json.loads((args.runs_dir / "reports" / "latest" / "results.json").read_text())
    row = results["cells"][0]
    health = {k: v for k, v in row["eval"]["diagnostics"].items() if not isinstance(v, list)}
    return {
        "run_id": results["run_id"],
        "steps": row["train"]["steps"],
        "response_tokens": row["cost"]["response_tokens"],
        "train_s": row["cost"]["train_s"],
        "health": health,
        "text": [
            {"temperature": p["temperature"], **{k: p[k] for k in FIGURES if k in p}} for p in row["eval"]["frontier"]
        ],
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the main figures as text."""
    lines = [
        f"{'variant':<22} {'true':>6} {'recon':>6} {'noisy':>6} {'mse.5':>6} {'rank':>6} {'entropy':>8} {'judge':>9}"
    ]
    for name, row in found.items():
        if "error" in row:
            lines.append(f"{name:<22} failed: {row['error'][-1] if row['error'] else ''}")
            continue
        health, text = row["health"], row["text"][-1]
        lines.append(
            f"{name:<22} {health['decode_accuracy_true_states']:>7.3f} {health['reconstruction_accuracy']:>7.3f} "
            f"{health['reconstruction_accuracy_noisy']:>7.3f} {health['diffusion_mse_relative']['0.5']:>7.3f} "
            f"{health['latent_effective_rank']:>7.1f} {text['unigram_entropy_nats']:>7.2f} {text['judge_ppl']:>9.0f} "
            f"{text['shuffled_judge_ppl']:>9.0f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the variants; return the exit status. The file is written after each, so that a stop loses nothing."""
    args = arguments(argv)
    names = args.variants.split(",")
    if unknown := [n for n in names if n not in VARIANTS]:
        print(f"Unknown variant {unknown[0]!r}.\nKnown: {', '.join(VARIANTS)}.", file=sys.stderr)
        return 2
    told = {"preset": args.preset, "set": args.set, "threads": args.threads, "measuring": MEASURING}
    record = _report.header("ldlm_ablations", args.seed, {**told, "device": "cpu"})
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        print(f"  {name} ...", file=sys.stderr, flush=True)
        found[name] = {"options": VARIANTS[name], **run_variant(VARIANTS[name], args)}
        record["variants"] = found
        written = _report.write(record, args.out)
    print(table(found))
    print(json.dumps({"written": str(written)}))
    return int(any("error" in row for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
