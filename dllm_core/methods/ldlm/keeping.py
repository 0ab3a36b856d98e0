"""Writing a trained LDLM and reading it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dllm_core.backbone.contract import read_contract
from dllm_core.errors import ContractError
from dllm_core.methods.ldlm.base import Base
from dllm_core.methods.ldlm.options import Options
from dllm_core.training.ema import Ema

if TYPE_CHECKING:
    from dllm_core.methods.ldlm.method import Method

WEIGHTS = "ldlm.safetensors"
PROMPT_MODEL = "prompt_backbone"
FORMAT_VERSION = 1

M = TypeVar("M", bound="Method")


def save(method: Method, directory: Path) -> None:
    """Write the averaged weights, the frozen embeddings, statistics, the time density and config.json.

    With `prompt_encoder: backbone` the language model is copied too, since generating needs it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach() for n, t in method.state_dict().items() if not n.startswith("ema.")}
    for name, average in method.ema.averages().items():
        tensors[f"networks.{name}"] = average
    save_file({n: t.to("cpu").contiguous().clone() for n, t in tensors.items()}, directory / WEIGHTS)
    config = {
        "model_type": "dllm_ldlm",
        "format_version": FORMAT_VERSION,
        "dtype": "float32",
        "hidden_size": method.base.hidden,
        "num_hidden_layers": method.base.num_layers,
        "eos_token_id": list(method.base.eos_token_ids),
        "latent_dim": method.networks.latent_dim,
        "layer": method.layer,
        "dllm": method.base.contract.model_dump(),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    source, target = method.base.directory, directory / PROMPT_MODEL
    if method.options.prompt_encoder == "backbone" and source is not None and source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)


def load(cls: type[M], directory: Path, options: Options, *, dtype: torch.dtype, device: torch.device | str) -> M:
    """Read what `save` wrote.

    Raises:
        ContractError: not an LDLM, another format, another layer or latent width, or damaged weights.
    """
    contract = read_contract(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    found = (config.get("model_type"), config.get("format_version"))
    if found != ("dllm_ldlm", FORMAT_VERSION):
        raise ContractError(
            f"'{directory}' holds {found[0]} in format {found[1]}, not an LDLM in format {FORMAT_VERSION}.",
            "Give the directory of a trained ldlm cell.",
        )
    wanted = {
        "latent_dim": options.sizes.latent(config["hidden_size"]),
        "layer": options.layer_name(config["num_hidden_layers"]),
    }
    for name, value in wanted.items():
        if config[name] != value:
            raise ContractError(
                f"The LDLM in '{directory}' was trained with {name} = {config[name]}, but {value} was asked for.",
                "Load it with its own options (cell.json), or train the cell again.",
            )
    with_model = directory / PROMPT_MODEL
    base = Base(
        contract=contract,
        num_layers=config["num_hidden_layers"],
        eos_token_ids=tuple(config["eos_token_id"]),
        hidden=config["hidden_size"],
        directory=with_model if with_model.is_dir() else None,
    )
    method = cls(None, options, base=base)
    try:
        missing, unexpected = method.load_state_dict(load_file(directory / WEIGHTS), strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ContractError(
            f"The weights in '{directory}' do not fit their options: {_cause(error)}",
            "Load the cell with its own options, or train it again.",
        ) from error
    lacking = [n for n in missing if not n.startswith("ema.")]
    if lacking or unexpected:
        raise ContractError(
            f"The weights in '{directory}' lack {lacking[:3]} and have {list(unexpected)[:3]} besides.",
            "Load the cell with its own options, or train it again.",
        )
    method.ema = Ema({}, 0.0)  # what was written are the averages: no second copy of them
    statistics = method.mean_D, method.std_D
    method.to(device=device, dtype=dtype)
    # in bf16 the mean of a dimension far from zero would be off by a good part of its deviation
    method.mean_D, method.std_D = (values.to(device) for values in statistics)
    return method.eval()


def _cause(error: Exception) -> str:
    """Return the first line that says something: torch begins with a heading."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[1] if len(lines) > 1 else lines[0]).strip()[:200]
