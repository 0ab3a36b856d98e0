"""Checkpoints as directories `step_00000123/`: complete or absent, never half-written.

A checkpoint is written beside its final name, flushed, its manifest (sizes and SHA-256) last, then renamed. The newest
one whose manifest holds is taken; a damaged one is skipped with a warning.

    tensors.safetensors   fp32 masters, Adam moments, whatever else the method keeps
    state.json            step, counters, recent losses, identity of the settings
    manifest.json         size and SHA-256 of the two
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dllm_core.errors import StoreError
from dllm_core.training.tensor_file import file_digest, sync_directory, write_tensors

FORMAT = 1
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint on disk.

    Attributes:
        path: its directory.
        state: what `state.json` holds.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps finished when it was written."""
        return int(self.state["step"])

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, memory-mapped."""
        with safe_open(self.path / _TENSORS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def checkpoint_path(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return root / f"step_{step:08d}"


def write_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write the checkpoint of a step and remove older ones.

    Args:
        root: directory of the checkpoints; made if missing.
        step: finished optimiser steps.
        tensors: what goes into `tensors.safetensors`.
        state: JSON-able; gets `step` and `format` added.
        keep: newest checkpoints left in place.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = checkpoint_path(root, step)
    temporary = root / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        size, digest = write_tensors(temporary / _TENSORS, tensors)
        text = json.dumps({**state, "step": step, "format": FORMAT})
        _write_text(temporary / _STATE, text)
        files = {_TENSORS: [size, digest], _STATE: [len(text.encode()), file_digest(temporary / _STATE)]}
        _write_text(temporary / _MANIFEST, json.dumps({"format": FORMAT, "files": files}))
        sync_directory(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:  # a full disk must not stay full of half a checkpoint
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(root)
    for old in _newest_first(root)[keep:]:
        shutil.rmtree(old)
    return final


def newest_checkpoint(root: Path, identity: str | None = None) -> Checkpoint | None:
    """Return the newest valid checkpoint below `root`, or None. Remains of unfinished writes are removed.

    Args:
        root: directory of the checkpoints; need not exist.
        identity: only checkpoints of these settings count.
    """
    for leftover in root.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in _newest_first(root):
        try:
            found = read_checkpoint(path)
        except StoreError as error:
            _log.warning("Skipped a damaged checkpoint: %s", error.problem)
            continue
        if identity is None or found.state.get("identity") == identity:
            return found
        _log.warning("Skipped checkpoint %s: it was made under other training settings.", path.name)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint after checking sizes and hashes.

    Raises:
        StoreError: it is missing, incomplete or damaged.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in manifest["files"].items():
            if (path / name).stat().st_size != size or file_digest(path / name) != digest:
                raise StoreError(f"{path.name}/{name} does not match its manifest.", "Delete it; an older one is used.")
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{path.name} is no complete checkpoint ({error}).", "Delete it; training restarts."
        ) from error
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{path.name} has checkpoint format {manifest.get('format')}, not {FORMAT}.", "Delete it.")
    return Checkpoint(path, state)


@torch.no_grad()
def load_weights(checkpoint: Checkpoint, network: nn.Module) -> None:
    """Copy the trained weights of a checkpoint into a network; parameters it did not train stay as they are.

    Raises:
        StoreError: the checkpoint trained a parameter that the network does not have.
    """
    own = dict(network.named_parameters())
    for name, value in checkpoint.tensors().items():
        if not name.startswith("param/"):
            continue
        parameter = own.get(name.removeprefix("param/"))
        if parameter is None or parameter.shape != value.shape:
            raise StoreError(f"{checkpoint.path.name} does not fit: {name} is not in the network.", "Train it again.")
        parameter.copy_(value)


def _newest_first(root: Path) -> list[Path]:
    return sorted(root.glob("step_*"), reverse=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
