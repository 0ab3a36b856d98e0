"""Everything that needs a GPU, in one command: kernels, latent generation, decoding, training, a real conversion.

    python benchmarks/gpu/run_all.py                                # every part, into benchmarks/results/
    python benchmarks/gpu/run_all.py --parts decode,ldlm --profile  # two of them, with profiles of what misses
    python benchmarks/gpu/run_all.py --smoke                        # tiny shapes on a CPU: does it run?

Every part runs in a process of its own, which gives its memory back and is ended when its time is over. A row is on
disk as soon as it is measured, in `cuda-<part>.json` of the output directory; the same command again measures what is
missing. Rows count as measured while source, hardware, versions and settings are the same; a record of others is set
aside. `--time-limit` is for a machine that is lent for a while: parts that would not fit are left for the next time.
Needs torch, transformers, safetensors, triton and this library, and pydantic but for `kernels`.
The tests that need a GPU are no part of it: `make test-gpu` is to pass first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import _report
from benchmarks.gpu import parts, targets
from benchmarks.gpu.parts import Context, Rows

HERE = Path(__file__).resolve().parent
# run as a script, this folder is searched too: its modules must not pass for others of the same name
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]

PARTS = tuple(targets.TARGETS)
PART_LIMIT_S, GRACE_S = 450.0, 25.0
"""A part begins no row that would end after the first; it is ended that much later, within eight minutes."""
SMOKE_LIMIT_S = 240.0
LEAST_S = 60.0
"""A part is not begun with less."""
NO_GPU = (
    "No usable NVIDIA GPU: torch.cuda.is_available() is false, and these numbers are of a GPU.",
    "Run it on a machine with one (CUDA build of torch), or with --smoke, which runs every part at tiny shapes.",
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""

    def names(text: str) -> list[str]:
        found = [word for word in text.split(",") if word]
        unknown = [name for name in found if name not in PARTS]
        if unknown or not found:
            raise argparse.ArgumentTypeError(f"no such parts: {unknown}; known: {', '.join(PARTS)}")
        return found

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=names, default=[*PARTS], help=f"default: {','.join(PARTS)}")
    parser.add_argument(
        "--out", type=Path, help="directory; default: benchmarks/results, in a smoke run runs/gpu-smoke"
    )
    parser.add_argument("--work", type=Path, help="directory for checkpoints; default: runs/gpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU: a test, no measurement")
    parser.add_argument("--part-limit", type=float, help=f"seconds of a part; default: {PART_LIMIT_S:.0f}")
    parser.add_argument("--time-limit", type=float, help="seconds of all parts together; default: none")
    parser.add_argument("--profile", action="store_true", help="also profile the rows that miss a target")
    parser.add_argument("--commit", help="of the code, where it is run from a copy without its repository")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out = args.out or (_report.ROOT / "runs" / "gpu-smoke" if args.smoke else _report.RESULTS)
    args.work = args.work or _report.ROOT / "runs" / "gpu"
    args.part_limit = args.part_limit or (SMOKE_LIMIT_S if args.smoke else PART_LIMIT_S)
    return args


def record_path(args: argparse.Namespace, part: str) -> Path:
    """Return where a part's record is."""
    out: Path = args.out
    return out / f"{'smoke' if args.smoke else 'cuda'}-{part}.json"


def rows_of(args: argparse.Namespace, part: str) -> Rows:
    """Return the record of a part as it stands on disk, under the head of this run."""
    settings = {"smoke": args.smoke, "part_limit_s": args.part_limit}
    head = _report.header("gpu/run_all", args.seed, settings)
    head["part"] = part
    smoke = " --smoke" if args.smoke else ""
    head["command"] = f"python benchmarks/gpu/run_all.py --parts {part} --seed {args.seed}{smoke}"
    if args.commit:
        head["commit"], head["dirty"] = args.commit, None
    machine = {name: head["hardware"].get(name) for name in ("cpu", "gpu", "driver")}
    identity = {
        "source": parts.source_digest(),
        "hardware": machine,
        "versions": head["versions"],
        "seed": args.seed,
        "smoke": args.smoke,
    }
    return Rows(record_path(args, part), head, identity)


# -- one part, in its own process -------------------------------------------------------------------------------------


def work(args: argparse.Namespace, part: str, begun: float) -> int:
    """Run a part in this process; return the exit status."""
    watch(os.getppid(), begun + args.part_limit + GRACE_S)
    torch.manual_seed(args.seed)
    rows = rows_of(args, part)
    context = Context(
        name=part,
        device=torch.device("cpu" if args.smoke else "cuda"),
        smoke=args.smoke,
        seed=args.seed,
        profile=args.profile,
        rows=rows,
        work=args.work / part,
        deadline=begun + args.part_limit,
    )
    context.work.mkdir(parents=True, exist_ok=True)
    rows.whole = {"status": "running"}
    rows.write()
    try:
        module: Any = import_module(f"benchmarks.gpu.{part}")
    except ModuleNotFoundError as error:
        rows.whole = {"obstacle": f"{_report.NOT_MEASURED}: {error}"}
        rows.write()
        return 1
    rows.whole |= module.run(context)
    rows.whole["status"] = "finished"
    rows.write()
    return 0


def watch(parent: int, ends: float) -> None:
    """End this process when its parent is gone or its time is over: it must not hold the device for nobody."""

    def look() -> None:
        while os.getppid() == parent and time.monotonic() < ends:
            time.sleep(0.5)
        if os.getpgrp() == os.getpid():  # with all it started: compilers, measurements in processes of their own
            os.killpg(0, signal.SIGKILL)
        os._exit(124)

    threading.Thread(target=look, daemon=True, name="watch").start()


# -- all parts --------------------------------------------------------------------------------------------------------


def worker_command(args: argparse.Namespace, part: str, limit_s: float) -> list[str]:
    """Return the command that runs a part."""
    words = ["--worker", part, "--out", str(args.out), "--work", str(args.work), "--seed", str(args.seed)]
    words += ["--part-limit", str(limit_s), *(["--commit", args.commit] if args.commit else [])]
    words += [f"--{name}" for name in ("smoke", "profile") if getattr(args, name)]
    return [sys.executable, str(Path(__file__).resolve()), *words]


def start(args: argparse.Namespace, part: str, limit_s: float) -> str:
    """Run a part in a process of its own and return how it ended; it is killed with all it started when time is up."""
    process = subprocess.Popen(worker_command(args, part, limit_s), start_new_session=True)
    try:
        status = process.wait(timeout=limit_s + GRACE_S)
    except subprocess.TimeoutExpired:
        return f"ended after {limit_s + GRACE_S:.0f} s: it did not end by itself"
    finally:
        _kill(process)
    return "finished" if status == 0 else f"failed with exit status {status}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: compilers, measurements in processes of their own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=3.0)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def close(args: argparse.Namespace, part: str, ended: str) -> list[dict[str, Any]]:
    """Write how a part ended and what became of its targets into its record; return the latter."""
    path = record_path(args, part)
    record = parts.read(path)
    ended = record.pop("obstacle", ended)
    judged = [targets.judge(t, record.get("rows", {}), smoke=args.smoke) for t in targets.TARGETS[part]]
    judged += record.get("judged_by_part", [])
    for told in judged:
        if told["measured"] is None and not told.get("why") and ended != "finished":
            told["why"] = ended
    if record:
        _report.write({**record, "status": ended, "targets": judged}, path)
    return judged


def run_parts(args: argparse.Namespace) -> int:
    """Run the parts one after the other; return 0 where all ended by themselves."""
    begun, told, endings = time.monotonic(), list[tuple[str, dict[str, Any]]](), dict[str, str]()
    for part in args.parts:
        limit_s = args.part_limit
        if args.time_limit is not None:
            limit_s = min(limit_s, begun + args.time_limit - time.monotonic() - GRACE_S)
        print(f"{part}: at most {limit_s:.0f} s", file=sys.stderr, flush=True)
        short = limit_s < min(LEAST_S, args.part_limit)
        endings[part] = "not begun: no time left" if short else start(args, part, limit_s)
        told += [(part, result) for result in close(args, part, endings[part])]
    print(json.dumps({"written": [record_path(args, part).name for part in endings]}))
    print(summary(args, endings))
    print(targets.table(told))
    return int(any(ending != "finished" for ending in endings.values()))


def summary(args: argparse.Namespace, endings: dict[str, str]) -> str:
    """Return how the parts ended, and how many rows each has."""
    lines = []
    for part, ending in endings.items():
        path = record_path(args, part)
        record = parts.read(path)
        rows, ending = record.get("rows", {}), record.get("status", ending)
        missing = {name: row["not_measured"] for name, row in rows.items() if "found" not in row}
        lines.append(f"{part}: {ending}; {len(rows) - len(missing)} of {len(rows)} rows measured, in {path.name}")
        lines += [f"  {name}: {why}" for name, why in missing.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; return the exit status: 0, 1 where a part did not end by itself, 2 without a GPU."""
    begun = time.monotonic()
    args = arguments(argv)
    if not args.smoke and not torch.cuda.is_available():
        print("\n".join(NO_GPU), file=sys.stderr)
        return 2
    if args.worker:
        return work(args, args.worker, begun)
    try:
        return run_parts(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
