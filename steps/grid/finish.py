"""The end of a grid: speed of all rows in one process, the report, the tracker's last word, what to do next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from steps.cache.key import library_versions
from steps.context import ROOT, default_runs_dir
from steps.grid.rows import RowOutcome, mirror, row_of, row_tracker
from steps.grid.run import GridRun, Prepared, require_kept, stage, step_function
from steps.row_options import options_of
from steps.tracking import finish_grid, numbers, tracking_uri

if TYPE_CHECKING:
    from steps.report.build import ReportArtifact, RowResult

REPORTED_LIBRARIES = ("torch", "transformers", "safetensors", "pydantic", "metaflow", "mlflow", "triton", "datasets")


def benchmark(run: GridRun, shared: Prepared, outcomes: Sequence[RowOutcome]) -> Any:
    """Measure the decoding speed of all finished rows, interleaved."""
    trained = {o.row_id: o.trained for o in outcomes if o.ok}
    rows = [row for row in run.spec.rows() if row.row_id in trained]
    with stage(run, "benchmark") as ctx:
        require_kept(shared, _cell_dirs(outcomes))
        return step_function("benchmark")(run.spec, rows, trained, shared.model, ctx)


def _cell_dirs(outcomes: Sequence[RowOutcome]) -> list[str]:
    return [o.trained.cell_dir for o in outcomes if o.trained is not None]


def row_result(run: GridRun, outcome: RowOutcome) -> RowResult:
    """Return what the report is told of a row."""
    from steps.report.build import RowResult

    row = row_of(run, outcome.row_id)
    options = options_of(row)
    trained, evaluation, failure = outcome.trained, outcome.evaluation, outcome.failure
    return RowResult(
        row_id=row.row_id,
        name=row.cell.name,
        method=row.cell.method,
        seed=row.seed,
        status="ok" if failure is None else "failed",
        trained=options.capabilities().trains,
        error=failure.problem if failure else None,
        origin=trained.origin if trained and trained.hit else None,
        cell_dir=str(trained.cell_dir) if trained and trained.cell_dir else None,
        options=options.model_dump(mode="json"),
        metrics_path=str(trained.metrics_path) if trained and trained.metrics_path else None,
        train=trained.summary if trained else None,
        evaluation=evaluation.metrics if evaluation else None,
    )


def plain(value: Any) -> Any:
    """Return a dataclass as a dict, anything else as it is."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def hardware(run: GridRun) -> dict[str, Any]:
    """Describe this machine."""
    from dllm_core.hardware import describe, device

    found = describe()
    return {"device": device(run.spec.runtime.device).type, **found}


def report(run: GridRun, shared: Prepared, outcomes: Sequence[RowOutcome], bench: Any) -> ReportArtifact:
    """Write the report and close the grid's record in the tracker."""
    from steps.report.build import build

    measured = plain(bench)
    with stage(run, "report") as ctx:
        require_kept(shared, _cell_dirs(outcomes))
        made = build(
            run.spec,
            [row_result(run, o) for o in outcomes],
            measured,
            ctx,
            model={"source": run.spec.model.source, **plain(shared.model)},
            data={"source": run.spec.data.source, **plain(shared.data)},
            command=run.command,
            hardware=hardware(run),
            versions=library_versions(REPORTED_LIBRARIES),
        )
    if run.tracking.on:
        for outcome in (o for o in outcomes if o.ok and not o.tracking_id):  # it came from the cache, or was quick
            _mirror_late(run, outcome, ctx.log)
    status = "FINISHED" if all(o.ok for o in outcomes) else "FAILED"
    files = [p for p in sorted(Path(made.directory).iterdir()) if p.is_file()]
    metrics = numbers((measured or {}).get("rows", {}), "bench")
    finish_grid(run.tracking, metrics=metrics, files=files, status=status, log=ctx.log)
    return made


def _mirror_late(run: GridRun, outcome: RowOutcome, log: Any) -> None:
    assert outcome.trained is not None
    assert outcome.evaluation is not None
    mirror(row_tracker(run, row_of(run, outcome.row_id), outcome.tags, log), outcome.trained, outcome.evaluation)


def shown(path: Path) -> str:
    """Return a path as short as it can be typed from here."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def closing_lines(run: GridRun, made: ReportArtifact) -> list[str]:
    """Return the last lines of a finished run: findings, where things are, what to do next."""
    runs = default_runs_dir()
    uri = tracking_uri(runs)
    elsewhere = "" if runs == ROOT / "runs" else f" --runs-dir {quote(shown(runs))}"
    lines = [*made.lines, ""] if made.lines else []
    lines.append(f"report    {shown(Path(made.markdown_path))}   (also in {shown(runs / 'reports' / 'latest')})")
    page = f"http://127.0.0.1:5000/#/experiments/{run.tracking.experiment_id}/runs"  # elsewhere it opens on traces
    if run.tracking.on and uri.startswith("sqlite:") and not elsewhere:
        lines.append(f"browse    make ui, then {page}")
    if run.tracking.on and uri.startswith("sqlite:"):
        lean = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1"
        lines.append(f"          {lean} --backend-store-uri {quote(uri)}")
    elif run.tracking.on:
        lines.append(f"browse    {uri}")
    lines.append("again     the same command: everything comes from the cache; --no-cache computes it anew")
    lines.append(
        f"cells     python flows/compare_grid.py run --cells a,b --seeds 0,1,2{elsewhere}   (only what is new runs)"
    )
    return lines
