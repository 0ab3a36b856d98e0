"""Finding cells: those of the latest run by name, any other by its path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dllm_core.errors import DllmError, did_you_mean
from dllm_core.methods.cell_file import CELL_FILE, CellInfo, read_cell, stored_options

if TYPE_CHECKING:
    from dllm_core.methods.requirements import Capabilities

Kind = Literal["ar", "unmasking", "latent"]
"""How a cell writes: token by token, by filling in masks, or from latents."""

_LATEST = Path("reports") / "latest" / "cells"
_ORDER: tuple[Kind, ...] = ("ar", "unmasking", "latent")
_START = "Finish a run first (python flows/compare_grid.py run), or say where one is: --runs-dir DIRECTORY."


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A finished cell that has not been loaded.

    Attributes:
        name: of its directory in the run, or of the cell where it was given by a path.
        directory: what `load_cell` takes.
        info: what its `cell.json` says.
        capabilities: of its room with these options.
    """

    name: str
    directory: Path
    info: CellInfo
    capabilities: Capabilities

    @property
    def kind(self) -> Kind:
        if self.capabilities.causal:
            return "ar"
        return "unmasking" if self.capabilities.unmasking else "latent"


def default_runs_dir() -> Path:
    """Return `DLLM_RUNS` where it is set; else `runs/` here, or in the checkout that this file lies in."""
    if told := os.environ.get("DLLM_RUNS"):
        return Path(told)
    here, checkout = Path("runs"), Path(__file__).resolve().parents[2] / "runs"
    return here if here.is_dir() or not checkout.is_dir() else checkout


def cells_of(runs_dir: Path) -> Path:
    """Return the directory with the cells of the latest run.

    Args:
        runs_dir: a runs directory, or the directory of one run's report.

    Raises:
        DllmError: no finished run is there.
    """
    for found in (runs_dir / _LATEST, runs_dir / "cells"):
        if found.is_dir():
            return found
    raise DllmError(f"There is no finished run in '{runs_dir}'.", _START)


def names_in(cells_dir: Path) -> list[str]:
    """Return the names of the finished cells in a directory.

    Raises:
        DllmError: there are none, or what they linked to is gone.
    """
    found = sorted(p.name for p in cells_dir.iterdir() if (p / CELL_FILE).is_file())
    if found:
        return found
    if any(p.is_symlink() for p in cells_dir.iterdir()):
        raise DllmError(f"The cells that '{cells_dir}' links to have been removed from the step cache.", _START)
    raise DllmError(f"The run in '{cells_dir}' finished no cell.", _START)


def is_cell(word: str) -> bool:
    """Whether a word is the path of a finished cell."""
    return (Path(word) / CELL_FILE).is_file()


def find(word: str, runs_dir: Path) -> Cell:
    """Return the cell of a name in the latest run, or of a path.

    A cell that was trained with several seeds is found by its own name too: the first seed is taken.

    Raises:
        DllmError: no such cell.
    """
    if is_cell(word):
        return _read(Path(word), None)
    cells_dir = cells_of(runs_dir)
    names = names_in(cells_dir)
    name = word if word in names else next(iter(_seeds_of(word, names)), None)
    if name is None:
        raise DllmError(f"Unknown cell '{word}' in '{cells_dir}'.", did_you_mean(word, names))
    return _read(cells_dir / name, name)


def every_cell(runs_dir: Path) -> list[Cell]:
    """Return the cells of the latest run, reference rows first, latent ones last; of several seeds the first.

    Raises:
        DllmError: no finished run, or one without cells.
    """
    cells_dir = cells_of(runs_dir)
    first: dict[str, Cell] = {}
    for name in _by_seed(names_in(cells_dir)):
        cell = _read(cells_dir / name, name)
        first.setdefault(cell.info.cell, cell)
    return sorted(first.values(), key=lambda cell: (_ORDER.index(cell.kind), cell.name))


def first_unmasking(runs_dir: Path) -> Cell:
    """Return the cell that is meant where none is named: the first that fills in masks, else the first of all."""
    cells = every_cell(runs_dir)
    return next((cell for cell in cells if cell.kind == "unmasking"), cells[0])


def _seeds_of(cell: str, names: list[str]) -> list[str]:
    return [name for name in _by_seed(names) if re.fullmatch(rf"{re.escape(cell)}-seed\d+", name)]


def _by_seed(names: list[str]) -> list[str]:
    def seed(name: str) -> int:
        found = re.search(r"-seed(\d+)$", name)
        return int(found[1]) if found else 0

    return sorted(names, key=lambda name: (seed(name), name))


def _read(directory: Path, name: str | None) -> Cell:
    info = read_cell(directory)
    capabilities = stored_options(info, directory).capabilities()
    return Cell(name=name or info.cell, directory=directory, info=info, capabilities=capabilities)
