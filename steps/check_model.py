"""Is the model there, can it be converted, and how large is it? Reads config.json alone; imports no torch."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from dllm_core.backbone.contract import read_contract
from dllm_core.backbone.families import check_config
from dllm_core.backbone.sources import read_config, resolve, tokenizer_files
from dllm_core.errors import DllmError, UnsupportedModelError
from params.schema import ModelSpec, ScratchSpec
from steps.estimates import ModelShape

HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of the model before anything is loaded.

    Attributes:
        source: as the user named it.
        shape: its sizes.
        found: in words, where the sizes come from.
        local: its weights need no download.
    """

    source: str
    shape: ModelShape
    found: str
    local: bool


_SMOLLM2 = ModelShape(
    family="llama",
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    ffn=1_536,
    vocab=49_152,
    positions=8_192,
)
_QWEN3_1_7B = ModelShape(
    family="qwen3",
    layers=28,
    hidden=2_048,
    heads=16,
    kv_heads=8,
    head_dim=128,
    ffn=6_144,
    vocab=151_936,
    positions=40_960,
)
# sizes that cannot be read from a config.json: packed as GGUF, or on a hub that a dry run does not ask
_KNOWN = {
    "embedded:smollm2-135m-instruct": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2,
    "Qwen/Qwen3-1.7B": _QWEN3_1_7B,
    "Qwen/Qwen3-0.6B": replace(_QWEN3_1_7B, hidden=1_024, ffn=3_072),
}


def check_model(spec: ModelSpec, *, dry_run: bool = False) -> ModelFacts:
    """Find the model and its sizes.

    Args:
        spec: `model:` of the grid.
        dry_run: a known hub model that cannot be reached is a fact to print, not an error.

    Raises:
        DllmError: no such model.
        UnsupportedModelError: not a causal language model, not of a supported family, or without weights or tokenizer.
        ContractError: a converted checkpoint with another alignment, or a mask token without a row.
        MissingExtraError: an embedded model whose package is not installed.
    """
    source = spec.source
    if spec.scratch is not None:
        return ModelFacts(source=source, shape=_scratch_shape(spec.scratch), found="trained in this run", local=True)
    if source.startswith("embedded:"):
        resolve(source)
        return ModelFacts(source=source, shape=_KNOWN[source], found="weights in an installed package", local=True)
    path = Path(source).expanduser()
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        directory = resolve(source).path  # complains about what is no model directory, without asking the hub
        config = read_config(directory)
        if "dllm" in config:
            contract = read_contract(directory)
            contract.require(alignment=spec.alignment)
            contract.require_rows(int(config.get("vocab_size", 0)))
        if not tokenizer_files(directory):
            raise UnsupportedModelError(
                f"'{source}' holds no tokenizer.", "Copy the tokenizer's files (tokenizer.json and others) into it."
            )
        return _facts(config, source, "its config.json", local=True)
    return _hub(source, dry_run)


def _scratch_shape(scratch: ScratchSpec) -> ModelShape:
    return ModelShape(
        family=scratch.architecture,
        layers=scratch.layers,
        hidden=scratch.hidden,
        heads=scratch.heads,
        kv_heads=scratch.kv_heads,
        head_dim=scratch.hidden // scratch.heads,
        ffn=scratch.ffn,
        vocab=scratch.vocab,
        positions=2_048,
        tied=True,
    )


def _facts(config: Mapping[str, Any], source: str, found: str, *, local: bool) -> ModelFacts:
    check_config(config, source)
    try:
        shape = ModelShape.from_config(config)
    except KeyError as error:
        raise UnsupportedModelError(
            f"The config.json of '{source}' has no {error}.", "Download or save the model again."
        ) from None
    return ModelFacts(source=source, shape=shape, found=found, local=local)


def _hub(source: str, dry_run: bool) -> ModelFacts:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json")
    local = isinstance(cached, str)
    if not local and dry_run and source in _KNOWN:
        return ModelFacts(source=source, shape=_KNOWN[source], found="known sizes; to be downloaded", local=False)
    if not local:
        try:
            _reach_hub()
            cached = hf_hub_download(source, "config.json", etag_timeout=HUB_TIMEOUT_S)
        except Exception as error:  # the hub raises a dozen kinds, and all mean that the model is not to be had
            cause = str(error).strip().splitlines() or [""]
            raise DllmError(
                f"Model '{source}' is no directory here, and not to be had from the hub "
                f"({type(error).__name__}: {cause[0][:100]}).",
                "Check the name and the network, give a directory with --model PATH, or use "
                "--model embedded:smollm2-135m-instruct.",
            ) from None
    config = json.loads(Path(str(cached)).read_text(encoding="utf-8"))
    return _facts(config, source, "config.json of the hub", local=local)


def _reach_hub() -> None:
    """Raise OSError at once where there is no network; the hub's client would retry for half a minute."""
    if any(name.lower() in ("https_proxy", "http_proxy", "all_proxy") and value for name, value in os.environ.items()):
        return  # only the proxy can tell
    address = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    socket.create_connection((address.hostname or "", port), timeout=HUB_TIMEOUT_S).close()
