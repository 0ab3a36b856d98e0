"""What every step function is given beside its spec: where to write, what to reuse, whom to tell."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from steps.cache import StepCache
from steps.progress import LINE_EVERY_S, Progress

ROOT = Path(__file__).resolve().parents[1]

Listener = Callable[[str, dict[str, Any]], None]


def default_runs_dir() -> Path:
    """Return `DLLM_RUNS` when set, else `runs/` of this repository."""
    return Path(os.environ.get("DLLM_RUNS") or ROOT / "runs").absolute()


@dataclass
class Context:
    """The surroundings of a step; a plain object, never stored as an artifact.

    Attributes:
        run_id: the grid run; a resumed run keeps the id of the run it resumes.
        runs_dir: cache, checkpoints, reports and the tracking store live below it.
        use_cache: False builds everything again (what this run itself built is still found).
        device: `auto`, `cpu` or `cuda`, for steps that are not given the whole spec.
        threads: CPU threads, None for the library's choice.
        memory_limit_gb: refuse work that is estimated to need more.
        listeners: called with (row id, record) for each record passed to `record`.
        log: prints one line.
    """

    run_id: str = "local"
    runs_dir: Path = field(default_factory=default_runs_dir)
    use_cache: bool = True
    device: str = "auto"
    threads: int | None = None
    memory_limit_gb: float | None = None
    listeners: list[Listener] = field(default_factory=list)
    log: Callable[[str], None] = field(default=lambda line: print(line, flush=True))

    @cached_property
    def cache(self) -> StepCache:
        """The step cache of this runs directory."""
        return StepCache(self.runs_dir, self.run_id, self.use_cache, self.log)

    def progress(self, name: str, unit: str = "step", every_s: float = LINE_EVERY_S) -> Progress:
        """Return a reporter: call it with (done, total, **values) as often as you like."""
        return Progress(name, unit=unit, every_s=every_s)

    def record(self, row: str, record: dict[str, Any]) -> None:
        """Pass on a record that was just appended to the row's metrics.jsonl (tracker, live curve)."""
        for listener in self.listeners:
            listener(row, record)
