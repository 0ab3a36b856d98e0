"""Decoding speed: our loop, the plain transformers loop and AR greedy with a cache, taking turns in one process.

    python benchmarks/decode.py                          # embedded SmolLM2, 8 and 32 steps
    python benchmarks/decode.py --steps 4,8,16,32,64,128 --batch-sizes 1,4 --compile
    python benchmarks/decode.py --model DIR --dtype fp32 --rounds 16

Every round times all rows of a step count on the same prompts; rows are compared by paired ratios. Fixed length, EOS
ignored. A model that was converted but not trained is as fast as a trained one; the record says which it was.
Needs torch, transformers, safetensors, pydantic and this library (and gguf for the embedded model).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import _report, plain_loop
from dllm_core.backbone import ar_decode, conversion, sources
from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.noise import NoiseSource
from dllm_core.errors import DllmError
from dllm_core.evals import throughput
from dllm_core.methods.protocol import GenerationOutput, SamplingRequest
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.loop import generate

Decode = Callable[[int], GenerationOutput]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAIRS = (("ours", "plain"), ("ours_compiled", "plain"), ("ours_compiled", "ours"), ("ours", "ar"))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""

    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct", help="converted or plain model")
    parser.add_argument("--workdir", type=Path, default=_report.ROOT / "runs" / "benchmarks", help="for conversions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bf16")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--steps", type=integers, default=[8, 32])
    parser.add_argument("--batch-sizes", type=integers, default=[1])
    parser.add_argument("--rule", default="confidence", help="acceptance rule of our loop")
    parser.add_argument("--rounds", type=int, default=16, help="for the shortest decode; longer ones get fewer, >= 6")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also time a torch.compile'd backbone")
    parser.add_argument("--no-ar", action="store_true", help="leave out the AR row")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/decode-<device>.json")
    return parser.parse_args(argv)


def converted(source: str, workdir: Path, seed: int) -> tuple[Path, bool]:
    """Return a converted directory for a source, and whether it had to be converted here (hence is untrained)."""
    path = Path(source)
    if path.is_dir() and "dllm" in sources.read_config(path):
        return path, False
    location = sources.resolve(source)
    name = "-".join(part for part in source.replace(":", "/").split("/") if part not in ("", ".", ".."))
    target = workdir / name
    if not (target / "config.json").exists():
        plain = location.path
        if location.kind == "gguf":
            from dllm_core.backbone.gguf import convert_gguf

            plain = workdir / f"{name}-plain"
            convert_gguf(location.path, plain, location.sha256)
        conversion.convert(plain, target, alignment="shifted", seed=seed)
    return target, True


class Bench:
    """The models under test and the prompts they share.

    Args:
        args: of the command line.
        directory: a converted checkpoint.
    """

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args = args
        dtype, device = DTYPES[args.dtype], args.device
        self.backbone = Backbone.from_pretrained(directory, dtype=dtype, device=device)
        self.plain = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype).to(device).eval()
        self.compiled = Backbone.from_pretrained(directory, dtype=dtype, device=device) if args.compile else None
        if self.compiled is not None:
            self.compiled.decoder.compile(dynamic=False)

    def prompts(self, index: int, batch: int) -> list[Tensor]:
        """Return the prompts of a round: random real tokens, since speed does not depend on them."""
        rows, high = range(index * batch, (index + 1) * batch), self.backbone.contract.num_tokens
        noise, length = NoiseSource(self.args.seed), self.args.prompt_tokens
        draws = [noise.generator(row, 0, "benchmark prompt") for row in rows]
        return [torch.randint(high, (length,), generator=g) for g in draws]

    def rows(self, steps: int, batch: int) -> dict[str, Decode]:
        """Return what to time at one number of steps."""
        args, contract = self.args, self.backbone.contract
        config = DiffusionGenerationConfig(
            max_new_tokens=args.new_tokens,
            max_denoising_steps=steps,
            sampler_config=args.rule,
            stop_at_eos=False,
            seed=args.seed,
        )
        request = SamplingRequest(max_new_tokens=args.new_tokens, num_steps=steps)

        def plain(index: int) -> GenerationOutput:
            return plain_loop.generate(
                self.plain,
                self.prompts(index, batch),
                max_new_tokens=args.new_tokens,
                steps=steps,
                mask_token_id=contract.mask_token_id,
                num_tokens=contract.num_tokens,
                shifted=contract.alignment == "shifted",
            )

        found: dict[str, Decode] = {"ours": lambda i: generate(self.backbone, self.prompts(i, batch), config)}
        compiled = self.compiled
        if compiled is not None:
            found["ours_compiled"] = lambda i: generate(compiled, self.prompts(i, batch), config)
        found["plain"] = plain
        if not args.no_ar:
            found["ar"] = lambda i: ar_decode.decode(self.backbone, self.prompts(i, batch), request)
        return found


def agreement(rows: dict[str, Decode], new_tokens: int) -> dict[str, float]:
    """Return the share of new tokens in which our loop and the plain one agree, for one prompt each."""
    outputs = {name: decode(0).sequences for name, decode in rows.items() if name != "ar"}
    return {
        name: float(
            sum(int((a[-new_tokens:] == b[-new_tokens:]).sum()) for a, b in zip(found, outputs["plain"], strict=True))
            / (new_tokens * len(found))
        )
        for name, found in outputs.items()
        if name != "plain"
    }


def measure(bench: Bench, batch: int) -> list[dict[str, Any]]:
    """Time every number of steps at one batch size."""
    args = bench.args
    groups = {str(steps): bench.rows(steps, batch) for steps in args.steps}
    compile_s = None
    if bench.compiled is not None:
        start = time.perf_counter()
        groups[str(args.steps[0])]["ours_compiled"](0)
        compile_s = time.perf_counter() - start
    timings = throughput.interleave(
        groups,
        rounds=throughput.rounds_for({str(s): float(s) for s in args.steps}, args.rounds),
        warmup_rounds=args.warmup,
        on_round=lambda done, total: print(f"  batch {batch}: round {done} of {total}", file=sys.stderr, flush=True),
    )
    found = []
    for steps in args.steps:
        rows = timings[str(steps)]
        pairs = [pair for pair in PAIRS if pair[0] in rows and pair[1] in rows]
        found.append(
            {
                "batch_size": batch,
                "steps": steps,
                "rows": {name: throughput.summary(values) for name, values in rows.items()},
                "ratios": throughput.compare(rows, pairs) if args.rounds > 0 else [],
                "same_tokens_as_plain": agreement(groups[str(steps)], args.new_tokens),
                "compile_s": compile_s,
            }
        )
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as text."""
    lines = [f"{'batch':>5} {'steps':>5} {'row':<14} {'tok/s':>8}  paired ratio (95 %)"]
    for result in results:
        ratios = {r["rows"][0]: r for r in result["ratios"] if r["rows"][1] == "plain"}
        for name, row in result["rows"].items():
            line = f"{result['batch_size']:>5} {result['steps']:>5} {name:<14} {row['tokens_per_s']['median']:>8.1f}"
            if name in ratios:
                low, high = ratios[name]["ci95"]
                interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
                line += f"  {ratios[name]['ratio']:.2f}x plain{interval}"
            lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    args = arguments(argv)
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        directory, untrained = converted(args.model, args.workdir, args.seed)
        bench = Bench(args, directory)
        results = [row for batch in args.batch_sizes for row in measure(bench, batch)]
    except DllmError as error:
        print(error, file=sys.stderr)
        return 2
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("workdir", "out")}
    settings["model"] = args.model if not Path(args.model).is_dir() else Path(args.model).name
    record = _report.header("decode", args.seed, settings)
    record["weights"] = "converted, untrained: speed only" if untrained else "as given"
    record["cpu" if args.device == "cpu" else "gpu"] = results
    record.setdefault("cpu", _report.NOT_MEASURED)
    record.setdefault("gpu", _report.NOT_MEASURED)
    print(table(results))
    print(json.dumps({"written": str(_report.write(record, args.out))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
