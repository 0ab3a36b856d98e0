"""Accuracy against tokens per forward: how much a row loses when a rule lets it accept more tokens at once.

Held-out text is decoded in place from what was left of it and compared with what was taken out. Two tasks: tokens
missing here and there (`masked`), and a stretch missing in the middle (`infill`). They stand in for a benchmark task,
of which d3LLM's curves are made; a right token is one that equals the held-out one at its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dllm_core.evals.aup import CurvePoint
from dllm_core.evals.gaps import Gaps, context_of, fill, matches
from dllm_core.methods.protocol import Method
from dllm_core.methods.requirements import Capabilities
from dllm_core.samplers.config import (
    ConfidenceSamplerConfig,
    DiffusionGenerationConfig,
    EntropyThresholdSamplerConfig,
    FactorSamplerConfig,
    MultiBlockConfig,
    SamplerConfig,
    ThresholdSamplerConfig,
)

ONE_A_PASS = "writes token by token: one token a forward, whatever the rule"
NO_RULES = "generates through latents: there are no masked tokens that a rule could accept"


@dataclass(frozen=True, kw_only=True)
class ParallelismSweep:
    """What is varied.

    Attributes:
        tokens_per_forward: of scheduled decodes.
        thresholds: probabilities of rule `threshold`.
        factors: of rule `factor`.
        entropy_thresholds: nats of rule `entropy_threshold`, decoded in blocks.
        block_size: tokens of those blocks.
        block_add_thresholds: progress of a block from which on the next one joins; a curve each.
        batch_size: texts a call.
        seed: keys the decodes, although greedy ones draw nothing.
    """

    tokens_per_forward: tuple[int, ...]
    thresholds: tuple[float, ...]
    factors: tuple[float, ...]
    entropy_thresholds: tuple[float, ...]
    block_size: int
    block_add_thresholds: tuple[float, ...]
    batch_size: int
    seed: int = 0

    @property
    def curves(self) -> tuple[Curve, ...]:
        """What is measured, curve by curve."""
        found = [
            Curve("fixed", tuple(map(float, self.tokens_per_forward))),
            Curve("threshold", self.thresholds),
            Curve("factor", self.factors),
            *(Curve("blocks", self.entropy_thresholds, self.block_size, a) for a in self.block_add_thresholds),
        ]
        return tuple(curve for curve in found if curve.settings)

    def work(self, capabilities: Capabilities, tasks: Mapping[str, Gaps]) -> int:
        """Return how many texts are decoded."""
        texts = sum(map(len, tasks.values())) if capabilities.infill else 0
        return texts * sum(len(c.settings) for c in self.curves)


@dataclass(frozen=True)
class Curve:
    """One rule and the values of its setting.

    Attributes:
        rule: `fixed` (so many tokens a pass, by confidence), `threshold`, `factor`, or `blocks` (entropy thresholds,
            in blocks that may overlap).
        settings: values.
        block_size: tokens a block; None is one block.
        block_add_threshold: see `MultiBlockConfig`; None for one block.
    """

    rule: str
    settings: tuple[float, ...]
    block_size: int | None = None
    block_add_threshold: float | None = None

    def config(self, setting: float, size: int, seed: int) -> DiffusionGenerationConfig:
        """Return how `size` tokens are filled in."""
        join = self.block_add_threshold
        return DiffusionGenerationConfig(
            # rules that go by scores accept one token a pass where they are sure of none
            max_denoising_steps=math.ceil(size / setting) if self.rule == "fixed" else size,
            sampler_config=self._sampler(setting),
            block_size=self.block_size,
            multi_block=None if join is None else MultiBlockConfig(block_add_threshold=join),
            stop_at_eos=False,
            seed=seed,
            record_history=True,
        )

    def _sampler(self, setting: float) -> SamplerConfig:
        if self.rule == "fixed":
            return ConfidenceSamplerConfig()
        if self.rule == "threshold":
            return ThresholdSamplerConfig(threshold=setting)
        if self.rule == "factor":
            return FactorSamplerConfig(factor=setting)
        return EntropyThresholdSamplerConfig(entropy_threshold=setting)


def parallelism(
    method: Method, tasks: Mapping[str, Gaps], sweep: ParallelismSweep, on_done: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Return the curves of a row, JSON-able.

    Args:
        method: any room, in evaluation mode.
        tasks: name -> what is filled in, the same for every row.
        sweep: what is varied.
        on_done: called with the number of texts done.

    Returns:
        `curves`: of each rule and task, `rule`, `task`, `block_size`, `block_add_threshold` and `points`, each with
        `setting`, `accuracy` and `tokens_per_forward` (`{"value", "se"}`, clustered by document) and `per_sequence`
        (`CurvePoint`). `context`: what the row sees around a gap. `absent`: why there are no curves, else None.
    """
    capabilities = method.capabilities
    if not capabilities.infill:
        return {"curves": [], "context": None, "absent": ONE_A_PASS if capabilities.causal else NO_RULES}
    return {
        "curves": [
            {
                "rule": curve.rule,
                "task": task,
                "block_size": curve.block_size,
                "block_add_threshold": curve.block_add_threshold,
                "points": list(_points(method, gaps, curve, sweep, on_done)),
            }
            for curve in sweep.curves
            for task, gaps in tasks.items()
        ],
        "context": context_of(capabilities),
        "absent": None,
    }


def _points(
    method: Method, gaps: Gaps, curve: Curve, sweep: ParallelismSweep, on_done: Callable[[int], None] | None
) -> Iterator[dict[str, Any]]:
    for setting in curve.settings:
        filling = fill(
            method,
            gaps,
            lambda size, setting=setting: curve.config(setting, size, sweep.seed),  # type: ignore[misc]
            batch_size=sweep.batch_size,
            on_done=on_done,
        )
        point = CurvePoint(
            matches(filling.tokens, gaps.truths),
            tuple(map(float, gaps.sizes)),
            tuple(map(float, filling.forwards)),
            gaps.groups,
        )
        yield {
            "setting": setting,
            "accuracy": point.accuracy.per_token().as_json(),
            "tokens_per_forward": point.tokens_per_forward.per_token().as_json(),
            "per_sequence": point.as_json(),
        }
