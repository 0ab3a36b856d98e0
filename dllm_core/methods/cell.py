"""A finished cell: a directory with weights, config, tokenizer and `cell.json`.

cell = load_cell(directory)
input_ids = cell.tokenizer("My fellow citizens,", return_tensors="pt").input_ids
out = cell.generate(input_ids, generation_config=DiffusionGenerationConfig(max_new_tokens=64))
print(cell.tokenizer.decode(out.sequences[0]))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dllm_core.backbone.backbone import read_contract
from dllm_core.backbone.conversion import copy_tokenizer
from dllm_core.methods.cell_file import CellInfo, read_cell, stored_options, write_cell_file
from dllm_core.methods.protocol import Method
from dllm_core.methods.registry import room_method

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    info = CellInfo(
        cell=cell,
        method=room,
        options=method.options.model_dump(mode="json"),
        seed=seed,
        summary=dict(summary or {}),
        contract=read_contract(target).model_dump(),
    )
    write_cell_file(info, target)
    return target


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
    options = stored_options(info, path)
    dtype = dtype or _stored_dtype(path)
    method = room_method(info.method).from_pretrained(path, options, dtype=dtype, device=device)
    method.directory = path
    method.eval()
    return method


def _stored_dtype(path: Path) -> torch.dtype:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
