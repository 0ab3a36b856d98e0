"""`cell.json`: what a finished cell says of itself. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dllm_core.errors import ContractError, DllmError
from dllm_core.methods.registry import room_options
from dllm_core.methods.requirements import RoomOptions

FORMAT_VERSION = 1
CELL_FILE = "cell.json"


@dataclass(frozen=True, kw_only=True)
class CellInfo:
    """What `cell.json` says.

    Attributes:
        cell: name of the cell in its grid.
        method: name of its room.
        options: the room's options, JSON-able.
        seed: of the run.
        summary: what training reported; free form.
        contract: the contract the weights were written under.
    """

    cell: str
    method: str
    options: dict[str, Any]
    seed: int
    summary: dict[str, Any]
    contract: dict[str, Any]


def write_cell_file(info: CellInfo, directory: Path | str) -> None:
    """Write `cell.json`, which makes a directory with weights, config and tokenizer a finished cell."""
    content = {"format_version": FORMAT_VERSION, **asdict(info)}
    (Path(directory) / CELL_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_cell(directory: Path | str) -> CellInfo:
    """Read `cell.json`.

    Raises:
        DllmError: there is none, or it cannot be read.
        ContractError: it was written in another format.
    """
    path = Path(directory) / CELL_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DllmError(
            f"'{directory}' is no finished cell: it holds no {CELL_FILE}.", "Give the directory of a trained cell."
        ) from error
    except ValueError as error:
        raise DllmError(f"'{path}' is damaged: {error}.", "Train the cell again, or restore the file.") from error
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ContractError(
            f"'{path}' has format_version {version!r}, but {FORMAT_VERSION} was expected.",
            "Load it with the release that wrote it, or train the cell again.",
        )
    try:
        return CellInfo(**content)
    except TypeError as error:
        raise DllmError(f"'{path}' is damaged: {error}.", "Train the cell again, or restore the file.") from error


def stored_options(info: CellInfo, directory: Path | str) -> RoomOptions:
    """Return the options of a cell as its room validates them.

    Args:
        info: of `read_cell`.
        directory: it was read from.

    Raises:
        DllmError: no such room, or options that it does not know.
    """
    try:
        return room_options(info.method)(**info.options)
    except ValidationError as error:
        raise DllmError(
            f"The options in '{Path(directory) / CELL_FILE}' do not fit the method '{info.method}': "
            f"{error.errors()[0]['msg']}.",
            "Load it with the release that wrote it, or train the cell again.",
        ) from error
