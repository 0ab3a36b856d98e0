"""The base model every row starts from: found or trained, then converted once. Cached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_core.backbone.identity import model_identity, tokenizer_identity
from dllm_core.backbone.sources import Location, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_core.data.records import Record
    from params.schema import DataSpec, ModelSpec, ScratchSpec
    from steps.context import Context

LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "gguf")
SEED = 0
"""Of new rows, scratch weights and scratch batches: one base model for all rows and seeds of a grid."""
_TOKENIZER_CHARACTERS = 4_000_000
_SCRATCH_DATA_FIELDS = ("split", "fields", "max_documents", "heldout_fraction", "split_seed")


@dataclass(frozen=True, kw_only=True)
class ModelArtifact:
    """The converted base model; an artifact.

    Attributes:
        path: directory with weights, config (contract inside) and tokenizer.
        identity: hash of config and weights.
        tokenizer: hash of the tokenizer's files.
        source: as the user named it.
        family: llama, qwen2, qwen3 or gpt2.
        alignment: `shifted` or `same_position`.
        mask_token_id: of the new mask row.
        num_tokens: real tokens; ids from here on are never predicted.
        num_layers: blocks.
        hidden_size: width of the residual stream.
        num_parameters: a tied head counted once.
        max_length: positions the model has.
        pretrain_nats_per_token: end of the pretraining of a scratch model, else None.
        key: cache key.
        hit: it came from the cache.
        origin: run that made it.
        seconds: what making it took.
    """

    path: str
    identity: str
    tokenizer: str
    source: str
    family: str
    alignment: str
    mask_token_id: int
    num_tokens: int
    num_layers: int
    hidden_size: int
    num_parameters: int
    max_length: int
    pretrain_nats_per_token: float | None
    key: str
    hit: bool
    origin: str
    seconds: float


def prepare_model(spec: ModelSpec, ctx: Context, data: DataSpec | None = None) -> ModelArtifact:
    """Find the base model (or train it), convert and probe it, or find the result.

    Args:
        spec: `model:` of the grid.
        ctx: where to write, what to reuse.
        data: `data:` of the grid; a scratch model is pretrained on its training documents.

    Raises:
        DllmError: no such model, or a damaged file.
        MissingExtraError: an embedded model, or the reader it needs, is not installed.
        UnsupportedModelError: not a causal language model of a supported family.
        ContractError: converted already, with another alignment.
    """
    fields: dict[str, Any] = {"alignment": spec.alignment, "seed": SEED}
    if spec.scratch is not None:
        entry = _from_scratch(spec, spec.scratch, fields, ctx, data)
    else:
        entry = _from_source(spec, fields, ctx)
    result = entry.result
    return ModelArtifact(
        path=str(Path(entry.path) / "model"),
        source=spec.source,
        key=entry.key,
        hit=entry.hit,
        origin=entry.origin,
        seconds=entry.seconds,
        **result,
    )


def _from_source(spec: ModelSpec, fields: dict[str, Any], ctx: Context) -> Any:
    location = resolve(spec.source)

    def build(payload_dir: Path, work_dir: Path) -> dict[str, Any]:
        source = location.path
        if location.kind == "gguf":
            from dllm_core.backbone.gguf import convert_gguf

            ctx.log(f"[prepare_model] unpacking {location.path.name} (once)")
            source = work_dir / "plain"
            convert_gguf(location.path, source, location.sha256)
        return _convert(spec, source, payload_dir, None)

    return ctx.cache.get_or_build(
        "model",
        fields,
        inputs=_inputs(location, ctx),
        roots=["steps.prepare_model"],
        libraries=LIBRARIES,
        build=build,
        label=spec.source,
    )


def _inputs(location: Location, ctx: Context) -> dict[str, str]:
    if location.sha256 is not None:
        return {"gguf": location.sha256}
    ctx.runs_dir.mkdir(parents=True, exist_ok=True)
    memo = ctx.runs_dir / "model_identities.json"
    return {
        "weights": model_identity(location.path, memo=memo),
        "tokenizer": tokenizer_identity(location.path),
    }


def _from_scratch(
    spec: ModelSpec, scratch: ScratchSpec, fields: dict[str, Any], ctx: Context, data: DataSpec | None
) -> Any:
    from dllm_core.data.fingerprint import source_fingerprint

    assert data is not None, "a scratch model is trained on the grid's own text"

    def build(payload_dir: Path, work_dir: Path) -> dict[str, Any]:
        source = work_dir / "plain"
        nats = _train_scratch(scratch, data, source, ctx)
        return _convert(spec, source, payload_dir, nats)

    reads = data.model_dump(mode="json", include=set(_SCRATCH_DATA_FIELDS))
    return ctx.cache.get_or_build(
        "model",
        {**fields, "scratch": scratch.model_dump(mode="json"), "data": reads},
        inputs={"text": source_fingerprint(data.source)},
        roots=["steps.prepare_model"],
        libraries=LIBRARIES,
        build=build,
        label=f"scratch {scratch.architecture}",
    )


def _convert(spec: ModelSpec, source: Path, payload_dir: Path, nats: float | None) -> dict[str, Any]:
    import shutil

    from dllm_core.backbone.backbone import Backbone
    from dllm_core.backbone.conversion import convert

    out = payload_dir / "model"
    contract = convert(source, out, alignment=spec.alignment, seed=SEED)
    backbone = Backbone.from_pretrained(out, expect={"alignment": spec.alignment})
    if source.name == "plain":
        shutil.rmtree(source)
    return {
        "identity": model_identity(out),
        "tokenizer": tokenizer_identity(out),
        "family": backbone.family.model_type,
        "alignment": contract.alignment,
        "mask_token_id": contract.mask_token_id,
        "num_tokens": contract.num_tokens,
        "num_layers": backbone.num_layers,
        "hidden_size": backbone.hidden_size,
        "num_parameters": backbone.num_parameters(),
        "max_length": int(backbone.config.max_position_embeddings),
        "pretrain_nats_per_token": nats,
    }


def _train_scratch(scratch: ScratchSpec, data: DataSpec, directory: Path, ctx: Context) -> float:
    import shutil

    import torch

    from dllm_core.backbone.scratch import build_scratch, pretrain_scratch, train_tokenizer
    from dllm_core.data.records import read_records
    from dllm_core.data.split import split_records

    if ctx.threads:
        torch.set_num_threads(ctx.threads)
    shutil.rmtree(directory, ignore_errors=True)
    read = read_records(data.source, split=data.split, fields=data.fields, max_documents=data.max_documents)
    # held-out documents stay unseen: neither the tokenizer nor the base model may know them
    train, _ = split_records(list(read), heldout_fraction=data.heldout_fraction, seed=data.split_seed)
    num_tokens = train_tokenizer(_texts(train), scratch.vocab, directory)
    build_scratch(scratch.model_dump(), num_tokens, directory, seed=SEED)
    progress = ctx.progress("prepare_model")
    return pretrain_scratch(
        directory,
        _batches(train, directory, scratch),
        scratch.steps,
        scratch.lr,
        on_step=lambda done, total, loss: progress(done, total, loss=loss),
    )


def _texts(records: list[Record]) -> Iterator[str]:
    budget = _TOKENIZER_CHARACTERS
    for record in records:
        turns = [turn["content"] for turn in record.messages or ()]
        text = "\n".join(part for part in (record.text, record.prompt, record.response, *turns) if part)
        yield text[:budget]
        budget -= len(text)
        if budget <= 0:
            return


def _batches(records: list[Record], directory: Path, scratch: ScratchSpec) -> Iterator[Tensor]:
    """Yield ids [B, L] cut at random places out of the documents, which are laid end to end."""
    import torch

    from dllm_core.data.encoding import encode
    from dllm_core.methods.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory)
    wanted = 4 * scratch.steps * scratch.batch_size * scratch.length
    end = torch.tensor([tokenizer.eos_token_id])
    pieces: list[Tensor] = []
    found = 0
    for document in encode(records, tokenizer):
        pieces += [document.ids_T.long(), end]
        found += len(document.ids_T) + 1
        if found >= wanted:
            break
    stream = torch.cat(pieces)
    while len(stream) <= scratch.length:
        stream = torch.cat([stream, stream])
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(scratch.steps):
        starts = torch.randint(0, len(stream) - scratch.length, (scratch.batch_size,), generator=generator)
        yield torch.stack([stream[s : s + scratch.length] for s in starts.tolist()])
