"""Loading a causal model with transformers: local files, no remote code, nothing missing, no progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from dllm_core.errors import UnsupportedModelError


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' bars inside the context, and leave the setting as it was."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def load_causal_lm(
    directory: Path | str, *, dtype: torch.dtype | str = "auto", attn_implementation: str = "sdpa"
) -> Any:
    """Load a `*ForCausalLM` in evaluation mode from a directory.

    Args:
        directory: config and weights.
        dtype: of the weights; "auto" keeps the stored one.
        attn_implementation: transformers' name; `sdpa` or `eager`.

    Raises:
        UnsupportedModelError: weights that are missing, damaged, or do not fit the config.
    """
    with no_progress_bars():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(directory),
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:
            # safetensors, torch and transformers each have their own ways to say that a file is broken
            raise UnsupportedModelError(
                f"The model in '{directory}' cannot be loaded: {str(error).splitlines()[0][:200]}",
                "The files are incomplete or damaged; fetch or write them again.",
            ) from error
    model, report = loaded
    wrong = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if wrong:
        raise UnsupportedModelError(
            f"The weights in '{directory}' do not fit their config: {', '.join(wrong[:3])}.",
            "The files are incomplete, or the config belongs to another model; fetch or write them again.",
        )
    return model.eval()
