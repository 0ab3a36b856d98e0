"""Writing a trained VFM and reading it again. The base model is a checkpoint of its own; the rest lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from dllm_core.backbone.contract import read_contract
from dllm_core.errors import ContractError
from dllm_core.methods.latent_keeping import (
    keep_language_model,
    load_weights,
    require_same,
    without,
    write_tensors,
)
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
    write_tensors(without(method.state_dict(), _ELSEWHERE), directory / WEIGHTS, _facts(method))
    source = method.prompt_reader.directory
    if method.options.keeps_language_model and source is not None:
        keep_language_model(source, directory / LANGUAGE_MODEL)


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
    require_same(found, _facts(method), directory)
    load_weights(method, tensors, path, _ELSEWHERE)
    method.directory = directory
    method.to(device=device, dtype=dtype)
    # bf16 would put a state's mean off by whole standard deviations where the two are far apart
    method.mean_D, method.std_D = (tensors[name].float().to(device) for name in ("mean_D", "std_D"))
    return method.eval()
