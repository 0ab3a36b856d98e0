"""A finished cell: a directory with weights, config, tokenizer and `cell.json`.

cell = load_cell(directory)
input_ids = cell.tokenizer("My fellow citizens,", return_tensors="pt").input_ids
out = cell.generate(input_ids, generation_config=DiffusionGenerationConfig(max_new_tokens=64))
print(cell.tokenizer.decode(out.sequences[0]))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dllm_core.backbone.backbone import read_contract
from dllm_core.backbone.conversion import copy_tokenizer
from dllm_core.errors import ContractError, DllmError
from dllm_core.methods.protocol import Method
from dllm_core.methods.registry import room_method, room_options

FORMAT_VERSION = 1
CELL_FILE = "cell.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def save_cell(
    method: Method,
    directory: Path | str,
    *,
    cell: str,
    room: str,
    seed: int,
    tokenizer_dir: Path | str,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write a finished cell and return its directory. `cell.json` comes last: without it there is no cell.

    Args:
        method: the trained method.
        directory: made when it is not there.
        cell: name of the cell.
        room: name of the method's room.
        seed: of the run.
        tokenizer_dir: where the base model's tokenizer lies.
        summary: what training reported, JSON-able.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    method.save_pretrained(target)
    copy_tokenizer(tokenizer_dir, target)
    content = {
        "format_version": FORMAT_VERSION,
        "cell": cell,
        "method": room,
        "options": method.options.model_dump(mode="json"),
        "seed": seed,
        "summary": dict(summary or {}),
        "contract": read_contract(target).model_dump(),
    }
    (target / CELL_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return target


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


def load_cell(
    directory: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    expect: Mapping[str, Any] | None = None,
) -> Method:
    """Load a finished cell for measuring or generating, in evaluation mode.

    Args:
        directory: what `save_cell` wrote.
        dtype: of the weights; None keeps the stored type.
        device: of the weights.
        expect: contract fields that the caller relies on.

    Raises:
        DllmError: not a finished cell, or options that its room does not know.
        ContractError: weights and `cell.json` disagree, or do not meet `expect`.
    """
    info, path = read_cell(directory), Path(directory)
    contract = read_contract(path)
    contract.require(**info.contract)
    contract.require(**(expect or {}))
    try:
        options = room_options(info.method)(**info.options)
    except ValidationError as error:
        raise DllmError(
            f"The options in '{path / CELL_FILE}' do not fit the method '{info.method}': {error.errors()[0]['msg']}.",
            "Load it with the release that wrote it, or train the cell again.",
        ) from error
    dtype = dtype or _stored_dtype(path)
    method = room_method(info.method).from_pretrained(path, options, dtype=dtype, device=device)
    method.directory = path
    method.eval()
    return method


def _stored_dtype(path: Path) -> torch.dtype:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
