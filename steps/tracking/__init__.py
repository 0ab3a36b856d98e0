"""MLflow as a mirror: `metrics.jsonl` is the truth, and no tracker fault ever stops a run.

One parent run per grid, one nested child per row and attempt. MLflow is imported by the thread that talks to it, so
neither training nor a cache hit waits for it. `python -m steps.tracking ui` opens the browser UI.
"""

from steps.tracking.row import RowTracker, numbers, read_metrics
from steps.tracking.store import TrackingRef, finish_grid, open_grid, touch_grid, tracking_uri

__all__ = [
    "RowTracker",
    "TrackingRef",
    "finish_grid",
    "numbers",
    "open_grid",
    "read_metrics",
    "touch_grid",
    "tracking_uri",
]
