"""Commit orders of responses: at which forward a decoder committed each token. B batch, L length.

One small file per sequence holds one step per token, O(L); ranks inside a training block are taken when it is known
how large the block is (`dllm_core.corruption.masks.ranks_in_block`), so that one extraction serves every block size
(arXiv:2601.07568 stores O(L) snapshots of L).
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dllm_core.errors import StoreError

FORMAT_VERSION = 1
NOT_RESPONSE = -1


def trajectory_identity(**origin: object) -> str:
    """Return the SHA-256 of what orders depend on: who decoded, with which tokenizer, template and settings.

    Args:
        origin: JSON-able values by name.
    """
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()


class TrajectoryStore:
    """Commit orders below one directory, all of one mode and origin.

    Args:
        root: directory; made by the first write.
        mode: where orders come from (`student`, `ar_difficulty`, `left_to_right`, `random`).
        identity: `trajectory_identity` of the origin.

    Raises:
        StoreError: the directory holds orders of another mode or origin.
    """

    def __init__(self, root: Path, *, mode: str, identity: str) -> None:
        self.root = Path(root)
        self.mode = mode
        self.identity = identity
        self._kept: dict[str, tuple[Tensor, str]] = {}

    @classmethod
    def found(cls, directory: Path) -> TrajectoryStore:
        """Return the store that lies somewhere below a directory, whatever its mode and origin.

        Raises:
            StoreError: no order is there, orders of several extractions are, or one cannot be read.
        """
        files = {path.parents[1]: path for path in Path(directory).rglob("*.safetensors")}
        if not files:
            raise StoreError(
                f"There are no commit orders in '{directory}'.",
                "Give the directory of extracted ones, such as runs/cache/trajectories.",
            )
        if len(files) > 1:
            raise StoreError(
                f"Commit orders of {len(files)} extractions lie in '{directory}'.",
                f"Give one of them, such as {min(files)}.",
            )
        [(root, file)] = files.items()
        metadata, _ = _read(file)
        return cls(root, mode=metadata["mode"], identity=metadata["identity"])

    def stored_keys(self) -> list[str]:
        """Return the keys of all sequences with an order."""
        return sorted(path.stem for path in self.root.glob("*/*.safetensors"))

    def path(self, key: str) -> Path:
        """Return where the order of a sequence lies or would lie."""
        return self.root / key[:2] / f"{key}.safetensors"

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return the keys that have no order yet, in the given order, without repeats.

        Raises:
            StoreError: an order has another mode or origin.
        """
        absent = []
        for key in dict.fromkeys(keys):
            if self.path(key).exists():
                self._load(key)
            else:
                absent.append(key)
        return absent

    def write(self, key: str, commit_step_L: Tensor, response_L: Tensor) -> None:
        """Keep the order of one sequence; the file appears whole or not at all.

        Args:
            key: the sequence key.
            commit_step_L: integer; the forward (from 0) that committed the token, `NOT_RESPONSE` elsewhere.
            response_L: bool; the sequence's response tokens.
        """
        assert commit_step_L.dim() == 1
        assert commit_step_L.shape == response_L.shape
        assert torch.equal(commit_step_L >= 0, response_L), "exactly the response tokens have a commit step"
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format_version": FORMAT_VERSION,
            "key": key,
            "mode": self.mode,
            "identity": self.identity,
            "response": _response_hash(response_L),
        }
        # one entry, since safetensors writes several in random order
        tensors, header = {"commit_step_L": commit_step_L.to(torch.int32).contiguous()}, json.dumps(metadata)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with temporary.open("wb") as handle:
                handle.write(save(tensors, {"trajectory": header}))
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        self._kept.pop(key, None)

    def read(self, keys: Sequence[str], response_BL: Tensor | None = None) -> Tensor:
        """Return commit steps, int32 [B, L], `NOT_RESPONSE` where a token is no response.

        Args:
            keys: sequence keys.
            response_BL: the rows' response tokens; given, they must be those the orders were extracted for.

        Raises:
            StoreError: an order is missing, damaged, or was extracted for something else.
        """
        orders = [self._load(key) for key in keys]
        if response_BL is not None:
            for key, (_, found), response_L in zip(keys, orders, response_BL, strict=True):
                if found != _response_hash(response_L):
                    raise StoreError(
                        f"The commit order of sequence {key[:12]} was extracted for other response tokens.",
                        "Prompt and response were split differently then: extract the trajectories again.",
                    )
        return torch.stack([commit_step_L for commit_step_L, _ in orders])

    def _load(self, key: str) -> tuple[Tensor, str]:
        if key not in self._kept:
            self._kept[key] = self._load_file(key)
        return self._kept[key]

    def _load_file(self, key: str) -> tuple[Tensor, str]:
        path = self.path(key)
        if not path.exists():
            raise StoreError(
                f"There is no commit order for sequence {key[:12]} in {self.root}.",
                "Extract the trajectories of the sequences that are trained on first.",
            )
        metadata, commit_step_L = _read(path)
        expected = {"format_version": FORMAT_VERSION, "key": key, "mode": self.mode, "identity": self.identity}
        for name, value in expected.items():
            if metadata.get(name) != value:
                raise StoreError(
                    f"The commit order of sequence {key[:12]} has {name} {metadata.get(name)!r}, "
                    f"but {value!r} was asked for.",
                    f"Extract the trajectories again, or use a directory other than {self.root}.",
                )
        return commit_step_L, metadata["response"]


def _read(path: Path) -> tuple[dict[str, Any], Tensor]:
    try:
        with safe_open(path, framework="pt") as chunk:
            metadata = json.loads((chunk.metadata() or {})["trajectory"])
            return metadata, chunk.get_tensor("commit_step_L").clone()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            f"The commit order {path} is damaged: {error}.", "Delete the file and extract the trajectories again."
        ) from error


def _response_hash(response_L: Tensor) -> str:
    return hashlib.sha256(response_L.to("cpu", torch.uint8).contiguous().numpy().tobytes()).hexdigest()
