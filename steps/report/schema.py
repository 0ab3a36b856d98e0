"""Schema of results.json. docs/results_schema.md describes it for readers; a test keeps the two together.

Version policy: a new optional field raises the minor number; a renamed, removed or re-defined one the major number.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dllm_core.evals.intervals import Verdict

SCHEMA_VERSION = "1.3"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Estimate(_Part):
    """A measured value and its standard error."""

    value: float
    se: float | None = Field(
        default=None, description="standard error, clustered by held-out document; null if there is one"
    )


class TrainResult(_Part):
    """What training a row did."""

    steps: int
    final_loss: float | None = Field(default=None, description="mean total loss of the last steps, nats; not a bound")
    tokens_per_s: float | None = Field(default=None, description="response tokens per second of training time")
    curve: list[dict[str, float]] = Field(default_factory=list, description="thinned loss curve: step, loss, ce")
    health: dict[str, list[tuple[float, float]]] = Field(
        default_factory=dict, description="thinned curves of what is logged as *_accuracy or *_mse: (step, value)"
    )


class CostResult(_Part):
    """What the row cost, every budget unit side by side, shared work charged to each row that reads it."""

    response_tokens: float = Field(description="response tokens presented to the method")
    positions: float = Field(description="token positions forwarded, views and doubled layouts included")
    flops: float = Field(description="training FLOPs, teacher included")
    teacher_flops: float = Field(description="FLOPs of the frozen teacher for what this row reads")
    train_s: float = Field(description="wall time of training, seconds")
    extraction_s: float = Field(
        description="wall time of what this row reads (anchors, trajectories) and is built on, seconds, stand-alone"
    )
    peak_memory_gb: float | None = None
    trainable_params: int
    new_params: int = Field(description="parameters the base did not have")


class StepSweepResult(_Part):
    """Quality at several numbers of denoising steps; keys are steps, `ar` for rows that write token by token."""

    frontier: dict[str, list[dict[str, Any]]] = Field(description="generated text, one entry a temperature")
    infill: dict[str, dict[str, Any]] = Field(description="a stretch of held-out text taken out and filled in again")
    infill_context: str | None = Field(default=None, description="what the row saw around the gap")
    infill_absent: str | None = Field(default=None, description="why nothing was filled in")
    infill_sequences: int
    batch_size: int = Field(description="texts decoded together")


class CurvePoint(_Part):
    """One setting of a rule."""

    setting: float
    accuracy: Estimate = Field(description="share of tokens that equal the held-out ones")
    tokens_per_forward: Estimate


class ParallelismCurve(_Part):
    """Accuracy against tokens per forward of one rule on one task."""

    rule: str = Field(description="`fixed`, `threshold`, `factor`, or `blocks`: entropy thresholds in blocks")
    task: str = Field(description="`masked` (tokens here and there) or `infill` (a stretch in the middle)")
    block_size: int | None = None
    block_add_threshold: float | None = None
    points: list[CurvePoint]
    aup: Estimate | None = Field(default=None, description="accuracy under parallelism, percent x tokens per forward")
    best_accuracy: float | None = Field(default=None, description="y_max of the AUP, in percent, over all rows")


class ParallelismResult(_Part):
    """Accuracy under parallelism of a row."""

    curves: list[ParallelismCurve] = Field(default_factory=list)
    context: str | None = Field(default=None, description="what the row saw around a gap")
    absent: str | None = Field(default=None, description="why there are no curves")
    mask_ratio: float
    num_sequences: int


class EvalResult(_Part):
    """Quality on held-out text. A bound and a judge's perplexity never share a column."""

    nelbo_nats_per_token: Estimate | None = None
    block_nelbo_nats_per_token: Estimate | None = None
    exact_nats_per_token: Estimate | None = None
    bits_per_byte: float | None = None
    unigram_nats_per_token: float | None = None
    masked_accuracy: dict[str, Estimate] = Field(default_factory=dict, description="by mask ratio")
    masked_nll: dict[str, Estimate] = Field(default_factory=dict, description="nats per token, by mask ratio")
    frontier: list[dict[str, Any]] = Field(default_factory=list, description="one entry a temperature")
    samples: list[dict[str, Any]] = Field(default_factory=list)
    diagnostics: dict[str, Any] = Field(
        default_factory=dict, description="figures of health of a latent row: numbers, or maps of numbers"
    )
    step_sweep: StepSweepResult | None = None
    parallelism: ParallelismResult | None = None
    num_sequences: int | None = None
    num_documents: int | None = Field(default=None, description="documents those sequences were cut from")
    num_scored_tokens: int | None = None
    dtype: str | None = None
    eval_s: float | None = None


class BenchResult(_Part):
    """Speed, measured in one process with all rows interleaved."""

    steps: dict[str, dict[str, Any]] = Field(description="by denoising steps ('ar' for the autoregressive rows)")
    peak_memory_gb: float | None = None
    load_s: float | None = None


class Row(_Part):
    """One cell under one seed."""

    row_id: str
    name: str
    method: str
    seed: int
    status: Literal["ok", "failed"]
    trained: bool = Field(description="False: weights as they came; throughput of an untrained row is not ranked")
    error: str | None = None
    origin: str | None = Field(default=None, description="run that computed it, when it came from the cache")
    trainable_params: int | None = None
    train: TrainResult | None = None
    eval: EvalResult | None = None
    bench: BenchResult | None = None
    cost: CostResult | None = None


class Comparison(_Part):
    """A paired difference between two rows of one seed on the same held-out sequences and noise, taken by itself."""

    rows: tuple[str, str]
    metric: str
    difference: float = Field(description="first minus second, nats per token")
    se: float
    resolved: bool = Field(description="|difference| > 2 se; says nothing about another training seed")
    clusters: int | None = Field(default=None, description="documents, or sequences, that the se is made of")


class Contrast(_Part):
    """What the report says of two cells: their difference over all seeds, beside that of every other pair."""

    cells: tuple[str, str]
    metric: str
    seeds: int = Field(description="seeds that both cells finished")
    difference: float = Field(description="first minus second, nats per token, mean over seeds")
    low: float
    high: float
    seed_sd: float | None = Field(default=None, description="of the difference over seeds; null with one seed")
    pairs: int = Field(description="pairs of this metric, whose intervals hold together with 95 % confidence")
    resolved: bool = Field(description="the interval excludes 0")


class Tie(_Part):
    """A paired throughput ratio, taken by itself."""

    rows: tuple[str, str]
    steps: str
    ratio: float
    ci95: tuple[float, float]
    verdict: Verdict


class SpeedContrast(_Part):
    """What the report says of the speed of two cells that share a network, beside that of every other pair."""

    cells: tuple[str, str]
    steps: str
    rounds: int = Field(description="rounds in which both were timed")
    ratio: float = Field(description="first over second, tokens per second")
    low: float | None = None
    high: float | None = None
    pairs: int = Field(description="pairs at all numbers of steps, whose intervals hold together with 95 % confidence")
    verdict: Verdict


class Results(_Part):
    """The whole report as data."""

    schema_version: str = SCHEMA_VERSION
    run_id: str
    created_at: str
    preset: str
    command: str
    git_commit: str | None = None
    git_dirty: bool | None = None
    hardware: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    seeds: list[int]
    budget: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    cells: list[Row]
    comparisons: list[Comparison] = Field(default_factory=list)
    ties: list[Tie] = Field(default_factory=list)
    contrasts: list[Contrast] = Field(default_factory=list)
    speed_contrasts: list[SpeedContrast] = Field(default_factory=list)
    ranked: bool = Field(description="quality is ranked only with three or more seeds")
    notes: list[str] = Field(default_factory=list)
