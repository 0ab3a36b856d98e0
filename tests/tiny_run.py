"""A finished run of tiny untrained cells, one of each kind of row, laid out as the report leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.conversion import convert
from dllm_core.methods.cell import save_cell
from dllm_core.methods.registry import room_method, room_options
from steps.report.build import RowResult
from steps.report.cell_links import link_cells
from tests import cola_tools, ldlm_tools, vfm_tools
from tests.tiny import write_source

TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "ar_tuned": ("ar", {"tuned": True}),
    "random_mask": ("random_mask", {}),
    "repr_align_all": ("repr_align", {"layers": [0, 2]}),
    "repr_align_trajectory": ("trajectory", {"block_sizes": [4, 8], "mode": "random"}),
    "block_causal": ("block_causal", {"block_size": 8}),
    "ldlm": ("ldlm", {"shape": ldlm_tools.SHAPE, "start": "random"}),
    "vfm": ("vfm", {"shape": vfm_tools.SHAPE, "rollout_steps": 3}),
    "cola": ("cola", {"shape": cola_tools.SHAPE, "block_size": 4}),
}
ROWS = ("ar", *TRAINED)
MASK_ROWS = ("random_mask", "repr_align_all", "repr_align_trajectory", "block_causal")
LATENT_ROWS = ("ldlm", "vfm", "cola")


def write_run(root: Path) -> Path:
    """Write a run and return its runs directory; the cells lie in `reports/latest/cells`."""
    base = root / "model"
    convert(write_source(root / "source", layers=4, max_length=256), base, alignment="shifted")
    rows = [RowResult("ar", "ar", "ar", 0, "ok", False, options={"tuned": False})]
    for name, (room, options) in TRAINED.items():
        directory = root / "cells" / name
        _save(base, directory, name, room, options)
        rows.append(RowResult(name, name, room, 0, "ok", True, cell_dir=str(directory)))
    report = root / "runs" / "reports" / "latest"
    report.mkdir(parents=True)
    link_cells(report / "cells", rows, base)
    return root / "runs"


def _save(base: Path, directory: Path, name: str, room: str, options: dict[str, Any]) -> None:
    given = room_options(room)(**options)
    torch.manual_seed(len(name))
    if name in LATENT_ROWS:
        method = room_method(room).from_base(base, given, device="cpu")
        with torch.no_grad():  # also the weights that start at zero
            for parameter in method.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        if hasattr(method, "start_averages"):
            method.start_averages()
    else:
        method = room_method(room)(Backbone.from_pretrained(base), given)
        with torch.no_grad():
            for parameter in method.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    save_cell(method, directory, cell=name, room=room, seed=0, tokenizer_dir=base)
