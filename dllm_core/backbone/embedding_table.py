"""The token embeddings of a converted checkpoint, read without building the model. V vocabulary rows, D hidden."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_core.backbone.families import check_config
from dllm_core.errors import UnsupportedModelError

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_embedding(directory: Path | str) -> Tensor:
    """Return the input embedding [V, D] as stored; reads that one tensor and nothing else.

    Args:
        directory: a converted checkpoint, in one file or in shards.

    Raises:
        UnsupportedModelError: an unsupported family, or a file that is missing or damaged.
    """
    folder = Path(directory)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = check_config(config, str(directory))
    name = f"{family.base}.{family.embeddings[0]}.weight"
    try:
        file = _ONE_FILE
        if not (folder / file).exists():
            file = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"][name]
        with safe_open(folder / file, framework="pt") as tensors:
            table: Tensor = tensors.get_tensor(name)
            return table
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UnsupportedModelError(
            f"The embeddings '{name}' cannot be read from '{directory}': {str(error).splitlines()[0][:200]}",
            "The files are incomplete or damaged; convert the model again.",
        ) from error
