"""Writing a trained cell whose networks are the room's own, and reading it again.

A directory holds `ROOM.safetensors` (the averaged weights, the frozen embeddings, statistics), `config.json` with the
contract and what the loader requires of the options, and `prompt_backbone/`, the language model, where generating
needs one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dllm_core.backbone.contract import read_contract
from dllm_core.errors import ContractError
from dllm_core.methods.frozen_base import Base
from dllm_core.methods.requirements import BaseShape

if TYPE_CHECKING:
    from dllm_core.methods.latent_method import LatentMethod
    from dllm_core.methods.latent_options import LatentOptions

PROMPT_MODEL = "prompt_backbone"
OWN_OPTIONS = "Load the cell with its own options (cell.json), or train it again."

M = TypeVar("M", bound="LatentMethod")


@dataclass(frozen=True)
class CellForm:
    """How a room writes its cells.

    Attributes:
        room: name of the room; the weights are ROOM.safetensors, the model type is dllm_ROOM.
        called: the same in a sentence.
        training_alone: beginnings of names in the state that a finished cell does without.
        version: of the format.
        added: names of tensors that came later; a cell that was saved without them loads as if they were zero.
    """

    room: str
    called: str
    training_alone: tuple[str, ...]
    version: int = 1
    added: tuple[str, ...] = ()

    @property
    def weights(self) -> str:
        """Name of the file of weights."""
        return f"{self.room}.safetensors"

    @property
    def model_type(self) -> str:
        """What config.json says."""
        return f"dllm_{self.room}"


def save(method: LatentMethod, directory: Path) -> None:
    """Write weights, averaged ones where there are averages, config.json and the language model that prompts need."""
    form, base = method.FORM, method.base
    directory.mkdir(parents=True, exist_ok=True)
    tensors = without(method.state_dict(), form.training_alone)
    if int(method.ema.num_updates):
        tensors |= {f"{method.AVERAGED}.{name}": value for name, value in method.ema.averages().items()}
    write_tensors(tensors, directory / form.weights)
    config = {
        "model_type": form.model_type,
        "format_version": form.version,
        "dtype": "float32",
        "hidden_size": base.hidden,
        "num_hidden_layers": base.num_layers,
        "eos_token_id": list(base.eos_token_ids),
        **method.options.facts(base.shape),
        "dllm": base.contract.model_dump(),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if method.options.keeps_language_model:
        target = directory / PROMPT_MODEL
        if base.directory is not None:
            keep_language_model(base.directory, target)
        elif method.prompt_reader.model is not None:
            method.prompt_reader.model.save_pretrained(target)


def load(cls: type[M], directory: Path, options: LatentOptions, *, dtype: torch.dtype, device: torch.device | str) -> M:
    """Read what `save` wrote.

    Raises:
        ContractError: another room's cell, another format, other options, or damaged weights.
    """
    form, contract = cls.FORM, read_contract(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    found = (config.get("model_type"), config.get("format_version"))
    if found != (form.model_type, form.version):
        raise ContractError(
            f"'{directory}' holds {found[0]} in format {found[1]}, not {form.called} in format {form.version}.",
            f"Give the directory of a trained {form.room} cell.",
        )
    hidden, num_layers = config["hidden_size"], config["num_hidden_layers"]
    shape = BaseShape(hidden=hidden, layers=num_layers, vocab=contract.num_tokens, parameters=0)
    require_same(config, options.facts(shape), directory)
    with_model = directory / PROMPT_MODEL
    base = Base(
        contract=contract,
        num_layers=num_layers,
        eos_token_ids=tuple(config["eos_token_id"]),
        hidden=hidden,
        directory=with_model if with_model.is_dir() else None,
    )
    method = cls(None, options, base=base)
    path = directory / form.weights
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise misfit(path, str(error)) from error
    own = method.state_dict()
    tensors = {name: torch.zeros_like(own[name]) for name in form.added} | tensors
    load_weights(method, tensors, path, form.training_alone)
    method.drop_averages()
    method.to(device=device, dtype=dtype)
    # in bf16 the mean of a dimension far from zero would be off by a good part of its deviation
    method.mean_D, method.std_D = (tensors[name].float().to(device) for name in ("mean_D", "std_D"))
    return method.eval()


# -- pieces, for a room that keeps the rest in its own way ----------------------------------------------------------


def without(state: Mapping[str, Tensor], beginnings: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors whose names begin otherwise."""
    return {name: value for name, value in state.items() if not name.startswith(beginnings)}


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors from wherever they are, each with memory of its own."""
    save_file({n: t.detach().to("cpu").contiguous().clone() for n, t in tensors.items()}, path, metadata=metadata)


def require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], directory: Path) -> None:
    """Compare what a cell was trained with and what it is loaded as.

    Raises:
        ContractError: they differ.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ContractError(
                f"The cell in '{directory}' was trained with {name} = {found.get(name)}, but {value} was asked for.",
                "Load it with its own options (cell.json) and its own base model, or train the cell again.",
            )


def load_weights(method: nn.Module, tensors: Mapping[str, Tensor], path: Path, elsewhere: tuple[str, ...]) -> None:
    """Put tensors into a method, all that it has but those that begin with `elsewhere`, and no others.

    Raises:
        ContractError: names or shapes differ.
    """
    try:
        missing, unexpected = method.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise misfit(path, str(error)) from error
    lacking = [n for n in missing if not n.startswith(elsewhere)]
    strange = [*unexpected, *(n for n in tensors if n.startswith(elsewhere))]
    if lacking or strange:
        raise misfit(path, f"lacking {lacking[:3]}, besides {strange[:3]}")


def misfit(path: Path, cause: str) -> ContractError:
    """Return the error of weights that do not fit, with the first line of the cause that says something."""
    lines = cause.strip().splitlines() or ["unreadable"]
    told = lines[1] if len(lines) > 1 else lines[0]  # torch begins with a heading
    return ContractError(f"The weights in '{path}' do not fit their options: {told.strip()[:200]}", OWN_OPTIONS)


def keep_language_model(source: Path, target: Path) -> None:
    """Put a language model's files into a cell: linked where the file system can, else copied."""
    if source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True, copy_function=_link)


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
