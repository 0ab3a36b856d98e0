"""Settings of the acceptance rules: one class each, named by class or by word. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dllm_core.errors import DllmError, did_you_mean
from dllm_core.samplers.checks import is_number, refuse_unknown, require_above_zero


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Base of the acceptance rules' settings; every rule is a subclass with its own parameters.

    Attributes:
        name: the word the rule is known by.
    """

    name: ClassVar[str] = ""

    def __new__(cls, **kwargs: Any) -> SamplerConfig:
        """Refuse unknown parameters with a suggestion."""
        refuse_unknown(cls, kwargs, f"{cls.name} sampler")
        return super().__new__(cls)

    def to_dict(self) -> dict[str, Any]:
        """Return `{"name": ..., parameters}`."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}


@dataclass(frozen=True, kw_only=True)
class RandomSamplerConfig(SamplerConfig):
    """Accept positions in a random order, drawn once per sample."""

    name: ClassVar[str] = "random"


@dataclass(frozen=True, kw_only=True)
class ConfidenceSamplerConfig(SamplerConfig):
    """Accept the tokens with the highest probability at temperature 1 (MaskGIT, arXiv 2202.04200)."""

    name: ClassVar[str] = "confidence"


@dataclass(frozen=True, kw_only=True)
class MarginSamplerConfig(SamplerConfig):
    """Accept where the best token leads the second best by most, in probability (arXiv 2502.06768)."""

    name: ClassVar[str] = "margin"


@dataclass(frozen=True, kw_only=True)
class EntropySamplerConfig(SamplerConfig):
    """Accept where the prediction's entropy at temperature 1 is lowest (Dream, arXiv 2508.15487)."""

    name: ClassVar[str] = "entropy"


@dataclass(frozen=True, kw_only=True)
class P2SamplerConfig(SamplerConfig):
    """Path planning, self-planning variant (arXiv 2502.03540): placed tokens compete again and may be masked anew.

    A placed token is scored by its own probability. That is a heuristic: the model sees the token while scoring it.
    """

    name: ClassVar[str] = "p2"


@dataclass(frozen=True, kw_only=True)
class ThresholdSamplerConfig(SamplerConfig):
    """Accept every token whose probability reaches a threshold (Fast-dLLM, arXiv 2505.22618).

    At least `ceil(masks left / steps left)` tokens are accepted at each step, the most confident first: hence one
    token when `max_denoising_steps` is at least the number of tokens, and never more forwards than allowed.

    Attributes:
        threshold: probability in (0, 1]; or one for each place of a block, in the order of its places to fill (see
            `trajectory_thresholds`).
    """

    name: ClassVar[str] = "threshold"
    threshold: float | tuple[float, ...] = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.threshold, list):
            object.__setattr__(self, "threshold", tuple(self.threshold))
        of_places = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not of_places or not all(is_number(t) and 0 < t <= 1 for t in of_places):
            raise DllmError(
                f"threshold={self.threshold!r} is not a probability.", "Give a number in (0, 1], or a list of them."
            )


@dataclass(frozen=True, kw_only=True)
class FactorSamplerConfig(SamplerConfig):
    """Accept the n most confident tokens as long as (n + 1)(1 - p_n) <= factor (Fast-dLLM, arXiv 2505.22618).

    p_n is the probability of the n-th of them: the more are accepted together, the surer each has to be. How many are
    accepted in any case is what it is for `threshold`.

    Attributes:
        factor: > 0; the larger, the more tokens at once.
    """

    name: ClassVar[str] = "factor"
    factor: float = 1.0

    def __post_init__(self) -> None:
        require_above_zero("factor", self.factor)


@dataclass(frozen=True, kw_only=True)
class EntropyBoundSamplerConfig(SamplerConfig):
    """Accept the tokens of lowest entropy while those before them add up to at most a bound (arXiv 2505.24857).

    The sum without its largest term bounds how much the accepted tokens depend on each other. How many are
    accepted in any case is what it is for `threshold`.

    Attributes:
        entropy_bound: > 0, in nats.
    """

    name: ClassVar[str] = "entropy_bound"
    entropy_bound: float = 0.1

    def __post_init__(self) -> None:
        require_above_zero("entropy_bound", self.entropy_bound)


@dataclass(frozen=True, kw_only=True)
class EntropyThresholdSamplerConfig(SamplerConfig):
    """Accept every token whose entropy is at most a threshold (d3LLM, arXiv 2601.07568).

    How many are accepted in any case is what it is for `threshold`.

    Attributes:
        entropy_threshold: > 0, in nats. d3LLM decodes at 0.4 to 0.5.
    """

    name: ClassVar[str] = "entropy_threshold"
    entropy_threshold: float = 0.4

    def __post_init__(self) -> None:
        require_above_zero("entropy_threshold", self.entropy_threshold)


SAMPLERS: dict[str, type[SamplerConfig]] = {
    c.name: c
    for c in (
        RandomSamplerConfig,
        ConfidenceSamplerConfig,
        MarginSamplerConfig,
        EntropySamplerConfig,
        P2SamplerConfig,
        ThresholdSamplerConfig,
        FactorSamplerConfig,
        EntropyBoundSamplerConfig,
        EntropyThresholdSamplerConfig,
    )
}


def sampler_config(value: SamplerConfig | str | dict[str, Any]) -> SamplerConfig:
    """Return the rule's settings from an object, a word, or a dict with `name`.

    Raises:
        DllmError: unknown rule or parameter.
    """
    if isinstance(value, SamplerConfig):
        return value
    parameters = dict(value) if isinstance(value, dict) else {"name": value}
    name = parameters.pop("name", None)
    if not isinstance(name, str) or name not in SAMPLERS:
        raise DllmError(f"Unknown sampler {name!r}.", did_you_mean(str(name), SAMPLERS))
    return SAMPLERS[name](**parameters)
