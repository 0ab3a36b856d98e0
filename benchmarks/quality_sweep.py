"""Quality beside speed of finished cells: text and filled gaps at several numbers of steps, accuracy under parallelism.

    python benchmarks/quality_sweep.py runs/reports/latest/cells/random_mask --base
    python benchmarks/quality_sweep.py CELL_DIR CELL_DIR --steps 4,8,16 --samples 4 --sequences 4 --threads 1
    python benchmarks/quality_sweep.py CELL_DIR --speeds runs/reports/latest/results.json --no-parallelism
    python benchmarks/quality_sweep.py --page                 # measure nothing: write the page on what is stored

Model, held-out text and judge are those of the preset (`--preset`, `--set`), through its step cache: name the one that
the cells were trained with. Writes JSON with the usual header, and two PNGs: beside it, or in docs/figures where it
goes to benchmarks/results. Tokens a second in brackets are those of this evaluation; `--speeds` takes the benchmark's
from a report. Needs the whole grid (`make install`).
`--page` puts tables and pictures of `benchmarks/results/quality_sweep-cpu.json` (or `--out`) into docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import _report

if TYPE_CHECKING:
    from dllm_core.methods.protocol import Method
    from params.schema import GridSpec
    from steps.prepare_model import ModelArtifact
    from steps.report.schema import Results

PAGE = _report.ROOT / "docs" / "quality.md"
BASE = "ar"
"""Row of the unconverted model."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""

    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", type=Path, help="directories of finished cells")
    parser.add_argument("--base", action="store_true", help="measure the unconverted model too")
    parser.add_argument("--preset", default="laptop", help="whose model, text and judge")
    parser.add_argument("--set", default="", help="settings, as for the grid; eval.parallelism.* and more")
    parser.add_argument("--runs-dir", type=Path, default=_report.ROOT / "runs")
    parser.add_argument("--steps", type=integers, default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=8, help="continuations at each number of steps")
    parser.add_argument("--infill-sequences", type=int, default=16, help="texts of which a stretch is filled in")
    parser.add_argument("--sequences", type=int, default=8, help="texts of each point of the curves")
    parser.add_argument("--no-parallelism", action="store_true", help="leave out the curves")
    parser.add_argument("--speeds", type=Path, help="results.json of a report, for the benchmark's tokens a second")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/quality_sweep-<device>.json")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page on what is stored")
    args = parser.parse_args(argv)
    if not (args.cells or args.base or args.page):
        parser.error("name the directories of finished cells, or give --base or --page")
    return args


def overrides(args: argparse.Namespace) -> str:
    """Return the settings that the command line stands for; those of `--set` come last and win."""
    chosen = {
        "eval.step_sweep.steps": args.steps,
        "eval.step_sweep.temperatures": [args.temperature],
        "eval.step_sweep.samples": args.samples,
        "eval.step_sweep.infill_sequences": args.infill_sequences,
        "eval.frontier_samples": args.samples,
        "runtime.threads": "null" if args.threads is None else args.threads,
    }
    if not args.no_parallelism:
        chosen["eval.parallelism.sequences"] = args.sequences
    return ",".join([*(f"{key}={value}" for key, value in chosen.items()), *filter(None, [args.set])])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every cell; return name -> what it is and what was found, and what they share."""
    import params
    from dllm_core.data.sequences import SequenceSet
    from steps import sweep_cell
    from steps.context import Context
    from steps.evaluate_cell import reference_text
    from steps.machine import probe
    from steps.prepare_data import prepare_data
    from steps.prepare_model import prepare_model
    from steps.report.curve_areas import best_accuracies, concluded

    spec = params.load(args.preset, cells=BASE, overrides=overrides(args))
    ctx = Context(runs_dir=args.runs_dir.absolute(), threads=spec.runtime.threads)
    machine = probe(spec.runtime.device, spec.runtime.threads)
    dtype, device = machine.dtype(spec.eval.dtype), machine.device
    model = prepare_model(spec.model, ctx, spec.data)
    data = prepare_data(spec, model, ctx)
    heldout = SequenceSet.load(Path(data.heldout_dir))
    found: dict[str, Any] = {}
    for directory in [*([None] if args.base else []), *args.cells]:
        told, method = _loaded(directory, spec, model, args.preset, dtype, device)
        name = next(n for i in range(len(args.cells) + 1) if (n := told["cell"] + f" {i + 1}" * (i > 0)) not in found)
        print(f"{name} ...", file=sys.stderr, flush=True)
        measuring, started = (spec, method, model, heldout, dtype, device), time.perf_counter()
        curves = None if args.no_parallelism else sweep_cell.parallel_accuracy(*measuring)
        found[name] = {**told, "step_sweep": sweep_cell.step_quality(*measuring), "parallelism": curves}
        found[name]["wall_s"] = time.perf_counter() - started
    best = best_accuracies(row["parallelism"] for row in found.values() if row["parallelism"])
    for row in found.values():
        if row["parallelism"]:
            row["parallelism"] = concluded(row["parallelism"], best)
    return {
        "rows": found,
        "data": {"source": _known_elsewhere(spec.data.source), "fingerprint": data.fingerprint},
        "model": _known_elsewhere(spec.model.source),
        "dtype": dtype,
        "reference_text": reference_text(spec, model, data, ctx, dtype, device),
    }


def _known_elsewhere(source: str) -> str:
    """Return a source without the directory that it has on this machine."""
    return Path(source).name if Path(source).exists() else source


def _loaded(
    directory: Path | None, spec: GridSpec, model: ModelArtifact, preset: str, dtype: str, device: str
) -> tuple[dict[str, Any], Method]:
    """Return what a cell is and its model; of the unconverted model without a directory.

    Raises:
        DllmError: no finished cell, or one of another model than the preset's.
    """
    import torch

    from dllm_core.errors import DllmError
    from dllm_core.methods.cell import load_cell, read_cell
    from steps.evaluate_cell import load_row

    torch.set_num_threads(spec.runtime.threads or torch.get_num_threads())
    if directory is None:
        method = load_row(spec.row_spec(BASE, 0), Path(model.path), model, dtype=dtype, device=device)
        return {"cell": BASE, "method": "ar", "seed": 0, "trained": False}, method
    info = read_cell(directory)
    if info.contract["num_tokens"] != model.num_tokens:
        raise DllmError(
            f"'{directory}' knows {info.contract['num_tokens']} tokens, the model of preset {preset} "
            f"{model.num_tokens}.",
            "Name the preset and settings (--preset, --set) that the cell was trained with.",
        )
    kept = {k: info.summary.get(k) for k in ("steps", "response_tokens", "flops")}
    method = load_cell(directory, torch.bfloat16 if dtype == "bf16" else torch.float32, device)
    return {"cell": info.cell, "method": info.method, "seed": info.seed, "trained": True, **kept}, method


def with_speeds(record: dict[str, Any], path: Path) -> None:
    """Add what the benchmark of a report says of cells of the same name."""
    from steps.report.schema import Results

    timed = {r.name: r.bench for r in Results.model_validate_json(path.read_text()).cells if r.bench}
    for row in record["rows"].values():
        bench = timed.get(row["cell"])
        row["bench"] = None if bench is None else bench.model_dump()


def as_results(record: dict[str, Any]) -> Results:
    """Return a record as results of a grid, from which tables and figures are made."""
    from steps.report.schema import EvalResult, Results, Row

    rows = [
        Row(
            row_id=name,
            name=name,
            method=row["method"],
            seed=row["seed"],
            status="ok",
            trained=row["trained"],
            eval=EvalResult(step_sweep=row["step_sweep"], parallelism=row["parallelism"]),
            bench=row.get("bench"),
        )
        for name, row in record["rows"].items()
    ]
    return Results(
        run_id=record["benchmark"],
        created_at=record["date"],
        preset=record["settings"]["preset"],
        command=record["command"],
        seeds=[record["seed"]],
        budget={"kind": "steps", "value": 0},
        model={"source": record["model"]},
        data={**record["data"], "reference_text": record["reference_text"]},
        cells=rows,
        ranked=False,
    )


def draw(record: dict[str, Any], path: Path) -> list[Path]:
    """Write the figures of a record beside its JSON; return their paths."""
    from steps.report.sweep_figures import parallelism_curves, quality_by_steps

    results, written = as_results(record), []
    for name, make in (("steps", quality_by_steps), ("parallelism", parallelism_curves)):
        figure = make(results)
        if figure is not None:
            written.append(_picture(path, name))
            figure.savefig(written[-1], dpi=130)
    return written


def page(record: dict[str, Any], path: Path) -> str:
    """Return the page on a stored record: tables, pictures beside it, and what they mean."""
    from steps.report import sweeps

    results = as_results(record)
    hardware, settings = record["hardware"], record["settings"]
    lines = [
        "# Quality by denoising steps, and under parallelism",
        "",
        f"Written by `python benchmarks/quality_sweep.py --page` from [{path.name}]({_link(path)}):",
        f"`{record['command']}`, commit {(record['commit'] or 'unknown')[:10]}, seed {record['seed']},",
        f"{hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, {record['dtype']}, {record['date'][:10]}.",
        f"{settings['samples']} continuations at each number of steps: look at the course, not at single figures.",
    ]
    for title, name, table, note in (
        ("Quality by denoising steps", "steps", sweeps.steps_table(results), sweeps.steps_note(results)),
        (
            "Accuracy under parallelism",
            "parallelism",
            sweeps.parallelism_table(results),
            sweeps.parallelism_note(results),
        ),
    ):
        if table.count("\n") > 1:
            picture = _picture(path, name)
            shown = [f"![{title}]({_link(picture)})", ""] if picture.is_file() else []
            lines += ["", f"## {title}", "", *shown, table, "", note]
    return "\n".join(lines) + "\n"


def _link(path: Path) -> str:
    return os.path.relpath(path.absolute(), PAGE.parent)


def _picture(path: Path, name: str) -> Path:
    """Return where a picture of a record lies: beside it, or with the pages' figures where the record is published."""
    published = path.absolute().parent == _report.RESULTS
    return (PAGE.parent / "figures" if published else path.parent) / f"{path.stem}-{name}.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweeps; return the exit status."""
    from dllm_core.errors import DllmError
    from params.errors import ParamsError
    from steps.evaluate_cell import SEED
    from steps.report import sweeps

    args = arguments(argv)
    if args.page:
        stored = args.out or _report.RESULTS / "quality_sweep-cpu.json"
        PAGE.write_text(page(json.loads(stored.read_text(encoding="utf-8")), stored), encoding="utf-8")
        print(json.dumps({"written": [str(PAGE)]}))
        return 0
    settings = {k: v for k, v in vars(args).items() if k not in ("cells", "runs_dir", "out", "speeds", "page")}
    try:
        record = _report.header("quality_sweep", SEED, settings) | measure(args)
        if args.speeds is not None:
            with_speeds(record, args.speeds)
    except (DllmError, ParamsError) as error:
        print(error, file=sys.stderr)
        return 2
    path = _report.write(record, args.out)
    pictures = draw(record, path)
    results = as_results(record)
    print(sweeps.steps_table(results), sweeps.parallelism_table(results), sep="\n\n")
    print(json.dumps({"written": [str(p) for p in (path, *pictures)]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
