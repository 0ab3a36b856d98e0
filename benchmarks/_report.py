"""The record that every benchmark writes: numbers with the commit, seed, hardware, versions and date behind them."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dllm_core.hardware import describe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "not measured"
SCHEMA_VERSION = 1


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """Return the checked-out commit and whether library or benchmarks differ from it."""
    changed = _git("status", "--porcelain", "--", "dllm_core", "benchmarks/*.py")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def hardware() -> dict[str, Any]:
    """Return what the numbers were measured on, the GPU's driver included."""
    found = describe()
    if found["gpu"] is not None:
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        try:
            out = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        except (OSError, subprocess.SubprocessError):
            out = []
        found["driver"], found["cuda"] = next(iter(out), None), torch.version.cuda
    return found


def versions() -> dict[str, str | None]:
    """Return the versions that can change a number."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def header(name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a record that says where its numbers come from.

    Args:
        name: of the benchmark.
        seed: of everything drawn.
        settings: the arguments, resolved.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": name,
        # a record is committed: what it names must exist elsewhere too
        "command": " ".join(
            ["python", f"benchmarks/{name}.py", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])]
        ),
        **commit(),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "settings": settings,
    }


def write(record: dict[str, Any], path: Path | None = None) -> Path:
    """Write a record as JSON, by default to `benchmarks/results/<benchmark>-<device>.json`, and return the path."""
    if path is None:
        device = "gpu" if record["hardware"]["gpu"] else "cpu"
        path = RESULTS / f"{record['benchmark']}-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
