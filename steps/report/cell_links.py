"""Readable paths to the finished cells of a run: reports/<run>/cells/<row>, each of which `load_cell` takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dllm_core.backbone.contract import read_contract
from dllm_core.methods.cell_file import CellInfo, write_cell_file

if TYPE_CHECKING:
    from steps.report.build import RowResult


def link_cells(directory: Path, rows: Sequence[RowResult], base_dir: Path | None) -> None:
    """Link every finished row's cell, and make one of the base model for rows that are only measured.

    Links are relative, so that a runs directory can be moved as a whole.

    Args:
        directory: the report's `cells/`; made, and cleared of these rows.
        rows: of the run.
        base_dir: the converted base model; None where it is not known.
    """
    directory.mkdir(exist_ok=True)
    for row in rows:
        target = directory / row.row_id
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            shutil.rmtree(target)
        if row.cell_dir is not None:
            _link(target, Path(row.cell_dir))
        elif row.status == "ok" and not row.trained and base_dir is not None and base_dir.is_dir():
            _reference_cell(target, row, base_dir)


def _link(link: Path, target: Path) -> None:
    link.symlink_to(os.path.relpath(target, link.parent.resolve()))


def _reference_cell(directory: Path, row: RowResult, base_dir: Path) -> None:
    """Write a cell whose weights are the base model's: links to its files, and the `cell.json` that they lack."""
    directory.mkdir()
    for path in sorted(base_dir.iterdir()):
        _link(directory / path.name, path)
    info = CellInfo(
        cell=row.name,
        method=row.method,
        options=row.options,
        seed=row.seed,
        summary={},
        contract=read_contract(base_dir).model_dump(),
    )
    write_cell_file(info, directory)
