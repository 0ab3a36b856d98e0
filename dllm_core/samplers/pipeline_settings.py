"""Settings of decoding several blocks at once. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dllm_core.errors import DllmError
from dllm_core.samplers.checks import is_number, refuse_unknown


@dataclass(frozen=True, kw_only=True)
class MultiBlockConfig:
    """When the next block joins in while the ones before it still have masks (d3LLM, arXiv 2601.07568).

    The progress of a block is the share of its tokens that stand. Of the leftmost unfinished block at least as many
    tokens are accepted at each pass as without the pipeline; of one that joined, as many as the rule lets through. With
    both thresholds at 1 blocks are decoded one after the other, token for token. Defaults are those of d3LLM's runs.

    Attributes:
        block_add_threshold: progress of the rightmost active block from which on the next joins, one per pass; in
            (0, 1].
        decoded_token_threshold: progress of a block from which on its right neighbour, once active, gets at least one
            token per pass too; in (0, 1].
    """

    block_add_threshold: float = 0.1
    decoded_token_threshold: float = 0.95

    def __new__(cls, **kwargs: Any) -> MultiBlockConfig:
        """Refuse unknown settings with a suggestion."""
        refuse_unknown(cls, kwargs, "multi_block")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not is_number(value) or not 0 < value <= 1:
                raise DllmError(f"{name}={value!r} is not a share.", f"Give {name} a number in (0, 1].")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)


def multi_block_config(value: MultiBlockConfig | dict[str, Any] | None) -> MultiBlockConfig | None:
    """Return the pipeline's settings from an object or a dict; None is no pipeline.

    Raises:
        DllmError: something else, or an unknown setting.
    """
    if value is None or isinstance(value, MultiBlockConfig):
        return value
    if isinstance(value, dict):
        return MultiBlockConfig(**value)
    raise DllmError(
        f"multi_block={value!r} is no pipeline.",
        "Give a MultiBlockConfig or a dict of its settings; {} has the defaults.",
    )
