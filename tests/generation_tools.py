"""What tests of token-space decoding share: prompts, settings, and how outputs are compared and watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.methods.protocol import GenerationOutput
from dllm_core.samplers.config import DiffusionGenerationConfig
from tests.tiny import NUM_TOKENS

EASY: dict[str, dict[str, float]] = {
    "threshold": {"threshold": 0.2},
    "factor": {"factor": 2.4},
    "entropy_bound": {"entropy_bound": 4.0},
    "entropy_threshold": {"entropy_threshold": 1.8},
}
"""Settings at which tiny random models, which are never sure, get several tokens through at once."""


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Return random rows of these lengths, without the end-of-text id 0."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, NUM_TOKENS, (n,), generator=generator) for n in lengths]


def easy(rule: str) -> dict[str, Any]:
    """Return the settings of a rule, those of `EASY` where it has some."""
    return {"name": rule, **EASY.get(rule, {})}


def settings_of(**common: Any) -> Callable[..., DiffusionGenerationConfig]:
    """Return a maker of settings with a module's own defaults: a fixed length, commits recorded."""

    def settings(**options: Any) -> DiffusionGenerationConfig:
        return DiffusionGenerationConfig(**{"stop_at_eos": False, "record_history": True, **common, **options})

    return settings


def same_tokens(found: GenerationOutput, expected: GenerationOutput) -> bool:
    """Return whether all sequences are equal."""
    return all(torch.equal(a, b) for a, b in zip(found.sequences, expected.sequences, strict=True))


def assert_same(found: GenerationOutput, expected: GenerationOutput) -> None:
    """Check tokens, the pass at which each was accepted, and the number of passes."""
    assert same_tokens(found, expected)
    assert found.commit_step is not None
    assert expected.commit_step is not None
    assert all(torch.equal(a, b) for a, b in zip(found.commit_step, expected.commit_step, strict=True))
    assert found.num_forwards == expected.num_forwards


@dataclass
class Passes:
    """Sizes of the passes of a backbone.

    Attributes:
        rows: of each pass.
        tokens: columns of each pass.
    """

    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@contextmanager
def watch_passes(backbone: Backbone) -> Iterator[Passes]:
    """Note the size of every pass inside the block."""
    passes = Passes()

    def note(_: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        rows, tokens, _ = (args[0] if args else kwargs["hidden_states"]).shape
        passes.rows.append(rows)
        passes.tokens.append(tokens)

    handle = backbone.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


class Recorder:
    """A streamer that remembers.

    Attributes:
        final: tokens that were put.
        drafts: canvases that were shown.
        puts: number of calls of `put`.
        ended: `end` was called.
    """

    def __init__(self) -> None:
        self.final: list[int] = []
        self.drafts: list[list[int]] = []
        self.puts = 0
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.puts += 1
        self.final += value.flatten().tolist()

    def put_draft(self, value: Tensor) -> None:
        assert value.shape[0] == 1
        self.drafts.append(value[0].tolist())

    def end(self) -> None:
        self.ended = True
