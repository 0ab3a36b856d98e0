"""Put a finished grid on paper: runs/reports/<run>/ and a copy at runs/reports/latest/."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.locks import hold
from steps.report import figures, summary, tidy
from steps.report.cell_links import link_cells
from steps.report.compare import PerSequence, all_pairs, concluded, is_ranked
from steps.report.curve_areas import with_areas
from steps.report.curves import health_curves, loss_curve
from steps.report.markdown import render_markdown
from steps.report.model_cards import write_cards
from steps.report.schema import BenchResult, CostResult, Estimate, EvalResult, Results, Row, Tie, TrainResult

if TYPE_CHECKING:
    from params.schema import GridSpec
    from steps.context import Context


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
        options: of the room, resolved and JSON-able.
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
    options: dict[str, Any] = field(default_factory=dict)
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
    """Write results.json, results.csv, report.md, a card for every trained cell, and the figures.

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
    runs_dir, model_dir = Path(ctx.runs_dir), model.get("path")
    model, data = (below(runs_dir, told) for told in (model, data))
    results = assemble(spec, rows, bench, run_id=ctx.run_id, model=model, data=data, command=command)
    results = results.model_copy(update={"hardware": hardware or {}, "versions": versions or {}})
    directory = Path(ctx.runs_dir) / "reports" / ctx.run_id
    directory.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw_all(results, _pictured(rows, "prediction_strip"), _pictured(rows, "history"), directory)
    lines = tuple(summary.headline(results))
    (directory / "results.json").write_text(results.model_dump_json(indent=1), encoding="utf-8")
    (directory / "results.csv").write_text(tidy.results_csv(results), encoding="utf-8")
    text = render_markdown(results, lines, [p.name for p in drawn.values()])
    (directory / "report.md").write_text(text, encoding="utf-8")
    write_cards(results, directory / "model_cards", tuple(drawn))
    link_cells(directory / "cells", rows, Path(model_dir) if model_dir else None)
    publish_latest(directory, ctx.log)
    return ReportArtifact(
        directory=str(directory),
        results_path=str(directory / "results.json"),
        markdown_path=str(directory / "report.md"),
        figures={k: str(v) for k, v in drawn.items()},
        lines=lines,
    )


def below(runs_dir: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Return facts with paths below the runs directory made relative to it: a report is passed on, a machine is not."""
    prefix = f"{runs_dir}/"
    return {k: v.removeprefix(prefix) if isinstance(v, str) else v for k, v in told.items()}


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
    results = Results(
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
        cells=[_row(r, bench["rows"].get(r.row_id)) for r in with_areas(rows)],
        comparisons=all_pairs(_per_sequence(rows), {r.row_id: r.seed for r in rows}),
        ties=[Tie(**t) for t in bench["ties"]],
        ranked=is_ranked(spec.seeds),
    )
    return concluded(results)


def _pictured(rows: Sequence[RowResult], what: str) -> dict[str, dict[str, Any]]:
    """Return what is drawn of each cell token by token: that of its first finished seed."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if (row.evaluation or {}).get(what):
            found.setdefault(row.name, (row.evaluation or {})[what])
    return found


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
        health=health_curves(Path(metrics_path)) if metrics_path else {},
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
            values.setdefault(metric, {})[row.row_id] = PerSequence(v["nats"], v["tokens"], v.get("groups"))
    return values


def git_state() -> tuple[str | None, bool | None]:
    """Return (commit, whether the tree has local changes), or (None, None) outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit.stdout.strip(), bool(status.stdout.strip())


def publish_latest(directory: Path, log: Callable[[str], None]) -> None:
    """Make runs/reports/latest a copy, swapped in as a whole: pictures stay readable while a new run writes.

    A copy lies as deep as the original, so that its relative links to the cells hold. Runs that end together take
    turns.

    Args:
        directory: a run's report, below runs/reports.
        log: told who is waited for.
    """
    latest = directory.parent / "latest"
    fresh, old = directory.parent / ".latest-new", directory.parent / ".latest-old"
    with hold(directory.parent / ".latest-lock", "reports/latest", log):
        for left in (fresh, old):  # by a run that was killed here
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(directory, fresh, symlinks=True)
        if latest.exists():
            latest.rename(old)
        fresh.rename(latest)
        shutil.rmtree(old, ignore_errors=True)
