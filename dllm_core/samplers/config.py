"""Generation settings in the dialect of transformers' diffusion models. Imports no torch.

`DiffusionGenerationConfig` says how long, how many denoising steps and how to draw tokens; its `sampler_config` says
which drafted tokens are accepted at each step. Rules are named by class (`ConfidenceSamplerConfig(...)`) or by word
(`"confidence"`); both serialise to a plain dict with the word under `name`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from dllm_core.errors import DllmError, did_you_mean

if TYPE_CHECKING:
    from dllm_core.methods.protocol import SamplingRequest


def _refuse_unknown(cls: type, given: dict[str, Any], what: str) -> None:
    known = [f.name for f in fields(cls)]
    for name in given:
        if name not in known:
            raise DllmError(f"Unknown {what} setting '{name}'.", did_you_mean(name, known))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Base of the acceptance rules' settings; every rule is a subclass with its own parameters.

    Attributes:
        name: the word the rule is known by.
    """

    name: ClassVar[str] = ""

    def __new__(cls, **kwargs: Any) -> SamplerConfig:
        """Refuse unknown parameters with a suggestion."""
        _refuse_unknown(cls, kwargs, f"{cls.name} sampler")
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
        threshold: probability in (0, 1].
    """

    name: ClassVar[str] = "threshold"
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or not 0 < self.threshold <= 1:
            raise DllmError(f"threshold={self.threshold!r} is not a probability.", "Give a number in (0, 1].")


SAMPLERS: dict[str, type[SamplerConfig]] = {
    c.name: c
    for c in (
        RandomSamplerConfig,
        ConfidenceSamplerConfig,
        MarginSamplerConfig,
        EntropySamplerConfig,
        P2SamplerConfig,
        ThresholdSamplerConfig,
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
    if name not in SAMPLERS:
        raise DllmError(f"Unknown sampler {name!r}.", did_you_mean(str(name), SAMPLERS))
    return SAMPLERS[name](**parameters)


@dataclass(frozen=True, kw_only=True)
class DiffusionGenerationConfig:
    """How a token-space diffusion model generates.

    Attributes:
        max_new_tokens: length of the generated span, in tokens. Not used when infilling: the mask says how many.
        max_denoising_steps: most network passes for the whole span. Scheduled rules use exactly
            `min(max_denoising_steps, tokens)` passes, `threshold` at most that many.
        sampler_config: acceptance rule; an object, a word or a dict.
        temperature: 0 takes the most probable token; otherwise tokens are drawn at this temperature. Confidence is
            always taken at temperature 1.
        top_p: draw from the smallest set of tokens whose probability at `temperature` reaches `top_p`.
        top_k: draw from the `top_k` most probable tokens.
        block_size: tokens per block; blocks are decoded left to right. None is one block.
        stop_at_eos: stop a sequence at its first end-of-sequence token; what comes after is dropped.
        eos_token_id: one id or several; None takes the model's own.
        seed: keys the noise together with the sample ids.
        record_history: return the pass at which each token was fixed.

    Raises:
        DllmError: an unknown name, or a value out of range.
    """

    max_new_tokens: int = 128
    max_denoising_steps: int = 32
    sampler_config: SamplerConfig = field(default_factory=ConfidenceSamplerConfig)
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    block_size: int | None = None
    stop_at_eos: bool = True
    eos_token_id: int | tuple[int, ...] | None = None
    seed: int = 0
    record_history: bool = False

    def __new__(cls, **kwargs: Any) -> DiffusionGenerationConfig:
        """Refuse unknown settings with a suggestion."""
        _refuse_unknown(cls, kwargs, "generation")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler_config", sampler_config(self.sampler_config))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        self.validate()

    def validate(self) -> None:
        """Check every value. That the steps suffice for the blocks is checked by `generate`, which knows the span.

        Raises:
            DllmError: naming the setting, its value and what is allowed.
        """
        for name in ("max_new_tokens", "max_denoising_steps", "top_k", "block_size"):
            value = getattr(self, name)
            optional = name in ("top_k", "block_size")
            if not (optional and value is None) and not (_is_int(value) and value >= 1):
                raise DllmError(f"{name}={value!r} is not a positive integer.", f"Give {name} a value of at least 1.")
        if not _is_int(self.seed):
            raise DllmError(f"seed={self.seed!r} is not an integer.", "Give an integer seed.")
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise DllmError(
                f"temperature={self.temperature!r} is not a temperature.", "Give a number >= 0; 0 is greedy."
            )
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise DllmError(f"top_p={self.top_p!r} is not a probability.", "Give a number in (0, 1], or None.")
        eos = self.eos_token_ids
        if not all(_is_int(i) and i >= 0 for i in eos):
            raise DllmError(f"eos_token_id={self.eos_token_id!r} is not a token id.", "Give an id >= 0, or several.")

    def require_steps(self, num_tokens: int) -> None:
        """Check that every block of a span of `num_tokens` gets at least one step.

        Raises:
            DllmError: fewer steps than blocks.
        """
        blocks = -(-num_tokens // (self.block_size or num_tokens)) if num_tokens else 0
        if blocks > self.max_denoising_steps:
            raise DllmError(
                f"max_denoising_steps={self.max_denoising_steps} is too few for {blocks} blocks of {self.block_size} "
                f"tokens ({num_tokens} in all).",
                f"Give at least {blocks} steps, or a block_size of at least "
                f"{-(-num_tokens // self.max_denoising_steps)}.",
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids given here; empty when the model's own apply."""
        eos = self.eos_token_id
        return () if eos is None else (eos if isinstance(eos, tuple) else (eos,))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict that `from_dict` turns back into an equal config."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["sampler_config"] = self.sampler_config.to_dict()
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiffusionGenerationConfig:
        """Return the config that `to_dict` described.

        Raises:
            DllmError: unknown setting or value out of range.
        """
        return cls(**values)

    @classmethod
    def from_request(
        cls, request: SamplingRequest, sampler: SamplerConfig | str | dict[str, Any] = "confidence"
    ) -> DiffusionGenerationConfig:
        """Return the config for room-independent settings, with an acceptance rule of the room's choice."""
        return cls(
            max_new_tokens=request.max_new_tokens,
            max_denoising_steps=request.num_steps,
            sampler_config=sampler_config(sampler),
            temperature=request.temperature,
            block_size=request.block_size,
            stop_at_eos=request.stop_at_eos,
            seed=request.seed,
            record_history=request.record_history,
        )
