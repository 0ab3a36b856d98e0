"""Which keys and values a decode keeps between its passes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dllm_core.errors import DllmError, did_you_mean
from dllm_core.samplers.checks import refuse_unknown, require_positive

CacheKind = Literal["none", "prefix", "dual", "delayed", "exact"]
APPROXIMATE = frozenset({"prefix", "dual", "delayed"})


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What is kept between passes, and for how long.

    Of a model in which every token sees the whole canvas, no key or value stays right once a token has been placed:
    keeping any is an approximation (`prefix`, `dual`, `delayed`), whose drift `measure_drift` reports. In a
    block-causal model, finished blocks see nothing that comes later, and keeping theirs is `exact`.

    Attributes:
        kind: `none` runs the whole canvas in every pass.
            `prefix` runs it when a block begins, and after that from the block to the end of the canvas; what lies
            before the block is kept (Fast-dLLM, arXiv 2505.22618).
            `dual` runs it when a block begins, and after that the block alone; what lies on either side is kept
            (the same).
            `delayed` runs it once, and after that from the first token on that has not been final for `delay` passes
            (d3LLM, arXiv 2601.07568); without `refresh_every`, keys made beside masks are kept to the end.
            `exact` runs the block alone behind all finished ones; block-causal models only.
        refresh_every: run the whole canvas again at every that many passes of a row; None never does. 1 is as if
            nothing were kept. Approximate kinds only.
        delay: passes that a finished block is still run for. `delayed` only.

    Raises:
        DllmError: an unknown kind or setting, or one that the kind has no use for.
    """

    kind: CacheKind = "none"
    refresh_every: int | None = None
    delay: int = 1

    def __new__(cls, **kwargs: Any) -> CacheConfig:
        """Refuse unknown settings with a suggestion."""
        refuse_unknown(cls, kwargs, "cache")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        kinds = get_args(CacheKind)
        if self.kind not in kinds:
            raise DllmError(f"Unknown cache {self.kind!r}.", did_you_mean(str(self.kind), kinds))
        require_positive("delay", self.delay)
        if self.delay != 1 and self.kind != "delayed":
            raise DllmError(f"The cache '{self.kind}' has no delay.", "Leave delay out, or give kind='delayed'.")
        if self.refresh_every is not None:
            require_positive("refresh_every", self.refresh_every)
            if not self.is_approximate:
                raise DllmError(
                    f"The cache '{self.kind}' is never refreshed.",
                    "Leave refresh_every out, or give kind='prefix', 'dual' or 'delayed'.",
                )

    @property
    def is_approximate(self) -> bool:
        """Whether cached passes say something else than passes over the whole canvas."""
        return self.kind in APPROXIMATE

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict that `cache_config` turns back into an equal object."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def cache_config(value: CacheConfig | str | dict[str, Any]) -> CacheConfig:
    """Return cache settings from an object, the word of a kind, or a dict.

    Raises:
        DllmError: unknown kind or setting.
    """
    if isinstance(value, CacheConfig):
        return value
    return CacheConfig(**value) if isinstance(value, dict) else CacheConfig(kind=value)  # type: ignore[arg-type]
