"""Generative frontier: judge perplexity against diversity over sampling temperatures.

A single (perplexity, entropy) point can be had by degenerate text (arXiv:2606.08417); a curve over temperatures,
repetition, distinct-n and the gap that shuffling opens cannot all be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.evals.judge import Judge
from dllm_core.evals.overlap import overlap_statistics
from dllm_core.evals.prompts import Prompts
from dllm_core.evals.text_stats import shuffle_ngrams, text_statistics
from dllm_core.evals.views import device_of
from dllm_core.methods.protocol import Method, SamplingRequest

SHUFFLE_N = 4
"""Size of the pieces of the shuffle test, in tokens."""


@dataclass(frozen=True)
class Continuations:
    """What a row wrote at one temperature.

    Attributes:
        temperature: sampling temperature.
        tokens: new tokens of each prompt.
        commit_step: per prompt the pass at which each token was fixed; None if the room keeps no history.
        num_forwards: network passes a batch of prompts took, averaged.
    """

    temperature: float
    tokens: tuple[Tensor, ...]
    commit_step: tuple[Tensor, ...] | None = None
    num_forwards: float = 0.0


@torch.no_grad()
def continue_prompts(
    method: Method,
    prompts: Prompts,
    *,
    temperature: float,
    new_tokens: int,
    steps: int,
    seed: int,
    batch_size: int,
    record_history: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> Continuations:
    """Generate `new_tokens` tokens after every prompt, end-of-text ignored, so that all rows write equally much."""
    device = device_of(method)
    tokens: list[Tensor] = []
    commits: list[Tensor] = []
    forwards: list[int] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts.part(start, start + batch_size)
        request = SamplingRequest(
            max_new_tokens=new_tokens,
            num_steps=min(steps, new_tokens),
            temperature=temperature,
            seed=seed,
            sample_ids=part.sample_ids,
            record_history=record_history,
        )
        output = method.sample([p.to(device) for p in part.ids], request)
        for ids, prompt, count in zip(output.sequences, part.ids, output.new_tokens, strict=True):
            tokens.append(ids[len(prompt) : len(prompt) + count].cpu())
        commits += [c.cpu() for c in output.commit_step or []]
        forwards.append(output.num_forwards)
        if on_done:
            on_done(len(part))
    history = tuple(commits) if len(commits) == len(tokens) else None
    return Continuations(temperature, tuple(tokens), history, sum(forwards) / max(1, len(forwards)))


def judged(
    judge: Judge, prompts: Prompts, texts: Sequence[Tensor], noise: NoiseSource, *, shuffle_n: int = SHUFFLE_N
) -> dict[str, Any]:
    """Return a judge's perplexity, the text statistics and the overlap with the references of some continuations.

    `shuffle_gap_nats` is how much the judge's nats per token rise when each text's 4-grams are permuted: text with
    structure beyond 4-grams opens a gap, a bag of fragments does not. `shuffled_judge_ppl` is the judge's perplexity
    of the same tokens in any order: text no better than that is a bag of words.
    """
    given = [p.tolist() for p in prompts.ids]
    written = [t.tolist() for t in texts]

    def permuted(n: int) -> list[list[int]]:
        generators = (noise.generator(sample, 0, f"shuffle {n}") for sample in prompts.sample_ids)
        return [shuffle_ngrams(ids, n, generator) for ids, generator in zip(written, generators, strict=True)]

    plain = judge.score(given, written).grouped(prompts.groups).per_token()
    return {
        "judge_ppl": _exp(plain.value),
        "judge_nats_per_token": plain.as_json(),
        "judge": judge.label,
        "shuffle_gap_nats": judge.score(given, permuted(shuffle_n)).per_token().value - plain.value,
        "shuffled_judge_ppl": _exp(judge.score(given, permuted(1)).per_token().value),
        "num_samples": len(written),
        "num_documents": None if prompts.groups is None else len(set(prompts.groups)),
        **text_statistics(written),
        **overlap_statistics(written, [r.tolist() for r in prompts.references], prompts.groups),
    }


def reference_statistics(judge: Judge, prompts: Prompts, noise: NoiseSource) -> dict[str, Any]:
    """Return the figures of the held-out continuations.

    Of the overlaps only `overlap_n_other` says something here: what any two held-out texts have in common.
    """
    found = judged(judge, prompts, prompts.references, noise)
    return {k: v for k, v in found.items() if not k.startswith("overlap") or k.endswith("_other")}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


@dataclass
class Frontier:
    """Points of one row and the texts behind them."""

    points: list[dict[str, Any]] = field(default_factory=list)
    continuations: list[Continuations] = field(default_factory=list)


def frontier(
    method: Method,
    prompts: Prompts,
    judge: Judge,
    noise: NoiseSource,
    *,
    temperatures: Sequence[float],
    new_tokens: int,
    steps: int,
    batch_size: int,
    record_history: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> Frontier:
    """Generate at each temperature and score the result.

    Args:
        method: any room.
        prompts: the same for every row.
        judge: scores the continuations, prompts excluded.
        noise: its seed keys sampling and shuffling.
        temperatures: of sampling; 0 is greedy.
        new_tokens: tokens a continuation.
        steps: denoising steps a continuation (rows that write token by token ignore it).
        batch_size: prompts a call.
        record_history: keep the commit order at the lowest temperature.
        on_done: called with the number of continuations done.
    """
    result = Frontier()
    for temperature in sorted(temperatures):
        texts = continue_prompts(
            method,
            prompts,
            temperature=temperature,
            new_tokens=new_tokens,
            steps=steps,
            seed=noise.seed,
            batch_size=batch_size,
            record_history=record_history and temperature == min(temperatures),
            on_done=on_done,
        )
        point = {"temperature": temperature, **judged(judge, prompts, texts.tokens, noise), "steps": steps}
        result.points.append({**point, "num_forwards": texts.num_forwards})
        result.continuations.append(texts)
    return result
