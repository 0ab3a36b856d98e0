"""Whether the disk holds what a grid writes, some of which may lie in the step cache from an earlier run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from dllm_core.data.anchor_files import DISK_RESERVE_BYTES
from dllm_core.errors import ResourceError
from steps.costs import GridCost

_KINDS = {"converted model": "model", "trained cells": "train_cell", "anchors": "anchors-store"}
"""What the estimate names -> the kind of cache entry that it becomes."""


def nearest(path: Path) -> Path:
    """Return the directory itself, or the nearest one above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def disk_check(cost: GridCost, runs_dir: Path | str | None) -> tuple[ResourceError | None, str]:
    """Compare what a run may write with what is free.

    Without a lookup of every step, which may need a trained cell first, nobody knows what the cache will give. So a
    run is refused when it cannot fit even if all that lies there is its own, and told when it may not fit.

    Returns:
        (what stops the run, a line to tell); None and "" when there is nothing of the kind.
    """
    if runs_dir is None:
        return None, ""
    free = shutil.disk_usage(nearest(Path(runs_dir))).free
    spare = DISK_RESERVE_BYTES if "anchors" in cost.disk else 0
    need = cost.total_disk + spare
    if need <= free:
        return None, ""
    reusable = _reusable(cost.disk, Path(runs_dir) / "cache")
    if need - reusable <= free:
        return None, (
            f"disk: up to {need / 1e9:.1f} GB (estimate) and {free / 1e9:.1f} GB free; it fits only if the step cache "
            f"has {(need - free) / 1e9:.1f} GB of it already"
        )
    largest = max(cost.disk, key=lambda name: cost.disk[name])
    stays = f", {spare / 1e9:.1f} GB stay free beside the anchors" if spare else ""
    return (
        ResourceError(
            f"The run needs about {need / 1e9:.1f} GB of disk (estimate; {largest} "
            f"{cost.disk[largest] / 1e9:.1f} GB{stays}), {free / 1e9:.1f} GB are free in '{runs_dir}'.",
            "Free some (python -m steps.cache gc --keep 20GB), set DLLM_RUNS to another disk, or lower the budget.",
        ),
        "",
    )


def _reusable(disk: Mapping[str, float], cache: Path) -> float:
    """Return bytes of the estimate that the cache may hold, with what is needed only to make them."""
    found = {name: min(disk.get(name, 0.0), _size(cache / kind)) for name, kind in _KINDS.items()}
    there = {name for name, size in found.items() if size >= 0.9 * disk.get(name, 0.0)}  # it is an estimate
    checkpoints = disk.get("checkpoints", 0.0) if "trained cells" in there else 0.0
    spare = DISK_RESERVE_BYTES if "anchors" in disk and "anchors" in there else 0
    return sum(found.values()) + checkpoints + spare


def _size(directory: Path) -> float:
    return float(sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()))
