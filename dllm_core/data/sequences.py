"""Tokenised training or held-out sequences, all of one length. N sequences, L length, V vocabulary, B batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.errors import DataError

FORMAT_VERSION = 2
"""2: rows know the document they were cut from."""
_TENSORS_FILE = "sequences.safetensors"
_INFO_FILE = "sequences.json"
_ROW_TENSORS = ("input_ids_NL", "response_NL", "document_NL", "position_NL", "num_bytes_N", "source_N")


@dataclass(frozen=True, eq=False)
class SequenceSet:
    """Rows of prompt and response tokens as they are presented to a method.

    Attributes:
        input_ids_NL: token ids, int32.
        response_NL: bool; tokens that are corrupted, scored and counted. Never padding, never a document's first.
        document_NL: int32; index of the document within its row, -1 for padding.
        position_NL: int32; position within the document, restarting at 0; 0 for padding.
        num_bytes_N: int64; UTF-8 bytes of each row's response tokens (special tokens count none).
        num_tokens: ids 0..num_tokens-1 are the tokenizer's; the length of `token_counts`.
        documents: names of the documents the rows were cut from (before a cap on the number of rows).
        text_counts_V: int64; how often each token occurs as a response token in all rows before a cap; None counts
            those of the rows that are here.
        source_N: int64; index into `documents` of the document a row was cut from (of packed rows: the one with the
            most tokens in it). Rows of one document are no independent sample. None where it is not known.
    """

    input_ids_NL: Tensor
    response_NL: Tensor
    document_NL: Tensor
    position_NL: Tensor
    num_bytes_N: Tensor
    num_tokens: int
    documents: tuple[str, ...] = ()
    text_counts_V: Tensor | None = None
    source_N: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.input_ids_NL.shape
        assert len(shape) == 2, shape
        assert self.response_NL.shape == self.document_NL.shape == self.position_NL.shape == shape
        assert self.num_bytes_N.shape == shape[:1]
        assert self.response_NL.dtype == torch.bool
        assert self.source_N is None or self.source_N.shape == shape[:1]
        may_not_respond_NL = (self.document_NL < 0) | (self.position_NL == 0)
        assert not bool((self.response_NL & may_not_respond_NL).any()), "padding or a first token marked as response"

    def __len__(self) -> int:
        return self.num_sequences

    @property
    def num_sequences(self) -> int:
        """Rows in the set."""
        return self.input_ids_NL.shape[0]

    @property
    def length(self) -> int:
        """Positions per row, padding included."""
        return self.input_ids_NL.shape[1]

    @cached_property
    def num_response_N(self) -> Tensor:
        """Response tokens of each row, int64."""
        return self.response_NL.sum(dim=1)

    @cached_property
    def num_response_tokens(self) -> int:
        """Response tokens of the whole set: what one epoch costs of a token budget."""
        return int(self.num_response_N.sum())

    @property
    def mean_response_tokens(self) -> float:
        """Response tokens per row."""
        return self.num_response_tokens / max(1, self.num_sequences)

    @cached_property
    def token_counts(self) -> Tensor:
        """How often each token id is a response token, int64 [V]: `text_counts_V` where it is given."""
        if self.text_counts_V is not None:
            return self.text_counts_V
        return torch.bincount(self.input_ids_NL[self.response_NL].long(), minlength=self.num_tokens)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """SHA-256 of each row's ids, document boundaries and positions: keys of anchors and trajectories."""
        return tuple(
            sequence_key(ids, document, position)
            for ids, document, position in zip(self.input_ids_NL, self.document_NL, self.position_NL, strict=True)
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything a method can see of the set."""
        digest = hashlib.sha256(json.dumps([FORMAT_VERSION, list(self.input_ids_NL.shape), self.num_tokens]).encode())
        for name, tensor in self._tensors().items():
            digest.update(name.encode())
            digest.update(_raw(tensor))
        return digest.hexdigest()

    def groups(self, sample_ids: Iterable[int]) -> tuple[int, ...] | None:
        """Return the document of each named row, None where documents are not known: what standard errors go by."""
        if self.source_N is None:
            return None
        return tuple(int(self.source_N[sample]) for sample in sample_ids)

    def batch(self, presented: Sequence[tuple[int, int]]) -> Batch:
        """Return the rows named by (sample id, epoch), in that order."""
        sample_ids = tuple(int(sample) for sample, _ in presented)
        index_B = torch.tensor(sample_ids, dtype=torch.long)
        return Batch(
            input_ids_BL=self.input_ids_NL[index_B].long(),
            response_BL=self.response_NL[index_B],
            document_BL=self.document_NL[index_B].long(),
            position_BL=self.position_NL[index_B].long(),
            sample_ids=sample_ids,
            epochs=tuple(int(epoch) for _, epoch in presented),
            sequence_keys=tuple(self.keys[sample] for sample in sample_ids),
        )

    def batch_of(self, sample_ids: Iterable[int]) -> Batch:
        """Return the rows `sample_ids` in their first epoch."""
        return self.batch([(sample, 0) for sample in sample_ids])

    def select(self, sample_ids: Sequence[int]) -> SequenceSet:
        """Return the named rows, in that order, as a set of their own."""
        index_N = torch.tensor(list(sample_ids), dtype=torch.long)
        rows = {name: tensor[index_N] for name in _ROW_TENSORS if (tensor := getattr(self, name)) is not None}
        return replace(self, **rows)

    def head(self, count: int) -> SequenceSet:
        """Return the first `count` rows (all of them when there are fewer)."""
        return self.select(range(min(count, self.num_sequences)))

    def save(self, directory: Path) -> None:
        """Write the set into `directory`, which is made when it is not there."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self._tensors().items()}, directory / _TENSORS_FILE)
        info = {
            "format_version": FORMAT_VERSION,
            "num_tokens": self.num_tokens,
            "fingerprint": self.fingerprint,
            "documents": list(self.documents),
        }
        (directory / _INFO_FILE).write_text(json.dumps(info, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> SequenceSet:
        """Read what `save` wrote.

        Raises:
            DataError: files are missing, damaged, or of another format version.
        """
        directory = Path(directory)
        try:
            info = json.loads((directory / _INFO_FILE).read_text())
            tensors = load_file(directory / _TENSORS_FILE)
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(f"Cannot read the sequences in {directory}: {error}.", "Prepare the data again.") from error
        if info.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"The sequences in {directory} have format {info.get('format_version')}, not {FORMAT_VERSION}.",
                "Prepare the data again.",
            )
        loaded = cls(**tensors, num_tokens=info["num_tokens"], documents=tuple(info["documents"]))
        if loaded.fingerprint != info["fingerprint"]:
            raise DataError(
                f"The sequences in {directory} are damaged: fingerprint {loaded.fingerprint[:12]}, "
                f"expected {info['fingerprint'][:12]}.",
                "Delete the directory and prepare the data again.",
            )
        return loaded

    def _tensors(self) -> dict[str, Tensor]:
        names = (*_ROW_TENSORS, "text_counts_V")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}


def sequence_key(input_ids_L: Tensor, document_L: Tensor, position_L: Tensor) -> str:
    """Return the SHA-256 (hex) of a row's ids, document boundaries and positions.

    The same ids cut into other documents give another key, since the teacher's states differ.
    """
    digest = hashlib.sha256(len(input_ids_L).to_bytes(8, "little"))
    for row in (input_ids_L, document_L, position_L):
        digest.update(_raw(row.to(torch.int32)))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
