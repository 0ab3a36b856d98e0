"""A decoder written as plainly as possible: one sample, float64, Python loops, whole logits from transformers' head."""

from __future__ import annotations

import copy
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.noise import NoiseSource
from dllm_core.samplers.config import DiffusionGenerationConfig


def float64_log_probs(model: Any, canvas: list[int], *, num_tokens: int, shifted: bool) -> list[list[float]]:
    """Return log p[position][token] of a bidirectional pass, aligned so that row i predicts token i."""
    logits = model(input_ids=torch.tensor([canvas]), is_causal=False, use_cache=False).logits[0].double()
    if shifted:
        logits = torch.cat((logits[:1], logits[:-1]))
    return logits[:, :num_tokens].log_softmax(-1).tolist()


def draw(log_p: list[float], temperature: float, top_k: int | None, top_p: float | None, uniform: float) -> int:
    """Return the token a uniform number selects; without filters tokens are laid out by id, with them by rank."""
    if temperature == 0:
        return max(range(len(log_p)), key=lambda i: (log_p[i], -i))
    order = list(range(len(log_p)))
    if top_k is not None or top_p is not None:
        order = sorted(order, key=lambda i: -log_p[i])[: top_k or len(order)]
    top = max(log_p)
    weights = [exp((log_p[i] - top) / temperature) for i in order]
    if top_p is not None:
        total, before, kept = sum(weights), 0.0, []
        for weight in weights:
            if before / total < top_p:
                kept.append(weight)
            before += weight
        weights, order = kept, order[: len(kept)]
    target, seen = uniform * sum(weights), 0.0
    for token, weight in zip(order, weights, strict=True):
        seen += weight
        if seen > target:
            return token
    return order[-1]


def decode(
    backbone: Backbone, ids: Tensor, fixed: Tensor, config: DiffusionGenerationConfig, sample_id: int = 0
) -> tuple[list[int], list[int], int]:
    """Return (tokens, 1-based commit pass of every open position, passes); EOS is not looked at."""
    contract = backbone.contract
    model = copy.deepcopy(backbone.model).double()
    open_ = [i for i, given in enumerate(fixed.tolist()) if not given]
    canvas = [contract.mask_token_id if i in open_ else t for i, t in enumerate(ids.tolist())]
    masked, commit, passes = set(open_), dict.fromkeys(open_, 0), 0
    noise, rule = NoiseSource(config.seed), config.sampler_config.name

    def uniforms(stream: str) -> dict[int, float]:
        generator = noise.generator(sample_id, 0, f"decode {stream}")
        return dict(zip(open_, torch.rand(len(open_), generator=generator, dtype=torch.float64).tolist(), strict=True))

    priority = uniforms("order")
    size = config.block_size or max(1, len(open_))
    blocks = [open_[i : i + size] for i in range(0, len(open_), size)]
    budget = spread([len(b) for b in blocks], min(config.max_denoising_steps, len(open_)))
    for block, steps in zip(blocks, budget, strict=True):
        placed = 0
        for step in range(steps):
            if not masked & set(block):
                break
            passes += 1
            log_p = float64_log_probs(
                model, canvas, num_tokens=contract.num_tokens, shifted=contract.alignment == "shifted"
            )
            uniform = uniforms(f"tokens {passes}")
            candidates = block if rule == "p2" else [i for i in block if i in masked]
            token, score = {}, {}
            for i in candidates:
                drawn = draw(log_p[i], config.temperature, config.top_k, config.top_p, uniform[i])
                token[i] = drawn if i in masked else canvas[i]
                first, second = sorted(log_p[i], reverse=True)[:2]
                score[i] = {
                    "random": priority[i],
                    "margin": exp(first) - exp(second),
                    "entropy": sum(exp(v) * v for v in log_p[i]),
                }.get(rule, log_p[i][token[i]])
            ranked = sorted(candidates, key=lambda i: (-score[i], i))
            if rule == "threshold":
                least = -(-len(candidates) // (steps - step))
                keep = [
                    i for n, i in enumerate(ranked) if n < least or score[i] >= log(config.sampler_config.threshold)
                ]
            else:
                # the first len(block) % steps steps place one token more
                placed += len(block) // steps + (step < len(block) % steps)
                keep = ranked[: placed if rule == "p2" else placed - (len(block) - len(candidates))]
            for i in candidates:
                if i in keep and i in masked:
                    canvas[i], commit[i] = token[i], passes
                    masked.discard(i)
                elif i not in keep:
                    canvas[i] = contract.mask_token_id
                    masked.add(i)
    assert not masked
    return canvas, [commit[i] for i in open_], passes


def spread(blocks: list[int], steps: int) -> list[int]:
    """Give one step after the other to the block that has the most tokens a step, the left one of equals."""
    split = [1] * len(blocks)
    while sum(split) < steps:
        split[max(range(len(blocks)), key=lambda i: (blocks[i] / split[i] if split[i] < blocks[i] else 0, -i))] += 1
    return split
