"""The MLflow mirror: nested runs, replay, sweep, and that its faults cost one line and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steps.tracking import RowTracker, TrackingRef, finish_grid, numbers, open_grid, read_metrics, tracking_uri
from steps.tracking.__main__ import main as tracking_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DLLM_PARENT_PID", raising=False)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module: creating its tables takes seconds."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    runs = tmp_path_factory.mktemp("tracking") / "runs"
    assert open_grid(runs, name="first", tags={}, params={}, note="", log=print).on
    return runs


@pytest.fixture
def grid(fresh_store: Path, lines: list[str]) -> TrackingRef:
    return open_grid(
        fresh_store,
        name="g",
        tags={"preset": "test"},
        params={"train": {"lr": 0.1, "betas": [0.9, 0.999]}},
        note="**about**",
        log=lines.append,
    )


def client(ref: TrackingRef) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(ref.uri)


def row(ref: TrackingRef, lines: list[str], **more: Any) -> RowTracker:
    return RowTracker(ref, "random_mask", {"cell": "random_mask", "seed": "0"}, {"lr": 0.1}, lines.append, **more)


def test_fresh_store_has_its_artifacts_beside_it(grid: TrackingRef, fresh_store: Path, lines: list[str]) -> None:
    experiment = client(grid).get_experiment(grid.experiment_id)
    assert experiment.name == "dllm/compare_grid"
    assert experiment.artifact_location == (fresh_store / "mlartifacts").as_uri()
    assert grid.uri == f"sqlite:///{fresh_store}/mlflow.db"
    parent = client(grid).get_run(grid.parent_id)
    assert parent.info.status == "RUNNING"
    assert parent.data.params == {"train.lr": "0.1", "train.betas": "[0.9, 0.999]"}
    assert parent.data.tags["preset"] == "test"
    assert lines == []


def test_row_is_a_child_with_all_its_points(grid: TrackingRef, lines: list[str], tmp_path: Path) -> None:
    tracker = row(grid, lines)
    for step in range(3):
        tracker.record("random_mask", {"step": step, "time": 100.0 + step, "train/loss": 5.0 - step, "note": "text"})
    attached = tmp_path / "metrics.json"
    attached.write_text("{}")
    tracker.open()
    run_id = tracker.finish(files=[attached])
    run = client(grid).get_run(run_id)
    assert run.data.tags["mlflow.parentRunId"] == grid.parent_id
    assert run.info.status == "FINISHED"
    history = client(grid).get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(0, 5, 100000), (1, 4, 101000), (2, 3, 102000)]
    assert [a.path for a in client(grid).list_artifacts(run_id)] == ["metrics.json"]
    assert run.data.params == {"lr": "0.1"}


def test_replay_adds_what_is_missing_and_names_the_origin(grid: TrackingRef, lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": s, "time": s, "train/loss": s}) + "\n" for s in range(4)) + '{"step": 4'
    )
    tracker = row(grid, lines)
    tracker.record("random_mask", {"step": 0, "time": 0.0, "train/loss": 0.0})
    tracker.replay(path, origin="1795")
    run_id = tracker.finish()
    assert [m.step for m in client(grid).get_metric_history(run_id, "train/loss")] == [0, 1, 2, 3]
    assert client(grid).get_run(run_id).data.tags["dllm.origin_run"] == "1795"


def test_quick_row_opens_nothing_and_a_long_one_does(
    grid: TrackingRef, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = row(grid, lines)
    quick.record("r", {"step": 1, "time": 1.0, "train/loss": 1.0})
    assert not quick.is_open
    assert quick.finish() == ""
    monkeypatch.setattr("steps.tracking.row.OPEN_AFTER_S", 0.0)
    long = row(grid, lines)
    long.record("r", {"step": 1, "time": 1.0, "train/loss": 1.0})
    assert long.is_open
    assert long.finish("FAILED")
    assert client(grid).get_run(long.run_id).info.status == "FAILED"


def test_runs_of_dead_processes_are_swept_and_live_ones_are_not(fresh_store: Path, lines: list[str]) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    refs = {}
    for name, pid in (("dead", dead.stdout.strip()), ("live", str(os.getpid()))):
        os.environ["DLLM_PARENT_PID"] = pid
        refs[name] = open_grid(fresh_store, name=name, tags={}, params={}, note="", log=lines.append)
    os.environ.pop("DLLM_PARENT_PID")
    reused = open_grid(fresh_store, name="reused", tags={"dllm.pid_started": "1"}, params={}, note="", log=lines.append)
    open_grid(fresh_store, name="later", tags={}, params={}, note="", log=lines.append)
    status = {n: client(r).get_run(r.parent_id).info.status for n, r in {**refs, "reused": reused}.items()}
    assert status == {"dead": "KILLED", "live": "RUNNING", "reused": "KILLED"}, "reused: a pid that was given away anew"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the start of a process is known as a unix time only")
def test_a_live_run_outlives_a_change_of_the_clock(
    fresh_store: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start of a process was told as a unix time, which moves with the clock: its run was marked KILLED."""
    import psutil

    ref = open_grid(fresh_store, name="live", tags={}, params={}, note="", log=lines.append)
    created = psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created + 3600)
    open_grid(fresh_store, name="later", tags={}, params={}, note="", log=lines.append)
    assert client(ref).get_run(ref.parent_id).info.status == "RUNNING"


def test_finish_gives_the_parent_results_and_an_end(grid: TrackingRef, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(b"x")
    (tmp_path / "results.json").write_text("{}")
    finish_grid(
        grid,
        metrics={"bench/ar/tokens_per_s": 24.0},
        files=[tmp_path / "figures", tmp_path / "results.json", tmp_path / "absent"],
        status="FINISHED",
        log=lines.append,
    )
    run = client(grid).get_run(grid.parent_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"bench/ar/tokens_per_s": 24.0}
    assert {a.path for a in client(grid).list_artifacts(grid.parent_id)} == {"figures", "results.json"}
    assert lines == []


def _file_in_the_way(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("")
    return f"sqlite:///{tmp_path}/file/mlflow.db"


@pytest.mark.parametrize(
    "uri",
    [_file_in_the_way, lambda _: "http://127.0.0.1:9", lambda _: "nonsense://"],
    ids=["store", "server", "scheme"],
)
def test_tracker_that_cannot_be_written_costs_one_line(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, uri: Callable[[Path], str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(tmp_path))
    started = time.monotonic()
    ref = open_grid(tmp_path / "runs", name="g", tags={}, params={}, note="", log=lines.append)
    tracker = row(ref, lines)
    tracker.record("r", {"step": 1, "time": 1.0, "train/loss": 1.0})
    tracker.open()
    assert tracker.finish() == ""
    finish_grid(ref, metrics={"a": 1.0}, files=[], status="FINISHED", log=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("warning: MLflow cannot be written")
    assert time.monotonic() - started < 30


def test_tracker_that_breaks_in_the_middle_costs_one_line(lines: list[str], tmp_path: Path) -> None:
    _file_in_the_way(tmp_path)
    tracker = row(TrackingRef(f"sqlite:///{tmp_path}/file/mlflow.db", "1", "abc"), lines)
    tracker.open()
    for step in range(5):
        tracker.record("r", {"step": step, "time": 1.0, "train/loss": 1.0})
    tracker.finish(files=[tmp_path / "file"])
    assert len(lines) == 1


def test_recording_returns_at_once(grid: TrackingRef, lines: list[str]) -> None:
    tracker = row(grid, lines)
    tracker.open()
    started = time.perf_counter()
    for step in range(2000):
        tracker.record("r", {"step": step, "time": 1.0, "train/loss": 1.0, "train/lr": 0.1})
    assert time.perf_counter() - started < 1.0
    run_id = tracker.finish()
    assert len(client(grid).get_metric_history(run_id, "train/lr")) == 2000


def test_importing_the_tracker_does_not_import_mlflow() -> None:
    code = "import sys, steps.tracking; print('mlflow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"a": {"value": 1, "se": 0.5}}, {"p/a": 1.0, "p/a/se": 0.5}),
        ({"a": None, "b": "text", "c": True, "d": [1, 2]}, {}),
        ({"frontier": [{"temperature": 0.7, "judge_ppl": 9.0, "judge": "base"}]}, {"p/frontier/T0.7/judge_ppl": 9.0}),
        ({"masked_nll": {"0.15": {"value": 2}}}, {"p/masked_nll/0.15": 2.0}),
    ],
)
def test_numbers_of_nested_results(values: dict[str, Any], expected: dict[str, float]) -> None:
    assert numbers(values, "p") == expected


def test_metrics_cut_off_by_a_kill_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 2}\n{"step": 2, "ti')
    assert read_metrics(path) == [{"step": 1, "time": 2}]


def test_users_own_server_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(tmp_path) == "http://host:5000"


def test_ui_without_a_run_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tracking_command(["ui", "--runs-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2
