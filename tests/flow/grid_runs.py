"""Running the flow with its real steps in a process of its own, as a user would, and reading what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from steps.report.schema import Results

ROOT = Path(__file__).resolve().parents[2]
FLOW = ROOT / "flows" / "compare_grid.py"
ROWS = [
    "ar",
    "ar_tuned",
    "random_mask",
    "repr_align_4",
    "repr_align_all",
    "repr_align_trajectory",
    "ldlm",
    "vfm",
    "cola",
]


def environment(runs: Path, **extra: str) -> dict[str, str]:
    """Return a user's environment, without a user name and without what steers other runs."""
    hidden = ("USER", "USERNAME", "LOGNAME", "MLFLOW_TRACKING_URI", "DLLM_STEPS", "DLLM_TRACKING")
    kept = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("METAFLOW_")}
    return kept | {"DLLM_RUNS": str(runs)} | extra


def run(runs: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the flow from another directory, without a terminal and without a user name."""
    return subprocess.run(
        [sys.executable, str(FLOW), *arguments],
        cwd=runs.parent,
        env=environment(runs, **extra),
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )


def results(runs: Path) -> Results:
    """Return the latest results, checked against their schema."""
    return Results.model_validate_json((runs / "reports" / "latest" / "results.json").read_text())


def manifests(runs: Path, kind: str) -> list[dict[str, Any]]:
    """Return what the cache entries of a step were made of."""
    return [json.loads(path.read_text()) for path in sorted((runs / "cache" / kind).glob("*/manifest.json"))]
