"""A decoder written as plainly as possible: one sample, float64, Python loops, whole logits from transformers' head."""

from __future__ import annotations

import copy
from math import exp, log
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.noise import NoiseSource
from dllm_core.samplers.config import CacheConfig, DiffusionGenerationConfig


class Model:
    """A float64 copy of a backbone that answers for one canvas: whole, or partly from keys and values it has kept.

    What is kept is a plain list of keys and values by position, laid together anew for every pass in transformers' own
    growing cache: other positions first, those of the pass behind them.
    """

    def __init__(self, backbone: Backbone, cache: CacheConfig) -> None:
        contract = backbone.contract
        self.model: Any = copy.deepcopy(backbone.model).double()
        self.num_tokens, self.shift = contract.num_tokens, 1 if contract.alignment == "shifted" else 0
        self.block = contract.block_size if contract.attention == "block_causal" else None
        self.cache = cache
        self.kept: list[tuple[Tensor, Tensor]] | None = None
        self.states: dict[int, Tensor] = {}
        self.last_block: object = None
        self.since_full = 0
        self.starts: list[int] = []

    def log_probs(self, canvas: list[int], block: list[int]) -> list[list[float]]:
        """Return log p[position][token], aligned so that row i predicts token i; right for `block` at least."""
        length, start, stop = len(canvas), 0, len(canvas)
        if self.cache.is_approximate:
            self.starts.append(block[0])
            every = self.cache.refresh_every
            begins = self.kept is None or (self.cache.kind != "delayed" and self.last_block != block)
            if begins or (every is not None and self.since_full == every):
                self.since_full = 0
            elif self.cache.kind == "delayed":
                start = self.starts[max(0, len(self.starts) - 1 - self.cache.delay)] - self.shift
            else:
                start = block[0] - self.shift
                stop = block[-1] + 1 if self.cache.kind == "dual" else length
            self.since_full, self.last_block = self.since_full + 1, block
        start = max(0, start)
        logits = self._run(canvas, start, stop)
        for n, position in enumerate(range(start, stop)):
            self.states[position] = logits[n]
        rows = [self.states[max(0, i - self.shift)] for i in range(length)]
        return torch.stack(rows)[:, : self.num_tokens].log_softmax(-1).tolist()

    def _run(self, canvas: list[int], start: int, stop: int) -> Tensor:
        length = len(canvas)
        others = [i for i in range(length) if not start <= i < stop]
        past = DynamicCache()
        if others:
            assert self.kept is not None
            for layer, (keys, values) in enumerate(self.kept):
                past.update(keys[:, :, others], values[:, :, others], layer)
        query = torch.arange(start, stop)
        key = torch.tensor([*others, *range(start, stop)])
        seen = torch.ones(len(query), len(key), dtype=torch.bool)
        if self.block:
            seen = key // self.block <= query[:, None] // self.block
        logits = self.model(
            input_ids=torch.tensor([canvas[start:stop]]),
            position_ids=query[None],
            attention_mask=seen[None, None],
            past_key_values=past,
            use_cache=True,
        ).logits[0]
        back = key.argsort()
        self.kept = [(layer.keys[:, :, back], layer.values[:, :, back]) for layer in past.layers]
        return logits.double()


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
    model, without = Model(backbone, config.cache), Model(backbone, config.cache)
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
    if model.block:
        inside: dict[int, list[int]] = {}
        for i in open_:
            inside.setdefault(i // model.block, []).append(i)
        blocks = [group[i : i + size] for group in inside.values() for i in range(0, len(group), size)]
    budget = spread([len(b) for b in blocks], min(config.max_denoising_steps, len(open_)))
    for block, steps in zip(blocks, budget, strict=True):
        placed, drafts = 0, []
        for step in range(steps):
            if not masked & set(block):
                break
            passes += 1
            log_p = model.log_probs(canvas, block)
            if config.guidance_scale != 1:
                hidden = [t if i in open_ else contract.mask_token_id for i, t in enumerate(canvas)]
                free, scale = torch.tensor(without.log_probs(hidden, block)), config.guidance_scale
                log_p = (free + scale * (torch.tensor(log_p) - free)).log_softmax(-1).tolist()
            temperature = config.temperature
            if config.t_max is not None:
                temperature = config.t_min + (config.t_max - config.t_min) * (steps - step) / steps
            uniform = uniforms(f"tokens {passes}")
            candidates = block if rule == "p2" else [i for i in block if i in masked]
            token, score = {}, {}
            for i in candidates:
                drawn = draw(log_p[i], temperature, config.top_k, config.top_p, uniform[i])
                token[i] = drawn if i in masked else canvas[i]
                first, second = sorted(log_p[i], reverse=True)[:2]
                score[i] = {
                    "random": priority[i],
                    "margin": exp(first) - exp(second),
                    "entropy": sum(exp(v) * v for v in log_p[i]),
                    "entropy_bound": sum(exp(v) * v for v in log_p[i]),
                    "entropy_threshold": sum(exp(v) * v for v in log_p[i]),
                }.get(rule, log_p[i][token[i]])
            ranked = sorted(candidates, key=lambda i: (-score[i], i))
            entropy = {i: -sum(exp(v) * v for v in log_p[i]) for i in candidates}
            if rule in ("threshold", "factor", "entropy_bound", "entropy_threshold"):
                least = -(-len(candidates) // (steps - step))
                keep = ranked[: max(least, certain(config.sampler_config, ranked, score, entropy))]
                by_place = getattr(config.sampler_config, "threshold", None)
                if isinstance(by_place, tuple):
                    keep += [i for i in ranked[least:] if score[i] >= log(by_place[block.index(i)])]
            else:
                # the first len(block) % steps steps place one token more
                placed += len(block) // steps + (step < len(block) % steps)
                keep = ranked[: placed if rule == "p2" else placed - (len(block) - len(candidates))]
            drafts.append([token.get(i, canvas[i]) for i in block])
            calm = config.confidence_threshold is None or (
                sum(entropy.values()) / len(entropy) < config.confidence_threshold
            )
            repeats = config.stability_threshold
            if repeats and len(drafts) > repeats and all(d == drafts[-1] for d in drafts[-1 - repeats :]) and calm:
                keep = candidates
            for i in candidates:
                if i in keep and i in masked:
                    canvas[i], commit[i] = token[i], passes
                    masked.discard(i)
                elif i not in keep:
                    canvas[i] = contract.mask_token_id
                    masked.add(i)
    assert not masked
    return canvas, [commit[i] for i in open_], passes


def decode_pipeline(
    backbone: Backbone, ids: Tensor, num_given: int, config: DiffusionGenerationConfig
) -> tuple[list[int], int]:
    """Return (tokens, passes) of d3LLM's pipeline, greedy: blocks have states, and are looked at one by one.

    Written after the description of arXiv 2601.07568, section by section: early stop, activation, forward, acceptance,
    forced progress. Thresholded rules on single tokens only.
    """
    model, length = Model(backbone, config.cache), len(ids)
    canvas = ids.tolist()[:num_given] + [backbone.contract.mask_token_id] * (length - num_given)
    open_, pipeline, rule = set(range(num_given, length)), config.multi_block, config.sampler_config
    assert pipeline is not None
    starts = list(range(num_given, length, config.block_size or length))
    blocks = [list(range(s, min(s + (config.block_size or length), length))) for s in starts]
    budget = spread([len(b) for b in blocks], min(config.max_denoising_steps, len(open_)))
    active, lead, spent, passes = [0], 0, 0, 0
    ends = config.eos_token_ids if config.stop_at_eos else ()

    def progress(b: int) -> float:
        return 1.0 if b < 0 else sum(i not in open_ for i in blocks[b]) / len(blocks[b])

    while True:
        stops = [i for i in range(num_given, length) if i not in open_ and canvas[i] in ends]
        if stops and not [i for i in open_ if i < stops[0]]:
            return canvas[: stops[0] + 1], passes
        if not open_:
            return canvas, passes
        if stops:
            active = [b for b in active if blocks[b][0] <= stops[0]]
        passes += 1
        where = [i for b in active for i in blocks[b] if i in open_]
        log_p = model.log_probs(canvas, [i for b in active if b >= lead for i in blocks[b]])
        token = {i: max(range(len(log_p[i])), key=lambda t, i=i: (log_p[i][t], -t)) for i in where}
        entropy = {i: -sum(exp(v) * v for v in log_p[i]) for i in where}
        by_entropy = rule.name == "entropy_threshold"
        score = {i: -entropy[i] if by_entropy else log_p[i][token[i]] for i in where}
        limit = -rule.entropy_threshold if by_entropy else log(rule.threshold)
        taken = {i for i in where if score[i] >= limit}
        for b in active:
            inside = sorted((i for i in blocks[b] if i in open_), key=lambda i: (-score[i], i))
            least = -(-len(inside) // (budget[lead] - spent)) if b == lead else 1
            if b == lead or progress(b - 1) >= pipeline.decoded_token_threshold:
                taken |= set(inside[:least])
        for i in taken:
            canvas[i] = token[i]
        open_ -= taken
        spent += 1
        while lead < len(blocks) and progress(lead) == 1:
            lead, spent = lead + 1, 0
            if lead > active[-1] or lead == len(blocks):
                break
        last = active[-1]
        far = progress(last) >= pipeline.block_add_threshold or progress(last) == 1
        stops = [i for i in range(num_given, length) if i not in open_ and canvas[i] in ends]
        if far and last + 1 < len(blocks) and (not stops or blocks[last + 1][0] <= stops[0]):
            active.append(last + 1)


def certain(rule: Any, ranked: list[int], score: dict[int, float], entropy: dict[int, float]) -> int:
    """Return how many of the ranked candidates a rule lets through by their scores."""
    count, before = 0, 0.0
    for n, i in enumerate(ranked, start=1):
        if rule.name == "threshold" and (isinstance(rule.threshold, tuple) or score[i] < log(rule.threshold)):
            break
        if rule.name == "factor" and n > 1 and (n + 1) * (1 - exp(score[i])) > rule.factor:
            break
        if rule.name == "entropy_bound" and before > rule.entropy_bound:
            break
        if rule.name == "entropy_threshold" and entropy[i] > rule.entropy_threshold:
            break
        count, before = n, before + entropy[i]
    return count


def spread(blocks: list[int], steps: int) -> list[int]:
    """Give one step after the other to the block that has the most tokens a step, the left one of equals."""
    split = [1] * len(blocks)
    while sum(split) < steps:
        split[max(range(len(blocks)), key=lambda i: (blocks[i] / split[i] if split[i] < blocks[i] else 0, -i))] += 1
    return split
