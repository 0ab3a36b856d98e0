"""One row of a grid trained and measured under several settings, one after another in one process.

    python benchmarks/row_variants.py --cell vfm --variants "base; lr=cells.vfm.train.lr=3e-4"
    python benchmarks/row_variants.py --cell cola --set budget.value=8.6e12,runtime.threads=1 --variants "base"

A variant is `NAME` or `NAME=SETTINGS`, settings as for `flows/compare_grid.py run --set`; they come after those of
`--set`, which hold for all. Every variant trains with the cell's preset and is evaluated as the grid would; nothing is
benchmarked. Model, data, states and finished variants come from the step cache. Needs the whole grid (`make install`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import _report

FIGURES = (
    "judge_ppl",
    "shuffled_judge_ppl",
    "unigram_entropy_nats",
    "distinct_1",
    "repetition_4",
    "overlap_1",
    "overlap_1_other",
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", required=True, help="which row")
    parser.add_argument("--variants", default="base", help="NAME or NAME=SETTINGS, separated by semicolons")
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--set", default="", help="settings for all variants, as for the grid")
    parser.add_argument("--runs-dir", type=Path, default=_report.ROOT / "runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/row_variants-CELL-cpu.json")
    return parser.parse_args(argv)


def parsed(text: str) -> dict[str, str]:
    """Return name -> settings of a list of variants.

    Raises:
        SystemExit: a name without settings that holds a dot, or one that occurs twice.
    """
    parts = [part.strip().partition("=") for part in text.split(";") if part.strip()]
    found = {name.strip(): settings.strip() for name, _, settings in parts}
    if len(found) < len(parts) or any("." in name for name in found):
        raise SystemExit(f"{text!r} does not give every variant a name of its own.\nWrite NAME or NAME=KEY=VALUE,...")
    return found


def run_variant(settings: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate the row; return its figures."""
    import params
    from steps.cache_anchors import cache_anchors
    from steps.context import Context
    from steps.evaluate_cell import evaluate_cell
    from steps.prepare_data import prepare_data
    from steps.prepare_model import prepare_model
    from steps.train_cell import train_cell

    overrides = ",".join(s for s in (args.set, settings) if s)
    spec = params.load(args.preset, cells=args.cell, seeds=str(args.seed), overrides=overrides)
    ctx = Context(runs_dir=args.runs_dir.absolute(), threads=spec.runtime.threads)
    model = prepare_model(spec.model, ctx, spec.data)
    data = prepare_data(spec, model, ctx)
    anchors = cache_anchors(spec, model, data, ctx)
    (row,) = spec.rows()
    trained = train_cell(spec, row, model, data, anchors, None, ctx)
    evaluation = evaluate_cell(spec, row, trained, model, data, ctx, anchors=anchors)
    return figures(trained.summary, evaluation.metrics)


def figures(summary: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what is compared of a variant."""
    health = {k: v for k, v in (metrics.get("diagnostics") or {}).items() if not isinstance(v, list)}
    return {
        **{k: summary[k] for k in ("steps", "response_tokens", "flops", "teacher_flops", "wall_s", "final_losses")},
        "health": health,
        "text": [
            {"temperature": p["temperature"], **{k: p[k] for k in FIGURES if k in p}} for p in metrics["frontier"]
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the variants; the file is written after each, so that a stop loses nothing."""
    args = arguments(argv)
    path = args.out or _report.RESULTS / f"row_variants-{args.cell}-cpu.json"
    told = {"cell": args.cell, "preset": args.preset, "set": args.set}
    record = _report.header("row_variants", args.seed, {**told, "device": "cpu"})
    found: dict[str, dict[str, Any]] = {}
    for name, settings in parsed(args.variants).items():
        print(f"  {name}: {settings or 'as in the preset'} ...", file=sys.stderr, flush=True)
        found[name] = {"set": settings, **run_variant(settings, args)}
        record["variants"] = found
        _report.write(record, path)
        print(json.dumps({name: found[name]}), flush=True)
    print(json.dumps({"written": str(path)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
