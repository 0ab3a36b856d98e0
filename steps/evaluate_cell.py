"""Measure one row on held-out text: likelihood or its bounds, masked accuracy, generated text. Cached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_core.backbone.identity import model_identity, tokenizer_identity
from steps.machine import probe
from steps.row_options import options_of

if TYPE_CHECKING:
    from dllm_core.evals.evaluate import EvalSettings
    from dllm_core.evals.judge import Judge
    from dllm_core.methods.protocol import Method, Resources
    from dllm_core.methods.requirements import AnchorNeed, RoomOptions
    from params.schema import GridSpec, RowSpec
    from steps.cache_anchors import AnchorArtifact
    from steps.context import Context
    from steps.prepare_data import DataArtifact
    from steps.prepare_model import ModelArtifact
    from steps.train_cell import TrainedCell

LIBRARIES = ("torch", "transformers", "safetensors")
ELSEWHERE = {"dtype", "judge", "step_sweep", "parallelism"}
"""Settings of the section that are resolved first, or that another step reads (steps/sweep_cell.py)."""
SEED = 0
"""Of masks, mask counts and sampling. One for all rows and seeds, so that their differences are paired."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured; an artifact.

    Attributes:
        path: metrics.json.
        metrics: its contents.
        key: cache key.
        hit: it came from the cache.
        origin: run that computed it.
        seconds: what computing it took.
    """

    path: str
    metrics: dict[str, Any]
    key: str
    hit: bool
    origin: str
    seconds: float


def weights_dir(trained: TrainedCell | None, model: ModelArtifact) -> Path:
    """Return where a row's weights lie: its own directory, or the base model's for a row that is only measured."""
    return Path(trained.cell_dir if trained is not None and trained.cell_dir else model.path)


def weights_identity(directory: Path, model: ModelArtifact) -> str:
    """Return what a row's weights are known by."""
    return model.identity if directory == Path(model.path) else model_identity(directory)


def load_row(row: RowSpec, directory: Path, model: ModelArtifact, *, dtype: str, device: str) -> Method:
    """Load a row's model in evaluation mode: a finished cell, or the base model in the row's room.

    Raises:
        DllmError: the row's own directory is no finished cell; the base model never stands in for it.
    """
    import torch

    from dllm_core.methods.cell import load_cell
    from dllm_core.methods.registry import room_method

    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    if directory != Path(model.path):
        return load_cell(directory, dtype=torch_dtype, device=device)
    options = options_of(row)
    method = room_method(row.cell.method).from_pretrained(directory, options, dtype=torch_dtype, device=device)
    return method.eval()


def evaluate_cell(
    spec: GridSpec,
    row: RowSpec,
    trained: TrainedCell | None,
    model: ModelArtifact,
    data: DataArtifact,
    ctx: Context,
    anchors: AnchorArtifact | None = None,
) -> Evaluation:
    """Measure a row on held-out text, or find the result.

    Args:
        spec: the grid's settings.
        row: which row.
        trained: its finished cell; None for a row that is only measured.
        model: the base model: judge, and weights of rows without their own.
        data: held-out sequences, and training frequencies for the unigram floor.
        ctx: run context.
        anchors: frozen-teacher states, read by rows whose figures of health need those of held-out sequences; without
            them such rows have no figures of health. A row that is built on another cell reads that cell's states,
            which come with `trained`.
    """
    machine = probe(spec.runtime.device, spec.runtime.threads)
    dtype = machine.dtype(spec.eval.dtype)
    directory = weights_dir(trained, model)
    reference = reference_text(spec, model, data, ctx, dtype, machine.device)
    options = options_of(row)
    need = _heldout_states(options, model)
    if need is not None and need.cell is not None:
        anchors = trained.states if trained is not None else None
    states = anchors if need is not None and anchors is not None and anchors.find(need) is not None else None
    if need is not None and states is None:
        ctx.log(f"{row.row_id}: no states of held-out sequences at hand, so its figures of health are left out")

    def build(payload: Path, work: Path) -> dict[str, Any]:
        resources = None if need is not None and states is None else _resources(states)
        metrics = _measure(spec, row, directory, model, data, resources, ctx, dtype, machine.device, reference)
        (payload / "metrics.json").write_text(json.dumps(metrics, indent=1))
        return metrics

    entry = ctx.cache.get_or_build(
        "evaluate_cell",
        {
            **_fields(spec, dtype, machine.device),
            "method": row.cell.method,
            "options": options.model_dump(mode="json"),
        },
        inputs={
            "weights": weights_identity(directory, model),
            "data": data.fingerprint,
            "judge": judge_identity(spec, model),
            **({} if states is None else {"anchors": f"{states.teacher} {states.dtype}"}),
        },
        roots=["steps.evaluate_cell", f"dllm_core.methods.{row.cell.method}"],
        libraries=LIBRARIES,
        build=build,
        label=row.row_id,
    )
    path = str(entry.path / "metrics.json")
    return Evaluation(path, entry.result, entry.key, entry.hit, entry.origin, entry.seconds)


def _heldout_states(options: RoomOptions, model: ModelArtifact) -> AnchorNeed | None:
    """Return what a room's figures of health read of the frozen teacher's states of held-out sequences."""
    if not options.capabilities().diagnostics:
        return None
    need = options.requirements(model.num_layers).anchors
    return need if need is not None and need.heldout else None


def _resources(anchors: AnchorArtifact | None) -> Resources:
    from dllm_core.methods.protocol import Resources

    return Resources(anchors=None if anchors is None else anchors.open())


def _fields(spec: GridSpec, dtype: str, device: str) -> dict[str, Any]:
    settings = spec.eval.model_dump(mode="json", exclude=ELSEWHERE)
    lengths = {"prompt_tokens": spec.data.prompt_tokens, "response_tokens": spec.data.response_tokens}
    return {"eval": settings, **lengths, "dtype": dtype, "device": device, "seed": SEED}


def judge_identity(spec: GridSpec, model: ModelArtifact) -> str:
    """Return what the judge is known by: weights and tokenizer where they are at hand, else its name."""
    if spec.eval.judge == "base":
        return model.identity
    directory = Path(spec.eval.judge).expanduser()
    if not directory.is_dir():
        return spec.eval.judge
    return f"{model_identity(directory)}/{tokenizer_identity(directory)}"


def settings_of(spec: GridSpec) -> EvalSettings:
    """Return what is measured, and how precisely."""
    from dllm_core.evals.evaluate import EvalSettings

    return EvalSettings(
        **spec.eval.model_dump(exclude=ELSEWHERE),
        prompt_tokens=spec.data.prompt_tokens,
        response_tokens=spec.data.response_tokens,
        seed=SEED,
    )


def judge_of(spec: GridSpec, model: ModelArtifact, dtype: str, device: str) -> Judge:
    """Load the judge: the base model, or another one with a tokenizer of its own."""
    import torch
    from transformers import AutoTokenizer

    from dllm_core.backbone.backbone import Backbone
    from dllm_core.backbone.sources import resolve
    from dllm_core.errors import DllmError
    from dllm_core.evals.judge import BaseJudge, TextJudge

    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    size = spec.eval.batch_size
    if spec.eval.judge == "base":
        return BaseJudge(Backbone.from_pretrained(model.path, dtype=torch_dtype, device=device), batch_size=size)
    location = resolve(spec.eval.judge)
    if location.kind != "directory":
        raise DllmError(
            f"The judge '{spec.eval.judge}' is a GGUF file, which cannot judge.",
            "Set eval.judge to base, a model directory or a hub name.",
        )
    writer = AutoTokenizer.from_pretrained(model.path, local_files_only=True)
    return TextJudge.from_pretrained(
        location.path, writer, dtype=torch_dtype, device=device, batch_size=size, label=spec.eval.judge
    )


def reference_text(
    spec: GridSpec, model: ModelArtifact, data: DataArtifact, ctx: Context, dtype: str, device: str
) -> dict[str, Any]:
    """Return the judge's figures of the held-out continuations; computed once for all rows."""

    def build(payload: Path, work: Path) -> dict[str, Any]:
        from dllm_core.corruption.noise import NoiseSource
        from dllm_core.data.sequences import SequenceSet
        from dllm_core.evals.evaluate import heldout_prompts
        from dllm_core.evals.frontier import reference_statistics

        prompts = heldout_prompts(SequenceSet.load(Path(data.heldout_dir)), settings_of(spec))
        return reference_statistics(judge_of(spec, model, dtype, device), prompts, NoiseSource(SEED))

    wanted = ("frontier_samples", "batch_size")
    fields = _fields(spec, dtype, device)
    entry = ctx.cache.get_or_build(
        "reference_text",
        {**fields, "eval": {k: fields["eval"][k] for k in wanted}},
        inputs={"data": data.fingerprint, "judge": judge_identity(spec, model)},
        roots=["dllm_core.evals.frontier", "dllm_core.evals.evaluate"],
        libraries=LIBRARIES,
        build=build,
        label="held-out text",
    )
    return entry.result


def _measure(
    spec: GridSpec,
    row: RowSpec,
    directory: Path,
    model: ModelArtifact,
    data: DataArtifact,
    resources: Resources | None,
    ctx: Context,
    dtype: str,
    device: str,
    reference: dict[str, Any],
) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from dllm_core.data.sequences import SequenceSet
    from dllm_core.evals.evaluate import evaluate

    if spec.runtime.threads is not None:
        torch.set_num_threads(spec.runtime.threads)
    progress = ctx.progress(row.row_id, unit="view")
    return evaluate(
        load_row(row, directory, model, dtype=dtype, device=device),
        SequenceSet.load(Path(data.heldout_dir)),
        settings_of(spec),
        train_counts_V=SequenceSet.load(Path(data.train_dir)).token_counts,
        judge=judge_of(spec, model, dtype, device),
        reference_text=reference,
        tokenizer=AutoTokenizer.from_pretrained(model.path, local_files_only=True),
        dtype=dtype,
        resources=resources,
        on_progress=lambda done, total, doing: progress(done, total, measuring=doing),
    )
