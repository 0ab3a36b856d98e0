"""Read the text, split it by document, tokenise it, cut it into training and held-out sequences."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_core.backbone.identity import tokenizer_identity
from dllm_core.data.fingerprint import source_fingerprint
from params.schema import GridSpec
from steps.context import Context

if TYPE_CHECKING:
    from dllm_core.data.preparation import PreparedData
    from steps.prepare_model import ModelArtifact

KEYS_FILE = "keys.json"
LIBRARIES = ("tokenizers", "transformers")


@dataclass(frozen=True)
class DataArtifact:
    """The tokenised text, on disk.

    Attributes:
        train_dir: training sequences (`SequenceSet.load`).
        heldout_dir: held-out sequences.
        keys_file: JSON list of the training sequences' keys, readable without torch.
        fingerprint: hash of both sets.
        train_fingerprint: hash of the training set alone.
        num_train: training sequences.
        num_heldout: held-out sequences.
        mean_response_tokens: response tokens per training sequence.
        length: tokens of a sequence.
        unigram_nats_per_token: held-out loss of add-one smoothed training frequencies, in nats per response token.
        kind: `text`, `prompt+response` or `messages`.
        num_documents: documents read.
        num_tokens: tokens of all documents.
        train_available: training sequences before the cap.
        hit: found in the step cache.
        origin: run that prepared it.
        seconds: what preparing it took.
    """

    train_dir: str
    heldout_dir: str
    keys_file: str
    fingerprint: str
    train_fingerprint: str
    num_train: int
    num_heldout: int
    mean_response_tokens: float
    length: int
    unigram_nats_per_token: float
    kind: str
    num_documents: int
    num_tokens: int
    train_available: int
    hit: bool
    origin: str
    seconds: float


def prepare_data(spec: GridSpec, model: ModelArtifact, ctx: Context) -> DataArtifact:
    """Prepare the text of a grid for the model's tokenizer.

    Args:
        spec: the grid's settings; `data` is read.
        model: whose tokenizer and vocabulary size are used.
        ctx: run context.

    Raises:
        DataError, MissingExtraError: the text cannot be read or holds too little; see `dllm_core.data`.
    """

    def build(payload: Path, _: Path) -> dict[str, Any]:
        prepared = _prepare(spec, model, ctx)
        prepared.train.save(payload / "train")
        prepared.heldout.save(payload / "heldout")
        (payload / KEYS_FILE).write_text(json.dumps(list(prepared.train.keys)))
        return _facts(prepared)

    entry = ctx.cache.get_or_build(
        "prepare_data",
        {"data": spec.data.model_dump(mode="json", exclude={"source"}), "num_tokens": model.num_tokens},
        inputs={"text": source_fingerprint(spec.data.source), "tokenizer": tokenizer_identity(model.path)},
        roots=["steps.prepare_data"],
        libraries=LIBRARIES,
        build=build,
        label=spec.data.source,
    )
    return DataArtifact(
        train_dir=str(entry.path / "train"),
        heldout_dir=str(entry.path / "heldout"),
        keys_file=str(entry.path / KEYS_FILE),
        hit=entry.hit,
        origin=entry.origin,
        seconds=entry.seconds,
        **entry.result,
    )


def _prepare(spec: GridSpec, model: ModelArtifact, ctx: Context) -> PreparedData:
    from transformers import AutoTokenizer

    from dllm_core.data.preparation import LayoutSettings, prepare_sequences, take_enough
    from dllm_core.data.records import read_records

    data = spec.data
    names = ("layout", "prompt_tokens", "response_tokens", "sequence_length", "train_sequences")
    names += ("heldout_sequences", "heldout_fraction", "split_seed")
    settings = LayoutSettings(**{name: getattr(data, name) for name in names})
    records = read_records(data.source, split=data.split, fields=data.fields, max_documents=data.max_documents)
    taken = take_enough(records, settings) if data.source.startswith("hf:") else list(records)
    progress = ctx.progress("prepare_data", unit="document")
    prepared = prepare_sequences(
        taken,
        AutoTokenizer.from_pretrained(model.path, local_files_only=True),
        settings,
        num_tokens=model.num_tokens,
        on_progress=lambda done, total: progress(done, total),
    )
    _report(prepared, settings.heldout_sequences, ctx)
    return prepared


def _report(prepared: PreparedData, wanted: int, ctx: Context) -> None:
    ctx.log(
        f"data: {prepared.num_documents:,} documents, {prepared.num_tokens:,} tokens; "
        f"{len(prepared.train):,} of {prepared.train_available:,} training sequences and "
        f"{len(prepared.heldout):,} of {prepared.heldout_available:,} held-out ones are used"
    )
    if prepared.num_truncated:
        ctx.log(f"data: {prepared.num_truncated:,} records were cut to the length of a sequence")
    if len(prepared.heldout) < wanted:
        ctx.log(f"data: {wanted} held-out sequences were asked for, the text gives {len(prepared.heldout)}")


def _facts(prepared: PreparedData) -> dict[str, Any]:
    import hashlib

    from dllm_core.data.preparation import unigram_nats

    train, heldout = prepared.train, prepared.heldout
    return {
        "fingerprint": hashlib.sha256(f"{train.fingerprint}/{heldout.fingerprint}".encode()).hexdigest(),
        "train_fingerprint": train.fingerprint,
        "num_train": len(train),
        "num_heldout": len(heldout),
        "mean_response_tokens": train.mean_response_tokens,
        "length": train.length,
        "unigram_nats_per_token": unigram_nats(train.token_counts, heldout.token_counts),
        "kind": prepared.kind,
        "num_documents": prepared.num_documents,
        "num_tokens": prepared.num_tokens,
        "train_available": prepared.train_available,
    }
