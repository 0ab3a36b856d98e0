"""The tokenizer that lies beside a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dllm_core.errors import DllmError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, and the generation config that names the end-of-sequence ids.

    Raises:
        DllmError: `source` holds no tokenizer.
    """
    found = [name for name in FILES if (source / name).is_file()]
    if not any(name.startswith(("tokenizer", "vocab")) for name in found):
        raise DllmError(f"'{source}' holds no tokenizer.", "Give the directory of the converted base model.")
    for name in found:
        shutil.copyfile(source / name, target / name)


def load_tokenizer(directory: Path | None) -> Any:
    """Load a transformers tokenizer from local files.

    Raises:
        DllmError: no directory, or no tokenizer in it.
    """
    if directory is None:
        raise DllmError("This model was built in memory and has no tokenizer.", "Load a finished cell with load_cell.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DllmError(
            f"'{directory}' holds no tokenizer that can be loaded.", "Copy the base model's tokenizer files into it."
        ) from error
