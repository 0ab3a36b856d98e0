"""Writing a trained VFM and reading it again. The base model is a checkpoint of its own; the rest lies beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dllm_core.backbone.contract import read_contract
from dllm_core.errors import ContractError
from dllm_core.methods.vfm.options import Options

if TYPE_CHECKING:
    from dllm_core.methods.vfm.method import Method

WEIGHTS = "vfm.safetensors"
LANGUAGE_MODEL = "language_model"
FORMAT = "dllm_vfm 1"
_ELSEWHERE = ("backbone.", "teacher.")

M = TypeVar("M", bound="Method")


def _facts(method: Method) -> dict[str, str]:
    options = method.options
    return {
        "format": FORMAT,
        "freeze_base": str(options.freeze_base),
        "prompt": options.prompt,
        "reads": method.layer,
        "hidden_size": str(method.backbone.hidden_size),
    }


def save(method: Method, directory: Path) -> None:
    """Write everything but the base model, and the frozen language model where generating needs a copy of it."""
    tensors = {n: t.detach() for n, t in method.state_dict().items() if not n.startswith(_ELSEWHERE)}
    kept = {n: t.to("cpu").contiguous().clone() for n, t in tensors.items()}
    save_file(kept, directory / WEIGHTS, metadata=_facts(method))
    source = method.language_model
    if method.options.reads_states and not method.options.freeze_base and source is not None:
        target = directory / LANGUAGE_MODEL
        if target.resolve() != source.resolve():
            shutil.copytree(source, target, dirs_exist_ok=True)


def load(cls: type[M], directory: Path, options: Options, *, dtype: torch.dtype, device: torch.device | str) -> M:
    """Read what `save` wrote.

    Raises:
        ContractError: not a VFM, another format, other sizes, another base model, or damaged weights.
    """
    from dllm_core.backbone.backbone import Backbone

    read_contract(directory)
    path = directory / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ContractError(
            f"'{directory}' holds no readable {WEIGHTS}: {str(error).splitlines()[0][:200]}",
            "Give the directory of a trained vfm cell.",
        ) from error
    beside = directory / LANGUAGE_MODEL
    backbone = Backbone.from_pretrained(directory, dtype=dtype, device=device)
    method = cls(backbone, options, language_model=beside if beside.is_dir() else None)
    for name, value in _facts(method).items():
        if found.get(name) != value:
            raise ContractError(
                f"The VFM in '{directory}' was written with {name} = {found.get(name)}, but {value} was asked for.",
                "Load it with its own options (cell.json) and its own base model, or train the cell again.",
            )
    own = {n: t for n, t in method.state_dict().items() if not n.startswith(_ELSEWHERE)}
    wrong = sorted(n for n in own.keys() | tensors.keys() if n not in own or n not in tensors)
    wrong += sorted(n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape)
    if wrong:
        raise ContractError(
            f"The weights in '{path}' do not fit their options: {', '.join(wrong[:3])}.",
            "Load the cell with its own options, or train it again.",
        )
    method.load_state_dict(tensors, strict=False)
    method.directory = directory
    method.to(device=device, dtype=dtype)
    # bf16 would put a state's mean off by whole standard deviations where the two are far apart
    method.mean_D, method.std_D = (tensors[name].float().to(device) for name in ("mean_D", "std_D"))
    return method.eval()
