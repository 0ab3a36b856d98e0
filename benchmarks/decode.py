"""Decoding speed: our loop, the loops peers write, and the best AR loop with a cache, taking turns in one process.

    python benchmarks/decode.py                          # embedded SmolLM2, on the GPU where there is one
    python benchmarks/decode.py --estimate               # what it would do, and for how long
    python benchmarks/decode.py --steps 8 --parts sweep --rounds 14
    python benchmarks/decode.py --quality benchmarks/results/grid-laptop-nine-rows-2026-11-21.json
    python benchmarks/decode.py --product --steps 8,32 --batch-sizes 1,8 --caches none,prefix --time-limit 3600

Parts, each of rows that take turns on the same prompts and are compared by paired ratios:
    sweep         ours, a plain loop, an eager loop that reads masked rows only; by steps, batch size and canvas
    ar            ours at 8 steps, whole and in blocks behind an exact cache, and greedy decoding with a key-value cache
                  in every way at hand
    block_causal  the exact cache and no cache, the same steps in every block
    caches        the approximate caches, with their drift, against the same blocks without one
    rules         the acceptance rules
The first value of --steps, --batch-sizes and --canvases is the base point; the others replace it one at a time, which
is the default sweep, and --product times them all together, with every rule and cache. Fixed length, EOS ignored.
A model that was converted but not trained is as fast as a trained one; the record says which it was.
Needs torch, transformers, safetensors, pydantic and this library (and gguf for the embedded model).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import _report, decode_targets
from benchmarks.decode_models import Models, converted
from benchmarks.decode_parts import Costs, Decode, Part, Setting, ours_config, parts
from benchmarks.decode_record import NOT_MEASURED, Check, Drift, Measurement, Planned, Record
from benchmarks.schedule import integers
from dllm_core import hardware
from dllm_core.backbone import ar_decode
from dllm_core.backbone.contract import read_contract
from dllm_core.errors import DllmError, did_you_mean
from dllm_core.evals import throughput
from dllm_core.kernels.dispatch import announced
from dllm_core.methods.protocol import SamplingRequest
from dllm_core.samplers.blocks import split_blocks
from dllm_core.samplers.denoisers import model_block_size
from dllm_core.samplers.loop import generate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("sweep", "ar", "block_causal", "caches", "rules")
FP32_FACTOR = 3.0
"""How much slower than bf16 a pass in fp32 is taken to be, in the estimate."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""

    def words(text: str) -> list[str]:
        return text.split(",")

    def canvas(text: str) -> tuple[int, int]:
        prompt, new = text.split("+")
        return int(prompt), int(new)

    def canvases(text: str) -> list[tuple[int, int]]:
        return [canvas(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct", help="converted or plain model")
    parser.add_argument("--workdir", type=Path, default=_report.ROOT / "runs" / "benchmarks", help="for conversions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bf16")
    parser.add_argument("--parts", type=words, default=[*PARTS], help=f"default: {','.join(PARTS)}")
    parser.add_argument("--steps", type=integers, default=[8, 4, 16, 32, 64, 128])
    parser.add_argument("--batch-sizes", type=integers, default=[1, 4])
    parser.add_argument(
        "--canvases", type=canvases, default=[(32, 128), (64, 64), (128, 128)], help="PROMPT+NEW tokens"
    )
    parser.add_argument("--rules", type=words, default=["confidence", "entropy", "p2", "threshold=0.9"])
    parser.add_argument("--caches", type=words, default=["none", "prefix", "dual", "delayed"])
    parser.add_argument("--product", action="store_true", help="all of these together, not one at a time")
    parser.add_argument("--variant-steps", type=int, default=32, help="of the parts caches and rules")
    parser.add_argument("--block-size", type=int, default=32, help="of cached rows and of block_causal")
    parser.add_argument("--block-causal-canvas", type=canvas, default=(256, 256))
    parser.add_argument("--steps-per-block", type=int, default=4, help="of block_causal")
    parser.add_argument("--rounds", type=int, default=20, help="at most, of each part")
    parser.add_argument("--least-rounds", type=int, default=2, help="of parts without a target; those with one: 6")
    parser.add_argument("--warmup", type=int, default=1, help="short rounds before those")
    parser.add_argument("--part-limit", type=float, default=45.0, help="seconds that the rounds of a part aim for")
    parser.add_argument("--time-limit", type=float, default=780.0, help="seconds after which no part is begun")
    parser.add_argument("--estimate", action="store_true", help="print parts, rounds and seconds, and stop")
    parser.add_argument("--compile", action="store_true", help="also time compiled rows; on a GPU, ours uncompiled")
    parser.add_argument("--quiet", action="store_true", help="no line of progress for every round")
    parser.add_argument("--quality", type=Path, help="results of a grid, whose rows' quality is shown beside")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/decode-<device>.json")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse parts and a device that there are not, before anything is loaded.

    Raises:
        DllmError: naming one.
    """
    for name in args.parts:
        if name not in PARTS:
            raise DllmError(f"There is no part '{name}'.", did_you_mean(name, PARTS))
    hardware.device(args.device)


def fit_model(directory: Path, args: argparse.Namespace) -> None:
    """Take the block size of a block-causal model, and refuse parts that it cannot take.

    Raises:
        DllmError: parts of models in which every token sees the whole canvas.
    """
    contract = read_contract(directory)
    if contract.attention != "block_causal":
        return
    args.block_size = contract.block_size
    if set(args.parts) - {"block_causal"}:
        raise DllmError(
            f"'{directory.name}' is block-causal: its tokens do not see the whole canvas, as the plain loops have it.",
            "Give --parts block_causal, or a model with attention in both directions.",
        )


# -- time -------------------------------------------------------------------------------------------------------------


def calibrate(models: Models, args: argparse.Namespace) -> Costs:
    """Time a few of our passes and eight autoregressive ones: what the first estimates are made of."""
    prompt, new = args.canvases[0]
    blocks = split_blocks(range(prompt, prompt + new), None, model_block_size(models.backbone))
    short = Setting(prompt, new, args.batch_sizes[0], min(max(2, len(blocks)), new))
    prompts = models.prompts(0, short.batch, short.prompt)
    config = ours_config(short, args)
    for _ in range(2):
        ours = throughput.timed(lambda index: generate(models.backbone, prompts, config), 0).seconds / short.units
    request = SamplingRequest(max_new_tokens=8, num_steps=8)
    seconds = 0.0
    if "ar" in args.parts:
        seconds = throughput.timed(lambda index: ar_decode.decode(models.backbone, prompts, request), 0).seconds
    return Costs(ours=ours, ar=seconds / 8)


def plan_of(todo: Sequence[Part], costs: Costs, args: argparse.Namespace) -> list[Planned]:
    """Return rounds and seconds of every part, by what is known of its rows' costs."""
    found = []
    for part in todo:
        rounds, seconds = costs.rounds(part, args.rounds, args.part_limit)
        found.append(
            Planned(
                part=part.name, setting=str(part.setting), rounds=rounds, estimated_s=seconds + extra_s(part, costs)
            )
        )
    return found


def extra_s(part: Part, costs: Costs) -> float:
    """Return the seconds of what a part does besides its rounds: drift and the comparison in fp32."""
    drifting = sum(
        2 * part.setting.units for row in part.rows.values() if row.config and row.config.cache.is_approximate
    )
    checked = sum(FP32_FACTOR * row.units for row in part.rows.values()) if part.name == "block_causal" else 0.0
    return costs.seconds("ours", drifting + checked)


def print_plan(plan: Sequence[Planned], args: argparse.Namespace) -> None:
    """Tell what is to come, on stderr."""
    for part in plan:
        print(
            f"  {part.part:<13} {part.setting:<36} {part.rounds:>3} rounds {part.estimated_s:>6.0f} s", file=sys.stderr
        )
    total = sum(part.estimated_s for part in plan)
    limit = f"no part is begun after {args.time_limit:.0f} s"
    print(f"about {total:.0f} s ({total / 60:.0f} minutes) without loading; {limit}", file=sys.stderr, flush=True)


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(models: Models, part: Part, rounds: int, costs: Costs, args: argparse.Namespace) -> Measurement:
    """Time a part; what it was compared by is kept from the first round, so that nothing runs twice."""
    kept: dict[str, list[Tensor]] = {}

    def keeping(name: str, decode: Decode) -> Decode:
        def run(index: int) -> Any:
            output = decode(index)
            if index == 0:
                kept[name] = output.sequences
            return output

        return run

    compile_s = None
    if "ours_compiled" in part.rows:
        compile_s = throughput.timed(part.rows["ours_compiled"].decode, -1).seconds

    def tell(done: int, total: int) -> None:
        if not args.quiet:
            print(f"  {part.name}: round {done} of {total}", file=sys.stderr, flush=True)

    timings = throughput.interleave(
        {part.name: {name: keeping(name, row.decode) for name, row in part.rows.items()}},
        rounds={part.name: rounds},
        warmup_rounds=args.warmup,
        on_round=tell,
    )[part.name]
    rows = {name: throughput.summary(values) for name, values in timings.items()}
    for name, values in timings.items():
        costs.learn(name, part.rows[name].units, sum(t.seconds for t in values) / len(values))
    best = None
    if part.name == "ar":
        ar = [name for name in rows if name.startswith("ar")]
        best = max(ar, key=lambda name: rows[name]["tokens_per_s"]["median"])
    ratios = throughput.compare(timings, part.pairs)
    ratios += [{**r, "rows": [r["rows"][0], "ar_best"]} for r in ratios if best and r["rows"][1] == best]
    ours = {name: row.config for name, row in part.rows.items() if row.config}
    return Measurement(
        **place(part),
        rows=rows,  # type: ignore[arg-type]
        ratios=ratios,  # type: ignore[arg-type]
        configs={name: config.to_dict() for name, config in ours.items()},
        reference=part.reference,
        same_tokens={
            name: same(found, kept[part.reference], part.setting.new)
            for name, found in kept.items()
            if name != part.reference and (name.startswith("ar") or part.name != "ar")
        },
        ar_best=best,
        drift={n: drift(models, part, n) for n, config in ours.items() if config.cache.is_approximate},
        check=check(models, part) if part.name == "block_causal" else None,
        compile_s=compile_s,
    )


def place(part: Part) -> dict[str, Any]:
    """Return where a measurement stands."""
    setting = part.setting
    return {
        "part": part.name,
        "prompt_tokens": setting.prompt,
        "new_tokens": setting.new,
        "batch_size": setting.batch,
        "steps": setting.steps,
    }


def same(found: Sequence[Tensor], expected: Sequence[Tensor], new_tokens: int) -> float:
    """Return the share of new tokens that two rows have in common."""
    equal = sum(int((a[-new_tokens:] == b[-new_tokens:]).sum()) for a, b in zip(found, expected, strict=True))
    return equal / (new_tokens * len(found))


def drift(models: Models, part: Part, name: str) -> Drift:
    """Decode the first round's prompts once more with a full pass beside every cached one."""
    config = part.rows[name].config
    assert config is not None
    prompts = models.prompts(0, part.setting.batch, part.setting.prompt)
    found = generate(models.backbone, prompts, dataclasses.replace(config, measure_drift=True)).drift
    assert found is not None
    return Drift(**dataclasses.asdict(found))


def check(models: Models, part: Part) -> Check:
    """Decode the first round's prompts with both rows in fp32 and compare tokens, and the passes that placed them."""
    backbone = models.in_blocks_fp32()
    prompts = models.prompts(0, part.setting.batch, part.setting.prompt)
    outputs = []
    for row in part.rows.values():
        assert row.config is not None
        outputs.append(generate(backbone, prompts, dataclasses.replace(row.config, record_history=True)))
    first, second = outputs
    assert first.commit_step is not None
    assert second.commit_step is not None
    tokens = same(first.sequences, second.sequences, part.setting.new)
    passes = same(first.commit_step, second.commit_step, part.setting.new)
    (rows,) = part.pairs
    return Check(rows=rows, same_tokens=tokens, same_passes=passes, passed=tokens == passes == 1.0)


def measure_all(
    models: Models, todo: Sequence[Part], args: argparse.Namespace, deadline: float
) -> tuple[list[Measurement], list[Planned]]:
    """Measure every part that begins before the deadline; estimates get better with what was timed."""
    costs = calibrate(models, args)
    plan = plan_of(todo, costs, args)
    print_plan(plan, args)
    found: list[Measurement] = []
    if args.estimate:
        return found, plan
    for part, planned in zip(todo, plan, strict=True):
        if time.monotonic() > deadline:
            found.append(Measurement(**place(part), not_measured=f"{NOT_MEASURED}: no time left"))
            continue
        begun = time.monotonic()
        planned.rounds, _ = costs.rounds(part, args.rounds, args.part_limit)
        print(f"{part.name}, {part.setting}: {planned.rounds} rounds", file=sys.stderr, flush=True)
        try:
            found.append(measure(models, part, planned.rounds, costs, args))
            planned.measured_s = time.monotonic() - begun
        except torch.OutOfMemoryError:
            found.append(Measurement(**place(part), not_measured=f"{NOT_MEASURED}: out of memory"))
    return found, plan


# -- results ----------------------------------------------------------------------------------------------------------


def table(found: Sequence[Measurement]) -> str:
    """Return the measurements as text."""
    lines = []
    for m in found:
        lines.append(f"{m.part}: {m.prompt_tokens}+{m.new_tokens} tokens, batch {m.batch_size}, {m.steps} steps")
        if m.not_measured:
            lines.append(f"  {m.not_measured}")
        for name, row in m.rows.items():
            told = [
                f"{r.rows[0]} {r.ratio:.2f}x {r.rows[1]}{decode_targets.interval(r.ci95)}"
                for r in m.ratios
                if name == r.rows[int(m.part == "ar")]
            ]
            if name in m.drift:
                d = m.drift[name]
                told.append(f"drift {d.max_logit_difference:.2g}, {d.changed_tokens} of {d.num_tokens} drafts changed")
            if name == m.ar_best:
                told.append("the best AR loop")
            speed = row.tokens_per_s.median
            lines.append(f"  {name:<20} {speed:>9.1f} tok/s {row.num_forwards:>4} passes  {'; '.join(told)}".rstrip())
        if m.check:
            verdict = "the same" if m.check.passed else f"{100 * m.check.same_tokens:.1f} % the same"
            lines.append(f"  tokens of {' and '.join(m.check.rows)} in fp32: {verdict}")
    return "\n".join(lines)


def record_of(found: list[Measurement], plan: list[Planned], args: argparse.Namespace, *, untrained: bool) -> Record:
    """Return the record, checked."""
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("workdir", "out", "quiet")
    }
    settings["model"] = args.model if not Path(args.model).is_dir() else Path(args.model).name
    settings["quality"] = args.quality and args.quality.name
    on_gpu = args.device != "cpu"
    return Record(
        **_report.header("decode", args.seed, settings),
        weights="converted, untrained: speed only" if untrained else "as given",
        implementations=list(announced()),
        cpu=NOT_MEASURED if on_gpu else found,  # type: ignore[arg-type]
        gpu=found if on_gpu else NOT_MEASURED,  # type: ignore[arg-type]
        targets=decode_targets.judge(found, on_gpu=on_gpu),
        quality=decode_targets.quality_of(args.quality) if args.quality else NOT_MEASURED,  # type: ignore[arg-type]
        plan=plan,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 0, 1 where exact is not exact, 2 for what cannot be run."""
    begun = time.monotonic()
    args = arguments(argv)
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        check_arguments(args)
        if args.quality:
            decode_targets.quality_of(args.quality)
        directory, untrained = converted(args.model, args.workdir, args.seed)
        fit_model(directory, args)
        models = Models(directory, DTYPES[args.dtype], args.device, args.seed, args.block_size)
        found, plan = measure_all(models, parts(models, args), args, begun + args.time_limit)
        if args.estimate:
            return 0
        record = record_of(found, plan, args, untrained=untrained)
    except DllmError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(found))
    print("\n".join(record.implementations))
    print(decode_targets.table(record.targets))
    print(decode_targets.quality_table(record.quality))
    print(json.dumps({"written": str(_report.write(record.model_dump(mode="json"), args.out))}))
    return int(any(m.check is not None and not m.check.passed for m in found))


if __name__ == "__main__":
    sys.exit(main())
