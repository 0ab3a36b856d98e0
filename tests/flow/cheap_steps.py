"""Step functions that cost nothing, for tests of the flow itself: `DLLM_STEPS=tests.flow.cheap_steps`.

They go through the real cache, so that hits, failures and resumption are the real ones. Each call of a build is
written to `calls.txt` in the runs directory. `DLLM_FAIL_CELL` makes a row fail, `DLLM_KILL_CELL` lets its task die
without a word, `DLLM_SLEEP_CELL` keeps it busy.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_core.errors import DataError


@dataclass(frozen=True)
class Thing:
    name: str
    num_layers: int = 2


@dataclass(frozen=True)
class Trained:
    cell_dir: str
    metrics_path: str
    summary: dict[str, Any]
    hit: bool
    origin: str


@dataclass(frozen=True)
class Evaluated:
    path: str
    metrics: dict[str, Any]
    hit: bool


@dataclass(frozen=True)
class Bench:
    rows: dict[str, Any] = field(default_factory=dict)
    ties: list[Any] = field(default_factory=list)


def _note(ctx: Any, line: str) -> None:
    with (Path(ctx.runs_dir) / "calls.txt").open("a") as handle:
        handle.write(line + "\n")


def _cached(ctx: Any, kind: str, label: str, work: Any) -> Any:
    def build(payload: Path, work_dir: Path) -> dict[str, Any]:
        _note(ctx, f"{kind} {label}")
        return work(payload, work_dir)

    return ctx.cache.get_or_build(
        kind, {"label": label}, inputs={}, roots=["dllm_core.data.order"], libraries=[], build=build, label=label
    )


def _fate(row_id: str) -> None:
    if os.environ.get("DLLM_FAIL_CELL") == row_id:
        raise RuntimeError(f"made to fail: {row_id}")
    if os.environ.get("DLLM_KILL_CELL") == row_id:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("DLLM_SLEEP_CELL") == row_id:
        time.sleep(120)


def prepare_model(spec: Any, ctx: Any, data: Any) -> Thing:
    return Thing("model")


def prepare_data(spec: Any, model: Thing, ctx: Any) -> Thing:
    if os.environ.get("DLLM_BAD_DATA"):
        raise DataError("The data is bad.", "Bring other data.")
    return Thing("data")


def cache_anchors(spec: Any, model: Thing, data: Thing, ctx: Any) -> Thing:
    return Thing("anchors")


def extract_trajectories(spec: Any, model: Thing, data: Thing, anchors: Thing, ctx: Any) -> Thing:
    if os.environ.get("DLLM_NO_TRAJECTORIES"):
        raise RuntimeError("no trajectories today")
    return Thing("trajectories")


def train_cell(
    spec: Any, row: Any, model: Thing, data: Thing, anchors: Thing, trajectories: Thing, ctx: Any
) -> Trained:
    def work(payload: Path, work_dir: Path) -> dict[str, Any]:
        _fate(row.row_id)
        report = ctx.progress(row.row_id)
        with (payload / "metrics.jsonl").open("w") as handle:
            for step in range(1, 6):
                record = {"step": step, "time": time.time(), "train/loss": 5.0 / step}
                handle.write(json.dumps(record) + "\n")
                ctx.record(row.row_id, record)
                report(step, 5, loss=5.0 / step)
        names = ("response_tokens", "positions", "flops", "wall_s", "trainable_params", "new_params")
        return {"steps": 5, "final_loss": 1.0, **dict.fromkeys(names, 1)}

    entry = _cached(ctx, "train_cell", row.row_id, work)
    return Trained(str(entry.path), str(entry.path / "metrics.jsonl"), entry.result, entry.hit, entry.origin)


def evaluate_cell(
    spec: Any, row: Any, trained: Trained, model: Thing, data: Thing, ctx: Any, anchors: Thing
) -> Evaluated:
    def work(payload: Path, work_dir: Path) -> dict[str, Any]:
        (payload / "evaluation.json").write_text("{}")
        return {"unigram_nats_per_token": 6.0, "nelbo_nats_per_token": {"value": 4.0, "se": 0.1}, "block_size": 8}

    entry = _cached(ctx, "evaluate_cell", row.row_id, work)
    return Evaluated(str(entry.path / "evaluation.json"), entry.result, entry.hit)


def benchmark(spec: Any, rows: Any, trained: Any, model: Thing, ctx: Any) -> Bench:
    _note(ctx, "benchmark " + ",".join(r.row_id for r in rows))
    return Bench()
