"""Put a finished grid on paper: runs/reports/<run>/ and a copy at runs/reports/latest/."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.report import figures, summary, tables
from steps.report.compare import PerSequence, all_pairs, is_ranked
from steps.report.schema import BenchResult, CostResult, Estimate, EvalResult, Results, Row, Tie, TrainResult

if TYPE_CHECKING:
    from params.schema import GridSpec
    from steps.context import Context

MAX_CURVE_POINTS = 400


@dataclass(frozen=True)
class RowResult:
    """What the flow knows of one row when it reaches the report. Small and picklable.

    Attributes:
        row_id: unique name of the row.
        name: cell name.
        method: room.
        seed: training seed.
        status: `ok` or `failed`.
        trained: whether the row was trained in this grid.
        error: one line, for failed rows.
        origin: run that computed it when it came from the cache.
        cell_dir: directory of the finished cell.
        metrics_path: its metrics.jsonl.
        train: summary of training (steps/train_cell.py).
        evaluation: metrics (steps/evaluate_cell.py).
    """

    row_id: str
    name: str
    method: str
    seed: int
    status: str
    trained: bool
    error: str | None = None
    origin: str | None = None
    cell_dir: str | None = None
    metrics_path: str | None = None
    train: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True)
class ReportArtifact:
    """Where the report lies.

    Attributes:
        directory: runs/reports/<run>.
        results_path: results.json.
        markdown_path: report.md.
        figures: name -> PNG.
        lines: the opening sentences.
    """

    directory: str
    results_path: str
    markdown_path: str
    figures: dict[str, str] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


def build(
    spec: GridSpec,
    rows: Sequence[RowResult],
    bench: dict[str, Any] | None,
    ctx: Context,
    *,
    model: dict[str, Any],
    data: dict[str, Any],
    command: str = "",
    hardware: dict[str, Any] | None = None,
    versions: dict[str, str] | None = None,
) -> ReportArtifact:
    """Write results.json, results.csv, report.md and the figures.

    Args:
        spec: the grid's settings.
        rows: finished and failed rows in table order.
        bench: `{"rows": {row_id: ...}, "ties": [...]}` of steps/benchmark.py, or None.
        ctx: run context.
        model: identity of the base model (source, sha256, parameters).
        data: fingerprint and sizes of the data; unigram floor.
        command: what the user typed.
        hardware: description of the machine.
        versions: library versions.
    """
    results = assemble(spec, rows, bench, run_id=ctx.run_id, model=model, data=data, command=command)
    results = results.model_copy(update={"hardware": hardware or {}, "versions": versions or {}})
    directory = Path(ctx.runs_dir) / "reports" / ctx.run_id
    directory.mkdir(parents=True, exist_ok=True)
    strips = {r.row_id: (r.evaluation or {}).get("prediction_strip") for r in rows}
    histories = {r.row_id: (r.evaluation or {}).get("history") for r in rows}
    drawn = figures.draw_all(
        results,
        {k: v for k, v in strips.items() if v},
        {k: v for k, v in histories.items() if v},
        directory,
    )
    lines = tuple(summary.headline(results))
    (directory / "results.json").write_text(results.model_dump_json(indent=1))
    (directory / "results.csv").write_text(tables.results_csv(results))
    (directory / "report.md").write_text(render_markdown(results, lines, [p.name for p in drawn.values()]))
    _link_cells(directory / "cells", rows)
    _publish_latest(directory)
    return ReportArtifact(
        directory=str(directory),
        results_path=str(directory / "results.json"),
        markdown_path=str(directory / "report.md"),
        figures={k: str(v) for k, v in drawn.items()},
        lines=lines,
    )


def assemble(
    spec: GridSpec,
    rows: Sequence[RowResult],
    bench: dict[str, Any] | None,
    *,
    run_id: str,
    model: dict[str, Any],
    data: dict[str, Any],
    command: str = "",
) -> Results:
    """Return the report as data; reads each row's metrics.jsonl for its loss curve."""
    bench = bench or {"rows": {}, "ties": []}
    reference = next((r.evaluation["reference_text"] for r in rows if (r.evaluation or {}).get("reference_text")), None)
    if reference is not None:
        data = {**data, "reference_text": reference}
    commit, dirty = git_state()
    return Results(
        run_id=run_id,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        preset=spec.preset,
        command=command,
        git_commit=commit,
        git_dirty=dirty,
        seeds=list(spec.seeds),
        budget=spec.budget.model_dump() if spec.budget else {"kind": "steps", "value": spec.train.steps},
        model=model,
        data=data,
        cells=[_row(r, bench["rows"].get(r.row_id)) for r in rows],
        comparisons=all_pairs(_per_sequence(rows)),
        ties=[Tie(**t) for t in bench["ties"]],
        ranked=is_ranked(spec.seeds),
    )


def _row(result: RowResult, bench: dict[str, Any] | None) -> Row:
    train = result.train
    return Row(
        row_id=result.row_id,
        name=result.name,
        method=result.method,
        seed=result.seed,
        status="ok" if result.status == "ok" else "failed",
        trained=result.trained,
        error=result.error,
        origin=result.origin,
        trainable_params=int(train["trainable_params"]) if train else None,
        train=_train(train, result.metrics_path) if train and result.trained else None,
        eval=_evaluation(result.evaluation) if result.evaluation else None,
        bench=_bench(bench) if bench else None,
        cost=_cost(train) if train and result.trained else None,
    )


def _train(train: dict[str, Any], metrics_path: str | None) -> TrainResult:
    return TrainResult(
        steps=int(train["steps"]),
        final_loss=train.get("final_loss"),
        tokens_per_s=train.get("tokens_per_s"),
        curve=loss_curve(Path(metrics_path)) if metrics_path else [],
    )


def _cost(train: dict[str, Any]) -> CostResult:
    return CostResult(
        response_tokens=train["response_tokens"],
        positions=train["positions"],
        flops=train["flops"],
        teacher_flops=train.get("teacher_flops", 0.0),
        train_s=train["wall_s"],
        extraction_s=train.get("extraction_s", 0.0),
        peak_memory_gb=train.get("peak_memory_gb"),
        trainable_params=int(train["trainable_params"]),
        new_params=int(train["new_params"]),
    )


def _evaluation(metrics: dict[str, Any]) -> EvalResult:
    known = {k: v for k, v in metrics.items() if k in EvalResult.model_fields and v is not None}
    for key in ("masked_accuracy", "masked_nll"):
        known[key] = {r: Estimate(**e) for r, e in (metrics.get(key) or {}).items()}
    return EvalResult(**known)


def _bench(bench: dict[str, Any]) -> BenchResult:
    keep = ("tokens_per_s", "first_token_s", "num_forwards", "tokens_per_forward", "rounds")
    steps = {s: {k: v for k, v in values.items() if k in keep} for s, values in bench["steps"].items()}
    return BenchResult(steps=steps, peak_memory_gb=bench.get("peak_memory_gb"), load_s=bench.get("load_s"))


def _per_sequence(rows: Sequence[RowResult]) -> dict[str, dict[str, PerSequence]]:
    values: dict[str, dict[str, PerSequence]] = {}
    for row in rows:
        for metric, v in ((row.evaluation or {}).get("per_sequence") or {}).items():
            values.setdefault(metric, {})[row.row_id] = PerSequence(v["nats"], v["tokens"])
    return values


def loss_curve(metrics_path: Path) -> list[dict[str, float]]:
    """Return step, total loss and cross-entropy from metrics.jsonl, thinned to a few hundred points.

    The file of a resumed run may hold a step twice; the later line counts.
    """
    if not metrics_path.is_file():
        return []
    points: dict[int, dict[str, float]] = {}
    for line in metrics_path.read_text().splitlines():
        entry = json.loads(line)
        if "train/loss" not in entry:
            continue
        point = {"step": float(entry["step"]), "loss": entry["train/loss"]}
        ce = entry.get("train/ce_nats")
        points[int(entry["step"])] = point if ce is None else {**point, "ce": ce}
    ordered = [points[s] for s in sorted(points)]
    stride = max(1, -(-len(ordered) // MAX_CURVE_POINTS))
    return ordered[::stride]


def render_markdown(results: Results, lines: Sequence[str], figure_names: Sequence[str]) -> str:
    """Return report.md."""
    machine = results.hardware
    hardware = ", ".join(str(v) for v in (machine.get("gpu"), machine.get("cpu"), _cores(machine)) if v)
    head = [
        f"# Grid {results.run_id}",
        "",
        f"`{results.command}`" if results.command else "",
        f"commit {(results.git_commit or 'unknown')[:12]}{' + local changes' if results.git_dirty else ''}, "
        f"{results.created_at}, {hardware or 'hardware not recorded'}, seeds {results.seeds}, "
        f"budget {results.budget['value']:,.0f} {results.budget['kind']} a row.",
        "",
        *[f"- {line}" for line in lines],
    ]
    sections = [
        ("Quality on held-out text", tables.quality_table(results), _QUALITY_NOTE),
        ("Differences between rows", tables.comparison_table(results), _COMPARISON_NOTE),
        ("Speed", tables.speed_table(results), _SPEED_NOTE),
        ("Speed ratios of rows that share one network", tables.tie_table(results), _TIE_NOTE),
        ("Cost", tables.cost_table(results), _COST_NOTE),
        ("Generated text", tables.frontier_table(results), _FRONTIER_NOTE),
    ]
    body = [f"\n## {title}\n\n{table}\n\n{note}" for title, table, note in sections if table.count("\n") > 1]
    pictures = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figure_names]
    return "\n".join([*head, *body, "\n## Figures\n", *pictures, "\n## Samples\n", _samples(results)]) + "\n"


def _cores(machine: dict[str, Any]) -> str | None:
    return f"{machine['threads']} threads" if "threads" in machine else None


_QUALITY_NOTE = (
    "Nats per response token, ± one standard error over held-out sequences. exact: the AR likelihood; NELBO: an upper "
    "bound under random-order unmasking; block NELBO: an upper bound under left-to-right blocks. A bound is not an "
    "exact value: the columns are not to be mixed."
)
_COMPARISON_NOTE = (
    "First minus second, nats per token, ± one standard error, on the same held-out sequences and masks. Beyond 2 "
    "standard errors a difference is more than evaluation noise; whether another training seed would give it again "
    "is not known."
)
_TIE_NOTE = (
    "Paired by round. A tie is an interval within ±3 %; overlap alone proves nothing, and under 6 rounds nothing is "
    "resolved."
)
_SPEED_NOTE = "Batch 1, fixed length, EOS ignored, all rows interleaved in one process; median [95 % interval]."
_COST_NOTE = (
    "tokens: response tokens presented. TFLOP: all of it, teacher and extraction included. positions: token positions "
    "forwarded, further views included. Extraction: anchors and trajectories a row reads, at their stand-alone cost, "
    "charged to every row that reads them."
)
_FRONTIER_NOTE = (
    "Judge perplexity alone can be gamed by dull or repetitive text: read it with entropy and repetition. A judge "
    "that is the base model is labelled self-judged and ranks nothing."
)


def _samples(results: Results) -> str:
    parts = []
    for row in results.cells:
        for sample in (row.eval.samples if row.eval else [])[:1]:
            text = sample["continuation"].strip().replace("\n", " ")
            parts.append(
                f"**{row.row_id}** (T={sample.get('temperature')}): {sample['prompt'].strip()[-160:]} ⟶ {text}"
            )
    return "\n\n".join(parts)


def git_state() -> tuple[str | None, bool | None]:
    """Return (commit, whether the tree has local changes), or (None, None) outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit.stdout.strip(), bool(status.stdout.strip())


def _link_cells(directory: Path, rows: Sequence[RowResult]) -> None:
    """Give every finished cell a readable path: cells/<row> -> its directory in the step cache."""
    directory.mkdir(exist_ok=True)
    for row in rows:
        link = directory / row.row_id
        link.unlink(missing_ok=True)
        if row.cell_dir is not None:
            link.symlink_to(os.path.relpath(row.cell_dir, directory.resolve()))


def _publish_latest(directory: Path) -> None:
    """Make runs/reports/latest a copy, swapped in as a whole: pictures stay readable while a new run writes.

    A copy lies as deep as the original, so that its relative links to the cells hold.
    """
    latest = directory.parent / "latest"
    fresh = directory.parent / f".latest-{os.getpid()}"
    shutil.copytree(directory, fresh, dirs_exist_ok=True, symlinks=True)
    old = directory.parent / f".old-{os.getpid()}"
    if latest.exists():
        latest.rename(old)
    fresh.rename(latest)
    shutil.rmtree(old, ignore_errors=True)
