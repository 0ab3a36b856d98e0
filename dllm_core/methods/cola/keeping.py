"""Writing a trained cola cell and reading it again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dllm_core.backbone.contract import read_contract
from dllm_core.errors import ContractError
from dllm_core.methods.cola.options import Options
from dllm_core.methods.ldlm.base import Base

if TYPE_CHECKING:
    from dllm_core.methods.cola.model import Model

WEIGHTS = "cola.safetensors"
PROMPT_MODEL = "prompt_backbone"
FORMAT_VERSION = 1
_TRAINING_ALONE = ("average.", "reference.", "gathered_")

M = TypeVar("M", bound="Model")


def save(method: Model, directory: Path) -> None:
    """Write weights (of the prior the averages), the frozen head, statistics, config.json and the language model.

    The language model reads prompts; its files are linked where the file system can, else copied.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach() for n, t in method.state_dict().items() if not n.startswith(_TRAINING_ALONE)}
    if int(method.average.num_updates):
        tensors |= {f"networks.prior.{name}": value for name, value in method.average.averages().items()}
    save_file({n: t.to("cpu").contiguous().clone() for n, t in tensors.items()}, directory / WEIGHTS)
    config = {
        "model_type": "dllm_cola",
        "format_version": FORMAT_VERSION,
        "dtype": "float32",
        "hidden_size": method.base.hidden,
        "num_hidden_layers": method.base.num_layers,
        "eos_token_id": list(method.base.eos_token_ids),
        "latent_dim": method.networks.latent_dim,
        "layer": method.layer,
        "block_size": method.options.block_size,
        "dllm": method.base.contract.model_dump(),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    target = directory / PROMPT_MODEL
    if method.base.directory is not None and method.base.directory.resolve() != target.resolve():
        shutil.copytree(method.base.directory, target, dirs_exist_ok=True, copy_function=_link)
    elif method.language_model is not None and method.base.directory is None:
        method.language_model.save_pretrained(target)


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def load(cls: type[M], directory: Path, options: Options, *, dtype: object, device: object) -> M:
    """Read what `save` wrote.

    Raises:
        ContractError: not a cola cell, another format, another layer, latent width or block size, or damaged weights.
    """
    contract = read_contract(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    found = (config.get("model_type"), config.get("format_version"))
    if found != ("dllm_cola", FORMAT_VERSION):
        raise ContractError(
            f"'{directory}' holds {found[0]} in format {found[1]}, not a cola cell in format {FORMAT_VERSION}.",
            "Give the directory of a trained cola cell.",
        )
    wanted = {
        "latent_dim": options.sizes.latent_dim,
        "layer": options.layer_name(config["num_hidden_layers"]),
        "block_size": options.block_size,
    }
    for name, value in wanted.items():
        if config[name] != value:
            raise ContractError(
                f"The cell in '{directory}' was trained with {name} = {config[name]}, but {value} was asked for.",
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
            f"The weights in '{directory}' do not fit their options: {str(error).splitlines()[0][:200]}",
            "Load the cell with its own options, or train it again.",
        ) from error
    lacking = [n for n in missing if not n.startswith(_TRAINING_ALONE)]
    if lacking or unexpected:
        raise ContractError(
            f"The weights in '{directory}' lack {lacking[:3]} and have {list(unexpected)[:3]} besides.",
            "Load the cell with its own options, or train it again.",
        )
    return method.to(device=device, dtype=dtype).eval()  # type: ignore[call-overload]
