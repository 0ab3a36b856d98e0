"""Generation settings in the dialect of transformers' diffusion models. Imports no torch.

`DiffusionGenerationConfig` says how long, how many denoising steps and how to draw tokens; its `sampler_config` says
which drafted tokens are accepted at each step, its `cache` which keys and values are kept between steps. Rules and
caches are named by class (`ConfidenceSamplerConfig(...)`) or by word (`"confidence"`); they serialise to plain dicts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from dllm_core.errors import DllmError, did_you_mean
from dllm_core.samplers.cache_settings import CacheConfig, cache_config
from dllm_core.samplers.checks import (
    is_int,
    is_number,
    refuse_unknown,
    require_above_zero,
    require_flag,
    require_positive,
)
from dllm_core.samplers.pipeline_settings import MultiBlockConfig, multi_block_config
from dllm_core.samplers.rule_settings import (
    SAMPLERS,
    ConfidenceSamplerConfig,
    EntropyBoundSamplerConfig,
    EntropySamplerConfig,
    EntropyThresholdSamplerConfig,
    FactorSamplerConfig,
    MarginSamplerConfig,
    P2SamplerConfig,
    RandomSamplerConfig,
    SamplerConfig,
    ThresholdSamplerConfig,
    sampler_config,
)

if TYPE_CHECKING:
    from dllm_core.methods.protocol import SamplingRequest

ADAPTIVE_SAMPLERS = frozenset({"threshold", "factor", "entropy_bound", "entropy_threshold"})
"""Rules whose scores decide how many tokens are accepted."""

COMPILING = ("auto", "never", "always")
"""When the network's element-wise parts go through torch.compile."""

__all__ = [
    "ADAPTIVE_SAMPLERS",
    "COMPILING",
    "SAMPLERS",
    "CacheConfig",
    "ConfidenceSamplerConfig",
    "DiffusionGenerationConfig",
    "EntropyBoundSamplerConfig",
    "EntropySamplerConfig",
    "EntropyThresholdSamplerConfig",
    "FactorSamplerConfig",
    "MarginSamplerConfig",
    "MultiBlockConfig",
    "P2SamplerConfig",
    "RandomSamplerConfig",
    "SamplerConfig",
    "ThresholdSamplerConfig",
    "cache_config",
    "sampler_config",
]


@dataclass(frozen=True, kw_only=True)
class DiffusionGenerationConfig:
    """How a token-space diffusion model generates.

    Attributes:
        max_new_tokens: length of the generated span, in tokens. Not used when infilling: the mask says how many.
        max_denoising_steps: most network passes for the whole span. Scheduled rules use exactly
            `min(max_denoising_steps, tokens)` passes, those that go by scores (`threshold`, `factor`,
            `entropy_bound`, `entropy_threshold`) at most that many.
        sampler_config: acceptance rule; an object, a word or a dict.
        temperature: 0 takes the most probable token; otherwise tokens are drawn at this temperature. Confidence is
            always taken at temperature 1.
        t_max: temperature of the first pass of a block, in place of `temperature`; it falls linearly to `t_min`, as in
            transformers: t_min + (t_max - t_min) * passes left / passes.
        t_min: where `t_max` leads to; reached after the last pass.
        guidance_scale: classifier-free guidance. At each pass the model also reads the canvas with all given tokens
            masked, and logits become unconditional + scale * (conditional - unconditional); both are one batch. 1 is no
            guidance and makes no second pass. (LLaDA's cfg_scale is this one minus 1.)
        top_p: draw from the smallest set of tokens whose probability at `temperature` reaches `top_p`.
        top_k: draw from the `top_k` most probable tokens.
        block_size: tokens per block; blocks are decoded left to right. None is one block.
        stability_threshold: accept all drafts of a row's block once they have been the same for that many passes beyond
            the first (as in transformers' diffusion models); None never does. Saves passes where the
            schedule is longer than the text needs.
        confidence_threshold: for that, the mean entropy of the drafts must be below so many nats; None asks for none.
        multi_block: let blocks begin before those on their left are done; an object or a dict, None for one block at a
            time. For rules that go by scores.
        stop_at_eos: stop a sequence at its first end-of-sequence token; what comes after is dropped.
        eos_token_id: one id or several; None takes the model's own.
        seed: keys the noise together with the sample ids.
        cache: keys and values kept between passes; an object, a word or a dict. Keeping makes passes cheaper and, in
            a model whose tokens see what comes after them, changes what they say: see `CacheConfig`.
        measure_drift: make a full pass beside every cached one and return how far they are apart. For `approximate`
            caches; costs more than no cache.
        record_history: return the pass at which each token was fixed.
        record_passes: return canvas, drafts, scores and what was accepted of every pass.
        verify: decode every row by itself as well, on the whole canvas and without fused kernels, and raise at the
            first pass after which the two differ. For tests and doubts; at least twice the work.
        compile: whether the element-wise parts of the network go through torch.compile. `always` does so at the first
            decode, which takes seconds (fewer in a second process: see `layers.compiling`); `auto` on a GPU once a
            model has made so many passes that it pays, and never on a CPU. Not the default: compiled parts round less
            often in bf16 and fp16, and with `auto` what a near-tie gives depends on how much was decoded before.

    Raises:
        DllmError: an unknown name, or a value out of range.
    """

    max_new_tokens: int = 128
    max_denoising_steps: int = 32
    sampler_config: SamplerConfig = field(default_factory=ConfidenceSamplerConfig)
    temperature: float = 0.0
    t_max: float | None = None
    t_min: float | None = None
    guidance_scale: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    block_size: int | None = None
    multi_block: MultiBlockConfig | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | None = None
    stop_at_eos: bool = True
    eos_token_id: int | tuple[int, ...] | None = None
    seed: int = 0
    cache: CacheConfig = field(default_factory=CacheConfig)
    measure_drift: bool = False
    record_history: bool = False
    record_passes: bool = False
    verify: bool = False
    compile: str = "never"

    def __new__(cls, **kwargs: Any) -> DiffusionGenerationConfig:
        """Refuse unknown settings with a suggestion."""
        refuse_unknown(cls, kwargs, "generation")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler_config", sampler_config(self.sampler_config))
        object.__setattr__(self, "cache", cache_config(self.cache))
        object.__setattr__(self, "multi_block", multi_block_config(self.multi_block))
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
            if value is not None or name not in ("top_k", "block_size"):
                require_positive(name, value)
        for name in ("stop_at_eos", "measure_drift", "record_history", "record_passes", "verify"):
            require_flag(name, getattr(self, name))
        if self.compile not in COMPILING:
            raise DllmError(f"compile={self.compile!r} is not a choice.", did_you_mean(str(self.compile), COMPILING))
        if not is_int(self.seed):
            raise DllmError(f"seed={self.seed!r} is not an integer.", "Give an integer seed.")
        if not is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise DllmError(
                f"temperature={self.temperature!r} is not a temperature.", "Give a number >= 0; 0 is greedy."
            )
        self._validate_schedule()
        if self.top_p is not None and (not is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise DllmError(f"top_p={self.top_p!r} is not a probability.", "Give a number in (0, 1], or None.")
        eos = self.eos_token_ids
        if not all(is_int(i) and i >= 0 for i in eos):
            raise DllmError(f"eos_token_id={self.eos_token_id!r} is not a token id.", "Give an id >= 0, or several.")
        if self.measure_drift and not self.cache.is_approximate:
            raise DllmError(
                f"measure_drift needs an approximate cache, and cache='{self.cache.kind}' has no drift.",
                "Give cache='prefix', 'dual' or 'delayed', or leave measure_drift out.",
            )

        self._require_thresholds()
        if self.multi_block is not None and self.sampler_config.name not in ADAPTIVE_SAMPLERS:
            raise DllmError(
                f"multi_block needs a rule that goes by scores; '{self.sampler_config.name}' accepts fixed counts.",
                f"Give one of {', '.join(sorted(ADAPTIVE_SAMPLERS))}, or leave multi_block out.",
            )
        if self.verify and self.cache.is_approximate:
            raise DllmError(
                f"verify compares with no cache, from which cache='{self.cache.kind}' differs by its nature.",
                "Give measure_drift=True instead, which says by how much.",
            )

    def _require_thresholds(self) -> None:
        rule = self.sampler_config
        if isinstance(rule, ThresholdSamplerConfig) and isinstance(rule.threshold, tuple):
            places = len(rule.threshold)
            if self.block_size is None or self.block_size > places:
                raise DllmError(
                    f"{places} thresholds by place do not serve blocks of block_size={self.block_size}.",
                    f"Give a block_size of at most {places}, or a single threshold.",
                )

    def _validate_schedule(self) -> None:
        low, high = self.t_min, self.t_max
        if (low is None) != (high is None):
            raise DllmError(f"t_max={high!r} and t_min={low!r} belong together.", "Give both, or temperature alone.")
        if low is not None and high is not None:
            if not (is_number(low) and is_number(high) and 0 <= low < high < float("inf")):
                raise DllmError(f"t_max={high!r}, t_min={low!r} is no falling temperature.", "Give t_max > t_min >= 0.")
            if self.temperature != 0:
                raise DllmError(
                    f"temperature={self.temperature!r} and t_max={high!r} both say how to draw.", "Give one of them."
                )
        if not is_number(self.guidance_scale) or not 0 <= self.guidance_scale < float("inf"):
            raise DllmError(
                f"guidance_scale={self.guidance_scale!r} is no scale.", "Give a number >= 0; 1 is no guidance."
            )
        if self.stability_threshold is not None:
            require_positive("stability_threshold", self.stability_threshold)
        if self.confidence_threshold is not None:
            require_above_zero("confidence_threshold", self.confidence_threshold)
            if self.stability_threshold is None:
                raise DllmError(
                    f"confidence_threshold={self.confidence_threshold!r} has no effect without stability_threshold.",
                    "Give stability_threshold too, or the sampler 'threshold'.",
                )

    def require_steps(self, num_tokens: int, num_blocks: int | None = None) -> None:
        """Check that every block of a span of `num_tokens` gets at least one step.

        Args:
            num_tokens: tokens to fill.
            num_blocks: blocks they stand in, where a model's own blocks make more of them than `block_size`.

        Raises:
            DllmError: fewer steps than blocks.
        """
        blocks = -(-num_tokens // (self.block_size or num_tokens)) if num_tokens else 0
        if num_blocks is not None and num_blocks > max(blocks, self.max_denoising_steps):
            raise DllmError(
                f"max_denoising_steps={self.max_denoising_steps} is too few for the {num_blocks} blocks that "
                f"{num_tokens} tokens stand in.",
                f"Give at least {num_blocks} steps.",
            )
        if blocks > self.max_denoising_steps:
            raise DllmError(
                f"max_denoising_steps={self.max_denoising_steps} is too few for {blocks} blocks of {self.block_size} "
                f"tokens ({num_tokens} in all).",
                f"Give at least {blocks} steps, or a block_size of at least "
                f"{-(-num_tokens // self.max_denoising_steps)}.",
            )

    def require_block(self, num_tokens: int) -> None:
        """Check that blocks which a cache is kept for are no longer than the span.

        Args:
            num_tokens: tokens to fill in the row that has most.

        Raises:
            DllmError: a cache whose blocks are longer than the span.
        """
        if self.cache.is_approximate and self.block_size is not None and 0 < num_tokens < self.block_size:
            raise DllmError(
                f"block_size={self.block_size} is more than the {num_tokens} tokens to generate, and "
                f"cache='{self.cache.kind}' is kept by the block.",
                f"Give a block_size of at most {num_tokens}, or None for one block.",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken at every pass."""
        return self.temperature == 0 and self.t_max is None

    def temperature_at(self, share_left: float) -> float:
        """Return the temperature of a pass, given (passes left, itself included) / passes of the block."""
        if self.t_max is None or self.t_min is None:
            return self.temperature
        return self.t_min + (self.t_max - self.t_min) * share_left

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids given here; empty when the model's own apply."""
        eos = self.eos_token_id
        return () if eos is None else (eos if isinstance(eos, tuple) else (eos,))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict that `from_dict` turns back into an equal config."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["sampler_config"] = self.sampler_config.to_dict()
        out["cache"] = self.cache.to_dict()
        if self.multi_block is not None:
            out["multi_block"] = self.multi_block.to_dict()
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
        cls,
        request: SamplingRequest,
        sampler: SamplerConfig | str | dict[str, Any] = "confidence",
        cache: CacheConfig | str | dict[str, Any] = "none",
    ) -> DiffusionGenerationConfig:
        """Return the config for room-independent settings, with an acceptance rule and a cache of the room's choice."""
        return cls(
            max_new_tokens=request.max_new_tokens,
            max_denoising_steps=request.num_steps,
            sampler_config=sampler_config(sampler),
            cache=cache_config(cache),
            temperature=request.temperature,
            block_size=request.block_size,
            stop_at_eos=request.stop_at_eos,
            seed=request.seed,
            record_history=request.record_history,
        )
