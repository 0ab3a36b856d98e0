"""Every environment variable that the code reads or sets is on the page, and the other way round."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATTERN = re.compile(r"[\"'`]((?:DLLM|METAFLOW|MLFLOW|HF)_[A-Z_]+|NO_COLOR)[\"'`]")
ELSEWHERE = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}


def test_page_and_code_name_the_same_variables() -> None:
    packages = ("dllm_core", "params", "steps", "flows", "benchmarks")
    sources = "\n".join(p.read_text() for name in packages for p in (ROOT / name).rglob("*.py"))
    in_code = set(re.findall(r"\b((?:DLLM|METAFLOW|MLFLOW|HF)_[A-Z]+(?:_[A-Z]+)*|NO_COLOR)\b", sources))
    in_page = set(PATTERN.findall((ROOT / "docs" / "environment.md").read_text()))
    assert in_code - in_page == set(), "add to docs/environment.md"
    assert in_page - in_code - ELSEWHERE == set(), "remove from docs/environment.md"
