"""The tokenizer that lies beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_core.errors import DllmError


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
