"""The grid's run in MLflow: database, experiment, parent run, sweep of dead runs."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.cache.key import flatten
from steps.locks import hold
from steps.watchdog import PARENT_VARIABLE, is_alive

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "dllm/compare_grid"
METRICS_PER_BATCH = 900
PARAMS_PER_BATCH = 100
PARAM_LENGTH = 6000

Log = Callable[[str], None]


@dataclass(frozen=True)
class TrackingRef:
    """Where a grid is tracked; small, travels as an artifact.

    Attributes:
        uri: tracking URI.
        experiment_id: empty when tracking is off.
        parent_id: the grid's run; empty when tracking is off.
    """

    uri: str
    experiment_id: str = ""
    parent_id: str = ""

    @property
    def on(self) -> bool:
        """Whether there is anything to write to."""
        return bool(self.parent_id)


def tracking_uri(runs_dir: Path) -> str:
    """Return MLFLOW_TRACKING_URI when set, else the SQLite file of this runs directory, as an absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs_dir.absolute() / 'mlflow.db'}"


def connect(uri: str) -> MlflowClient:
    """Return a client, with quiet loggers, no telemetry and no minutes of retries."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the default waits for minutes on a dead server
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for name in ("alembic", "mlflow", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):  # importing mlflow sets its own level
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


def warning(error: BaseException, uri: str) -> str:
    """Return the one line said about a tracker fault."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"warning: MLflow cannot be written ({uri}: {first}); the run goes on, metrics are in metrics.jsonl"


def open_grid(
    runs_dir: Path, *, name: str, tags: Mapping[str, str], params: Mapping[str, Any], note: str, log: Log
) -> TrackingRef:
    """Create database, experiment and parent run, and close the runs of dead processes. Never raises.

    Called once, before any fan-out: several processes that open a fresh SQLite file at once break each other.
    """
    uri = tracking_uri(runs_dir)
    if os.environ.get("DLLM_TRACKING") == "off":
        return TrackingRef(uri)
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        with hold(runs_dir / ".mlflow.lock", "the MLflow store", log):
            client = connect(uri)
            experiment_id = _experiment(client, uri, runs_dir)
            _sweep(client, experiment_id, log)
        all_tags = {"mlflow.runName": name, "mlflow.note.content": note, **process_tags(), **tags}
        parent = client.create_run(experiment_id, tags=all_tags).info.run_id
        log_params(client, parent, params)
        return TrackingRef(uri, experiment_id, parent)
    except Exception as error:  # the tracker is a mirror: whatever is wrong with it, the grid runs
        log(warning(error, uri))
        return TrackingRef(uri)


def _experiment(client: MlflowClient, uri: str, runs_dir: Path) -> str:
    known = client.get_experiment_by_name(EXPERIMENT)
    if known is not None:
        if known.lifecycle_stage == "deleted":
            client.restore_experiment(known.experiment_id)
        return str(known.experiment_id)
    local = (runs_dir.absolute() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    return str(client.create_experiment(EXPERIMENT, artifact_location=local))


def owner_pid() -> int:
    """Return the process whose death ends the grid's run: the launcher, else this one."""
    announced = os.environ.get(PARENT_VARIABLE, "")
    return int(announced) if announced.isdigit() else os.getpid()


def process_tags(pid: int | None = None) -> dict[str, str]:
    """Return the tags by which the sweep tells a dead process from a live one."""
    pid = pid or owner_pid()
    return {"dllm.host": socket.gethostname(), "dllm.pid": str(pid), "dllm.pid_started": _started(pid)}


def _started(pid: int) -> str:
    """Return what tells a process from a later one with its number, whatever becomes of the wall clock."""
    try:  # clock ticks since this boot; the unix time that psutil makes of them moves when the clock is set
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
        return f"{boot}/{ticks}"
    except (OSError, IndexError):
        return _started_at(pid)


def _started_at(pid: int) -> str:
    import psutil

    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return ""


def _sweep(client: MlflowClient, experiment_id: str, log: Log) -> None:
    """Mark as KILLED what claims to run and whose process, on this host, is gone."""
    running = client.search_runs([experiment_id], filter_string="attributes.status = 'RUNNING'", max_results=500)
    swept = 0
    for run in running:
        tags = run.data.tags
        if tags.get("dllm.host") != socket.gethostname() or not tags.get("dllm.pid", "").isdigit():
            continue
        pid = int(tags["dllm.pid"])
        if is_alive(pid) and _started(pid) == tags.get("dllm.pid_started"):
            continue
        client.set_terminated(run.info.run_id, "KILLED")
        swept += 1
    if swept:
        log(f"MLflow: {swept} run(s) of killed processes marked KILLED")


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Log nested settings as flat params, in batches."""
    from mlflow.entities import Param

    flat = [Param(_clean(k), str(v)[:PARAM_LENGTH]) for k, v in flatten(params).items()]
    for start in range(0, len(flat), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=flat[start : start + PARAMS_PER_BATCH])


def _clean(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)


def touch_grid(ref: TrackingRef, log: Log, *, status: str = "RUNNING", tags: Mapping[str, str] | None = None) -> None:
    """Set the parent's status (RUNNING while a resumed run works on it; FAILED, KILLED, FINISHED at its end)."""
    if not ref.on:
        return
    try:
        client = connect(ref.uri)
        for key, value in {**(process_tags() if status == "RUNNING" else {}), **(tags or {})}.items():
            client.set_tag(ref.parent_id, key, value)
        if status == "RUNNING":
            client.update_run(ref.parent_id, status=status)
        else:
            client.set_terminated(ref.parent_id, status)
    except Exception as error:
        log(warning(error, ref.uri))


def finish_grid(
    ref: TrackingRef, *, metrics: Mapping[str, float], files: Iterable[Path], status: str, log: Log
) -> None:
    """Give the parent its table, figures and results, and a terminal status. Never raises."""
    if not ref.on:
        return
    try:
        client = connect(ref.uri)
        log_metrics(client, ref.parent_id, [(k, v, 0, time.time()) for k, v in metrics.items()])
        for path in files:
            if path.is_dir():
                client.log_artifacts(ref.parent_id, str(path), path.name)
            elif path.is_file():
                client.log_artifact(ref.parent_id, str(path))
        if "failure" in client.get_run(ref.parent_id).data.tags:
            client.delete_tag(ref.parent_id, "failure")  # of an attempt before the last resume
        client.set_terminated(ref.parent_id, status)
    except Exception as error:
        log(warning(error, ref.uri))


def log_metrics(client: MlflowClient, run_id: str, points: list[tuple[str, float, int, float]]) -> None:
    """Log (name, value, step, unix time) points in batches."""
    from mlflow.entities import Metric

    metrics = [Metric(_clean(k), float(v), int(when * 1000), step) for k, v, step, when in points]
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])
