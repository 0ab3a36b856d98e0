"""What `benchmarks/decode.py` writes: every record is checked against these models before it is stored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dllm_core.evals.intervals import Verdict

NOT_MEASURED = "not measured"
TargetVerdict = Literal["met", "missed", "not measured"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Median(_Part):
    """A median over rounds with its 95 % interval."""

    median: float
    ci95: tuple[float | None, float | None]


class Speed(_Part):
    """A row of a part."""

    tokens_per_s: Median
    first_token_s: float
    num_forwards: int = Field(description="network passes of the last round")
    tokens_per_forward: float
    rounds: list[float] = Field(description="tokens per second of every round")
    sequence_s: list[float] = Field(description="seconds of every round")


class Ratio(_Part):
    """The speed of a row over that of another, round by round."""

    rows: tuple[str, str]
    ratio: float
    ci95: tuple[float | None, float | None]
    verdict: Verdict


class Drift(_Part):
    """What an approximate cache changed, on the prompts of the first round; see `CacheDrift`."""

    max_logit_difference: float
    changed_tokens: int
    num_tokens: int


class Check(_Part):
    """Whether two rows give the same tokens in fp32, on the prompts of the first round."""

    rows: tuple[str, str]
    same_tokens: float = Field(description="share of new tokens")
    same_passes: float = Field(description="share of new tokens that were placed at the same pass")
    passed: bool


class Measurement(_Part):
    """A part: rows that took turns."""

    part: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    steps: int
    not_measured: str | None = Field(default=None, description="why; the rest is empty then")
    rows: dict[str, Speed] = Field(default_factory=dict)
    ratios: list[Ratio] = Field(default_factory=list)
    configs: dict[str, dict[str, Any]] = Field(default_factory=dict, description="generation settings of our rows")
    reference: str | None = Field(default=None, description="row that same_tokens compares with")
    same_tokens: dict[str, float] = Field(default_factory=dict, description="share of new tokens, in the run's dtype")
    ar_best: str | None = Field(default=None, description="the fastest autoregressive row")
    drift: dict[str, Drift] = Field(default_factory=dict)
    check: Check | None = None
    compile_s: float | None = None


class Planned(_Part):
    """What a part was expected to take, and took."""

    part: str
    setting: str
    rounds: int
    estimated_s: float
    measured_s: float | None = None


class TargetPlace(_Part):
    """A target at one setting."""

    where: str
    ratio: float
    ci95: tuple[float | None, float | None]
    verdict: TargetVerdict


class TargetResult(_Part):
    """A target beside what was measured: met if it is met wherever it was measured."""

    name: str
    text: str
    least: float
    verdict: TargetVerdict
    why: str = ""
    at: list[TargetPlace] = Field(default_factory=list)


class Likelihood(_Part):
    """A row's own figure; kinds are never compared with each other."""

    kind: str
    nats_per_token: float
    se: float | None


class Text(_Part):
    """What the report's checks say of a row's text."""

    temperature: float
    steps: int | None
    judge_ppl: float | None
    passes: bool
    fault: str


class QualityRow(_Part):
    """A row of a grid."""

    name: str
    method: str
    likelihood: Likelihood | None
    text: Text | None


class Quality(_Part):
    """Quality of a grid's rows: of the cells named, not of the weights that were timed."""

    file: str
    git_commit: str | None
    rows: list[QualityRow]


class Record(_Part):
    """The whole file."""

    schema_version: int
    benchmark: Literal["decode"]
    command: str
    commit: str | None
    dirty: bool | None
    seed: int
    date: str
    hardware: dict[str, Any]
    versions: dict[str, str | None]
    settings: dict[str, Any]
    weights: str
    implementations: list[str] = Field(default_factory=list, description="what ran, and why")
    cpu: list[Measurement] | Literal["not measured"]
    gpu: list[Measurement] | Literal["not measured"]
    targets: list[TargetResult]
    quality: Quality | Literal["not measured"]
    plan: list[Planned]

    def measurements(self) -> list[Measurement]:
        """Return what was measured, on whichever device."""
        return [m for found in (self.cpu, self.gpu) if isinstance(found, list) for m in found]
