"""Quality at several numbers of denoising steps: continuations of held-out prompts, and held-out text filled in.

The same number of steps is the same parallelism everywhere: S steps of a whole response of n tokens are n / S tokens a
pass, and a gap is filled at that many a pass too, so that its accuracy belongs beside the speed of S steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dllm_core.corruption.noise import NoiseSource
from dllm_core.evals.frontier import continue_prompts, judged
from dllm_core.evals.gaps import Gaps, context_of, continue_to_gap, fill, gap_figures
from dllm_core.evals.judge import Judge
from dllm_core.evals.prompts import Prompts
from dllm_core.evals.throughput import synchronize
from dllm_core.methods.protocol import Method
from dllm_core.methods.requirements import Capabilities
from dllm_core.samplers.config import DiffusionGenerationConfig

NO_GAPS = "generates whole continuations and cannot fill in a gap"
TOKEN_BY_TOKEN = "ar"
"""Stands for the number of steps of rows that write token by token, as in the benchmark."""
OnDone = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class StepSweep:
    """What is swept.

    Attributes:
        steps: denoising steps of a whole response.
        temperatures: of the continuations.
        new_tokens: of a whole response.
        batch_size: texts a call.
    """

    steps: tuple[int, ...]
    temperatures: tuple[float, ...]
    new_tokens: int
    batch_size: int

    def settings(self, capabilities: Capabilities) -> tuple[int | None, ...]:
        """Return the numbers of steps that make a difference, fewest first; None for rows that know no steps."""
        if capabilities.causal:
            return (None,)
        return tuple(sorted({min(s, self.new_tokens) for s in self.steps}))

    def work(self, capabilities: Capabilities, prompts: Prompts, gaps: Gaps) -> int:
        """Return how many texts are decoded."""
        texts = len(prompts) * len(self.temperatures)
        texts += len(gaps) if context_of(capabilities) is not None else 0
        return len(self.settings(capabilities)) * texts


def step_sweep(
    method: Method,
    prompts: Prompts,
    gaps: Gaps,
    judge: Judge,
    noise: NoiseSource,
    sweep: StepSweep,
    on_done: OnDone | None = None,
) -> dict[str, Any]:
    """Return the quality of a row at each number of steps, JSON-able.

    Args:
        method: any room, in evaluation mode.
        prompts: of the continuations, the same for every row.
        gaps: what is filled in, the same for every row.
        judge: scores continuations.
        noise: its seed keys sampling and shuffling.
        sweep: what is swept.
        on_done: called with the number of texts done.

    Returns:
        `frontier`: number of steps (text; `ar` for a row that writes token by token) -> a point per temperature:
        figures as in `frontier.judged`, `num_forwards`, `tokens_per_forward`, and `eval_tokens_per_s`: tokens a second
        of this very decoding, in batches of `batch_size` and without rounds or warm-up; no benchmark.
        `infill`: number of steps -> figures (`gaps.gap_figures`) of greedy decoding; empty for rows that cannot.
        `infill_context`: what the row saw around a gap, None if it cannot fill one; `infill_absent` then says why.
    """
    settings = sweep.settings(method.capabilities)
    context = context_of(method.capabilities)
    found: dict[str, Any] = {
        "frontier": {
            _name(steps): [
                _text_point(method, prompts, judge, noise, sweep, steps, temperature, on_done)
                for temperature in sorted(sweep.temperatures)
            ]
            for steps in settings
        },
        "infill": {},
        "infill_context": context,
        "infill_absent": None if context is not None else NO_GAPS,
        "infill_sequences": len(gaps),
        "batch_size": sweep.batch_size,
    }
    if context is not None:
        found["infill"] = {
            _name(steps): _gap_point(method, gaps, noise.seed, sweep, steps, on_done) for steps in settings
        }
    return found


def _name(steps: int | None) -> str:
    return TOKEN_BY_TOKEN if steps is None else str(steps)


def _text_point(
    method: Method,
    prompts: Prompts,
    judge: Judge,
    noise: NoiseSource,
    sweep: StepSweep,
    steps: int | None,
    temperature: float,
    on_done: OnDone | None,
) -> dict[str, Any]:
    synchronize()
    started = time.perf_counter()
    texts = continue_prompts(
        method,
        prompts,
        temperature=temperature,
        new_tokens=sweep.new_tokens,
        steps=steps or sweep.new_tokens,
        seed=noise.seed,
        batch_size=sweep.batch_size,
        on_done=on_done,
    )
    synchronize()
    seconds = time.perf_counter() - started
    return {
        "temperature": temperature,
        **judged(judge, prompts, texts.tokens, noise),
        "num_forwards": texts.num_forwards,
        "tokens_per_forward": sweep.new_tokens / texts.num_forwards,
        "eval_tokens_per_s": sum(map(len, texts.tokens)) / seconds,
    }


def _gap_point(
    method: Method, gaps: Gaps, seed: int, sweep: StepSweep, steps: int | None, on_done: OnDone | None
) -> dict[str, Any]:
    if steps is None:
        filling = continue_to_gap(method, gaps, seed=seed, batch_size=sweep.batch_size, on_done=on_done)
    else:

        def config_of(size: int) -> DiffusionGenerationConfig:
            return DiffusionGenerationConfig(
                max_denoising_steps=math.ceil(steps * size / sweep.new_tokens),
                stop_at_eos=False,
                seed=seed,
                record_history=True,
            )

        filling = fill(method, gaps, config_of, batch_size=sweep.batch_size, on_done=on_done)
    return {
        **gap_figures(filling, gaps),
        "num_forwards": sum(filling.forwards) / max(1, len(gaps)),
        "tokens_per_forward": sum(gaps.sizes) / max(1, sum(filling.forwards)),
    }
