"""A row's run in MLflow, a child of the grid's, written by a thread of its own."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.tracking.store import (
    TrackingRef,
    connect,
    log_metrics,
    log_params,
    owner_pid,
    process_tags,
    touch_grid,
    warning,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

FLUSH_EVERY_S = 5.0
OPEN_AFTER_S = 15.0
"""A row that is done sooner is mirrored at the end of the grid, by one process that imports MLflow once."""

Log = Callable[[str], None]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; a last line cut off by a kill is dropped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict)]


def numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return the numbers of a nested result as metrics: `{"a": {"value": 1, "se": .1}}` -> `p/a`, `p/a/se`."""
    found: dict[str, float] = {}
    for key, value in values.items():
        name = prefix if key == "value" else f"{prefix}/{key}"
        if isinstance(value, Mapping):
            found.update(numbers(value, name))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
        elif isinstance(value, list) and all(isinstance(v, Mapping) and "temperature" in v for v in value):
            for item in value:
                rest = {k: v for k, v in item.items() if k != "temperature"}
                found.update(numbers(rest, f"{name}/T{item['temperature']:g}"))
    return found


_STOP = object()


@dataclass
class RowTracker:
    """One row's child run, opened once its work takes a while and written by a thread of its own.

    Use it as a listener of a Context: `ctx.listeners.append(tracker.record)`.

    Attributes:
        ref: the grid.
        row: row id, the run's name.
        tags: more tags.
        params: settings of the row.
        log: gets the one warning.
    """

    ref: TrackingRef
    row: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    log: Log
    run_id: str = ""
    broken: bool = False
    _seen: set[tuple[int, str]] = field(default_factory=set)
    _queue: queue.Queue[Any] = field(default_factory=queue.Queue)
    _thread: threading.Thread | None = None
    _first_record: float | None = None

    def record(self, row: str, record: Mapping[str, Any]) -> None:
        """Mirror one record of metrics.jsonl: {"step", "time", name: number, ...}; returns at once."""
        step, when = int(record.get("step", 0)), float(record.get("time", time.time()))
        points = [
            (key, float(value), step, when)
            for key, value in record.items()
            if key not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool)
        ]
        fresh = [p for p in points if (p[2], p[0]) not in self._seen]
        self._seen.update((p[2], p[0]) for p in fresh)
        if not fresh or not self.ref.on:
            return
        self._first_record = self._first_record or time.monotonic()
        self._queue.put(fresh)
        if time.monotonic() - self._first_record >= OPEN_AFTER_S:
            self.open()

    def replay(self, path: Path, origin: str = "") -> None:
        """Mirror what metrics.jsonl holds and this run does not yet; with `origin`, tag where it was computed."""
        if origin:
            self.tag("dllm.origin_run", origin)
        if path.is_file():
            for record in read_metrics(path):
                self.record(self.row, record)

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._put((key, value))

    def finish(self, status: str = "FINISHED", files: Iterable[Path] = (), timeout_s: float = 60.0) -> str:
        """Write what is queued, attach files, set the terminal status; return the run id ("" without a tracker)."""
        if self._thread is None:
            return ""
        for path in files:
            self._put(path)
        self._queue.put((_STOP, status))
        self._thread.join(timeout_s)
        if self._thread.is_alive() and not self.broken:
            self.broken = True
            self.log(warning(TimeoutError(f"no answer for {timeout_s:.0f} s"), self.ref.uri))
        return self.run_id

    def open(self) -> None:
        """Open the child run now."""
        if self.ref.on and not self.broken and self._thread is None:
            self._thread = threading.Thread(target=self._write, daemon=True, name="mlflow-mirror")
            self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether the child run was opened."""
        return self._thread is not None

    def _put(self, item: Any) -> None:
        self.open()
        if self.is_open and not self.broken:
            self._queue.put(item)

    def _write(self) -> None:
        try:
            client = connect(self.ref.uri)
            self._open_run(client)
            while not self._write_batch(client):
                pass
        except Exception as error:
            self.broken = True
            self.log(warning(error, self.ref.uri))

    def _open_run(self, client: MlflowClient) -> None:
        parent = client.get_run(self.ref.parent_id)
        if parent.data.tags.get("dllm.pid") != str(owner_pid()):  # resumed by another process
            touch_grid(self.ref, self.log)
        tags = {
            "mlflow.runName": self.row,
            "mlflow.parentRunId": self.ref.parent_id,
            **process_tags(os.getpid()),
            **self.tags,
        }
        self.run_id = client.create_run(self.ref.experiment_id, tags=tags).info.run_id
        log_params(client, self.run_id, self.params)

    def _write_batch(self, client: MlflowClient) -> bool:
        """Write what arrives within a few seconds; return True after the last."""
        points: list[tuple[str, float, int, float]] = []
        deadline = time.monotonic() + FLUSH_EVERY_S
        status = ""
        while not status and (left := deadline - time.monotonic()) > 0:
            try:
                item = self._queue.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(item, list):
                points += item
            elif isinstance(item, Path):
                if item.is_file():
                    client.log_artifact(self.run_id, str(item))
            elif item[0] is _STOP:
                status = item[1]
            else:
                client.set_tag(self.run_id, *item)
        log_metrics(client, self.run_id, points)
        if status:
            client.set_terminated(self.run_id, status)
        return bool(status)
