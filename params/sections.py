"""The sections of a grid's settings, as frozen pydantic models. Reading them imports no torch.

Every field carries its meaning and unit in the docstring below it; `docs` and `--dry-run` are made from those.
Relations between settings are checked once, when the spec is built, so that no step has to check them again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from params.base import (
    Dtype,
    Fraction,
    HalfOpen,
    Int,
    MaskRatio,
    Natural,
    NonNegative,
    OpenFraction,
    Positive,
    PositiveInt,
    Settings,
)
from params.errors import ParamsError
from params.sweeps import ParallelismSpec, StepSweepSpec


class ScratchSpec(Settings):
    """A small autoregressive model trained in the run itself, so that a grid needs no weights."""

    architecture: Literal["llama", "qwen3", "gpt2"] = "llama"
    """Model family."""
    layers: PositiveInt = 4
    """Transformer blocks."""
    hidden: PositiveInt = 256
    """Width of the residual stream."""
    heads: PositiveInt = 4
    """Attention heads."""
    kv_heads: PositiveInt = 4
    """Key/value heads; must divide `heads`. gpt2 has none of its own: there it equals `heads`."""
    ffn: PositiveInt = 1024
    """Width of the feed-forward layer."""
    vocab: Annotated[Int, Field(ge=300)] = 4096
    """Tokens of the byte-level BPE trained on the grid's own training text (256 bytes and a few specials at least)."""
    steps: PositiveInt = 300
    """Optimiser steps of autoregressive pretraining."""
    batch_size: PositiveInt = 8
    """Sequences a pretraining step."""
    length: Annotated[Int, Field(ge=8)] = 160
    """Tokens a pretraining sequence."""
    lr: Positive = 2e-3
    """Peak learning rate of pretraining."""

    @model_validator(mode="after")
    def _relations(self) -> ScratchSpec:
        if self.hidden % self.heads:
            raise ParamsError(
                f"model.scratch.hidden = {self.hidden} is not a multiple of model.scratch.heads = {self.heads}.",
                "Allowed: hidden = heads x (an even head width).",
            )
        if self.architecture != "gpt2" and (self.hidden // self.heads) % 2:
            raise ParamsError(
                f"model.scratch.hidden / heads = {self.hidden // self.heads} is odd, rotary positions need pairs.",
                "Allowed: hidden = heads x (an even head width).",
            )
        if self.heads % self.kv_heads:
            raise ParamsError(
                f"model.scratch.kv_heads = {self.kv_heads} does not divide model.scratch.heads = {self.heads}.",
                "Allowed: a divisor of heads.",
            )
        if self.architecture == "gpt2" and self.kv_heads != self.heads:
            raise ParamsError(
                f"model.scratch.kv_heads = {self.kv_heads}, but gpt2 has no grouped key/value heads.",
                f"Set model.scratch.kv_heads={self.heads} (= heads), or take architecture llama or qwen3.",
            )
        return self


class ModelSpec(Settings):
    """The autoregressive model that goes in."""

    source: Annotated[str, Field(min_length=1)] = "embedded:smollm2-135m-instruct"
    """`embedded:NAME` (weights from a pip package), a local directory, a hub name, or `scratch`."""
    alignment: Literal["shifted", "same_position"] = "shifted"
    """`shifted`: the hidden state at i-1 predicts token i, as in the autoregressive model; `same_position`: at i."""
    scratch: ScratchSpec | None = None
    """The model to train from scratch; only with `source: scratch`."""

    @model_validator(mode="before")
    @classmethod
    def _scratch_has_defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("source") == "scratch" and data.get("scratch") is None:
            return {**data, "scratch": {}}
        return data

    @model_validator(mode="after")
    def _relations(self) -> ModelSpec:
        if self.scratch is not None and self.source != "scratch":
            raise ParamsError(
                f"model.scratch is set, but model.source = {self.source}.",
                "Set model.source=scratch to train a model from scratch, or model.scratch=null.",
            )
        return self


class DataSpec(Settings):
    """The text that every row trains on and is measured on."""

    source: Annotated[str, Field(min_length=1)] = "embedded:sotu"
    """`embedded:sotu`, `embedded:stdlib`, a .txt / .jsonl / .parquet file, a directory of them, `hf:NAME[:CONFIG]`.
    NAME is a data set of the hub, or a directory laid out like one, which needs no network."""
    split: str | None = None
    """Split of an `hf:` data set; null takes `train`."""
    fields: dict[Literal["text", "prompt", "response", "messages"], str] = Field(default_factory=dict)
    """Our field name -> the file's own, e.g. {prompt: question, response: answer}."""
    layout: Literal["windows", "pack"] = "windows"
    """`windows`: prompt + response of fixed lengths cut inside a document; `pack`: whole documents, packed."""
    prompt_tokens: PositiveInt = 32
    """Tokens of a window that are given: never corrupted, never scored."""
    response_tokens: PositiveInt = 128
    """Tokens of a window that are corrupted, scored and counted in the budget."""
    sequence_length: PositiveInt | None = None
    """Tokens of a packed sequence; needed by `layout: pack`, unused by windows."""
    max_documents: PositiveInt | None = None
    """Read at most this many documents; null reads all."""
    train_sequences: PositiveInt | None = None
    """Keep at most this many training sequences; null keeps all."""
    heldout_sequences: PositiveInt = 64
    """Held-out sequences kept for every measurement."""
    heldout_fraction: OpenFraction = 0.1
    """Part of the documents that is held out; whole documents, never windows."""
    split_seed: Natural = 0
    """Seed of the split by document."""

    @property
    def length(self) -> int:
        """Tokens of one sequence, prompt included."""
        if self.layout == "pack":
            assert self.sequence_length is not None  # checked by _relations
            return self.sequence_length
        return self.prompt_tokens + self.response_tokens

    @model_validator(mode="after")
    def _relations(self) -> DataSpec:
        if self.layout == "pack" and self.sequence_length is None:
            raise ParamsError(
                "data.layout = pack needs data.sequence_length, which is not set.",
                "Set data.sequence_length, e.g. 1024, or data.layout=windows.",
            )
        if self.layout == "windows" and self.sequence_length is not None:
            raise ParamsError(
                f"data.sequence_length = {self.sequence_length}, but data.layout = windows does not use it.",
                "Set data.layout=pack, or data.prompt_tokens and data.response_tokens instead.",
            )
        if self.split is not None and not self.source.startswith("hf:"):
            raise ParamsError(
                f"data.split = {self.split}, but data.source = {self.source} has no splits.",
                "Allowed with hf:NAME only; a held-out part is always cut off by data.heldout_fraction.",
            )
        if "messages" in self.fields and len(self.fields) > 1:
            raise ParamsError(
                f"data.fields maps messages and also {', '.join(sorted(set(self.fields) - {'messages'}))}.",
                "Allowed: text, or prompt and response, or messages.",
            )
        if ("prompt" in self.fields) != ("response" in self.fields):
            raise ParamsError(
                f"data.fields maps {', '.join(sorted(self.fields))}, but prompt and response come together.",
                "Allowed: text, or prompt and response, or messages.",
            )
        return self


class BudgetSpec(Settings):
    """What every row of a grid may spend on training; the other currencies are reported, not held equal."""

    kind: Literal["tokens", "flops", "seconds", "epochs"]
    """`tokens`: response tokens presented to the method; `flops`; `seconds`; `epochs`: passes over the training
    sequences. All are converted into steps before training starts, so that caching and exact resume hold."""
    value: Positive
    """How much of it, for each row and seed."""


def _divisors(number: int, most: int = 64) -> list[int]:
    """Return the divisors up to `most`, and the number itself: more than anybody would choose from."""
    return [*(n for n in range(1, min(number - 1, most) + 1) if number % n == 0), number]


class TrainSpec(Settings):
    """Optimisation; a cell may override single values under its own `train:`."""

    lr: Positive = 1e-4
    """Peak learning rate of AdamW."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate of the cosine schedule / peak."""
    warmup_ratio: HalfOpen = 0.05
    """Part of the steps over which the learning rate rises linearly."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    betas: tuple[HalfOpen, HalfOpen] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    clip_norm: Positive = 1.0
    """Largest global gradient norm."""
    batch_size: PositiveInt = 8
    """Sequences an optimiser step."""
    micro_batch_size: PositiveInt | None = None
    """Sequences a forward pass; null is the whole batch. It changes memory, not the result."""
    dtype: Dtype = "auto"
    """Compute dtype (master weights are fp32 always); auto: bf16 where the device is fast at it."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    freeze: tuple[Literal["embeddings", "mlp"], ...] = ()
    """Parameter groups that are not trained."""
    checkpoint_every_s: Positive = 60.0
    """Seconds between checkpoints inside a training run."""
    log_every_s: Positive = 10.0
    """Seconds between progress lines of training; a terminal shows a bar instead."""
    sample_every_steps: PositiveInt | None = None
    """Steps between samples of generated text; null makes none."""
    steps: PositiveInt | None = None
    """Optimiser steps; instead of a budget."""

    @model_validator(mode="after")
    def _relations(self) -> TrainSpec:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ParamsError(
                f"train.micro_batch_size = {self.micro_batch_size} does not divide "
                f"train.batch_size = {self.batch_size}.",
                f"Allowed: {', '.join(map(str, _divisors(self.batch_size)))}.",
            )
        return self


class AnchorSpec(Settings):
    """The cache of frozen-teacher hidden states."""

    dtype: Literal["bf16", "fp32", "fp8", "int8"] = "bf16"
    """Stored precision; fp8 and int8 carry a scale per token and serve cosine alignment only."""


class EvalSpec(Settings):
    """Measurements on held-out text."""

    nelbo_sequences: PositiveInt = 64
    """Held-out sequences of the NELBO, the block-wise NELBO and the exact likelihood."""
    nelbo_samples: PositiveInt = 64
    """Monte Carlo samples a sequence (short name: `eval.samples`)."""
    block_size: PositiveInt = 32
    """Tokens a block of the block-wise NELBO."""
    mask_ratios: Annotated[tuple[MaskRatio, ...], Field(min_length=1)] = (0.15, 0.5, 0.85)
    """Mask ratios at which accuracy and loss on masked tokens are measured."""
    mask_ratio_sequences: PositiveInt = 64
    """Held-out sequences of that measurement."""
    frontier_temperatures: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0.7, 1.0)
    """Sampling temperatures of the generative frontier."""
    frontier_samples: PositiveInt = 16
    """Continuations a temperature."""
    frontier_steps: PositiveInt = 32
    """Denoising steps of a continuation."""
    judge: Annotated[str, Field(min_length=1)] = "base"
    """Who scores generated text: `base` (labelled self-judged), a local directory or a hub name."""
    batch_size: PositiveInt = 8
    """Sequences a forward pass."""
    dtype: Dtype = "fp32"
    """Compute dtype of the measurements; auto: bf16 where the device is fast at it."""
    step_sweep: StepSweepSpec | None = None
    """Quality at several numbers of denoising steps; null measures none. `{}` takes the defaults."""
    parallelism: ParallelismSpec | None = None
    """Accuracy against tokens per forward, rule by rule; null measures none. `{}` takes the defaults."""


class BenchSpec(Settings):
    """Decoding speed."""

    new_tokens: PositiveInt = 128
    """Tokens generated a prompt; end-of-text is ignored."""
    prompt_tokens: PositiveInt = 32
    """Tokens of a prompt."""
    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (8, 32)
    """Denoising step counts."""
    rounds: PositiveInt = 8
    """Interleaved rounds over all rows."""
    warmup_rounds: Natural = 1
    """Rounds before those, not counted."""
    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    """Prompts decoded together."""

    @model_validator(mode="after")
    def _relations(self) -> BenchSpec:
        if max(self.steps) > self.new_tokens:
            raise ParamsError(
                f"bench.steps = {max(self.steps)} is more than bench.new_tokens = {self.new_tokens}: "
                "a step accepts at least one token.",
                f"Allowed: at most {self.new_tokens}.",
            )
        return self


class RuntimeSpec(Settings):
    """Where the run happens."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is one."""
    threads: PositiveInt | None = None
    """CPU threads; null leaves it to torch."""
    memory_limit_gb: Positive | None = None
    """Refuse a run that is estimated to need more GB; null takes what the machine has free."""
