"""The wiring of a grid in plain functions: what the flow's steps call, and what runs without Metaflow as well."""

from steps.grid.finish import benchmark, closing_lines, report
from steps.grid.rows import RowOutcome, attempt, collect, failed_rows, killed_outcome, merge, repair
from steps.grid.run import GridRun, Prepared, open_run, prepare, prepare_anchors, prepare_trajectories, stage

__all__ = [
    "GridRun",
    "Prepared",
    "RowOutcome",
    "attempt",
    "benchmark",
    "closing_lines",
    "collect",
    "failed_rows",
    "killed_outcome",
    "merge",
    "open_run",
    "prepare",
    "prepare_anchors",
    "prepare_trajectories",
    "repair",
    "report",
    "stage",
]
