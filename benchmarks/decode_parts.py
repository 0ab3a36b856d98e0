"""What the decoding benchmark times, in parts: rows that are compared with each other take turns in one part.

A part knows how much work its rows are before any of them runs, so that its time can be told beforehand.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

from transformers import StaticCache

from benchmarks import ar_graph, ar_loops, plain_loop
from benchmarks.decode_models import Models
from benchmarks.schedule import rule_of
from dllm_core.backbone import ar_decode
from dllm_core.methods.protocol import GenerationOutput, SamplingRequest
from dllm_core.samplers import inspection
from dllm_core.samplers.blocks import split_blocks
from dllm_core.samplers.config import ADAPTIVE_SAMPLERS, DiffusionGenerationConfig
from dllm_core.samplers.loop import generate

Decode = Callable[[int], GenerationOutput]
ArLoop = Callable[[list[Any], int], GenerationOutput]
AR_STEPS = 8
"""Denoising steps at which our loop is put against the best autoregressive one."""
WARM_STEPS, WARM_TOKENS = 2, 8
HEADLINE_ROUNDS = 6
"""Least rounds of the parts that targets are judged by: from six on an interval needs no assumption."""


@dataclass(frozen=True)
class Setting:
    """What is decoded.

    Attributes:
        prompt, new: tokens of a row of the canvas, given and to fill.
        batch: rows.
        steps: denoising steps.
    """

    prompt: int
    new: int
    batch: int
    steps: int

    @property
    def units(self) -> float:
        """Tokens that run through the network where every pass runs the whole canvas."""
        return float(min(self.steps, self.new) * self.batch * (self.prompt + self.new))

    def __str__(self) -> str:
        return f"{self.prompt}+{self.new} tokens, batch {self.batch}, {self.steps} steps"


@dataclass(frozen=True)
class Row:
    """Something to time.

    Attributes:
        decode: called with the index of the round; below 0 it does a little of the same, to warm up.
        units: its work, in units that rows of its kind share; see `Costs`.
        config: of the rows that our loop decodes.
    """

    decode: Decode
    units: float
    config: DiffusionGenerationConfig | None = None


@dataclass(frozen=True)
class Part:
    """Rows that take turns.

    Attributes:
        name: `sweep`, `ar`, `block_causal`, `caches`, `rules` or `product`.
        setting: what all rows decode.
        rows: by name.
        pairs: rows that are compared, the first over the second.
        reference: the row whose tokens the others' are compared with.
        least_rounds: however long they take.
    """

    name: str
    setting: Setting
    rows: dict[str, Row]
    pairs: tuple[tuple[str, str], ...]
    reference: str
    least_rounds: int


class Costs:
    """Seconds that rows take per unit of their work: guessed from the kind of row, then learnt from what was timed."""

    LIKE: ClassVar = {
        "plain": ("ours", 1.7),
        "masked_rows": ("ours", 1.4),
        "exact": ("ours", 1.5),
        "block_causal": ("ours", 1.5),
    }
    """What a row that was not timed yet is like, and by how much slower."""

    def __init__(self, ours: float, ar: float) -> None:
        self._known = {"ours": ours, "ar": ar}

    def seconds(self, name: str, units: float) -> float:
        """Return what a call will take."""
        if name not in self._known:
            kind, factor = self.LIKE.get(name, ("ar" if name.startswith("ar") else "ours", 1.0))
            return factor * self._known[kind] * units
        return self._known[name] * units

    def learn(self, name: str, units: float, seconds: float) -> None:
        """Remember what a call took."""
        self._known[name] = seconds / units

    def rounds(self, part: Part, most: int, limit_s: float) -> tuple[int, float]:
        """Return how many rounds of a part fit its limit, and the seconds that they will take, warm-up left out."""
        once = sum(self.seconds(name, row.units) for name, row in part.rows.items())
        rounds = min(most, max(min(most, part.least_rounds), int(limit_s / max(once, 1e-9))))
        return rounds, rounds * once


# -- settings ---------------------------------------------------------------------------------------------------------


def on_gpu(device: str) -> bool:
    """Return whether rows run on a GPU."""
    return device.startswith("cuda")


def ours_config(
    setting: Setting, args: Namespace, rule: str = "confidence", cache: str = "none", *, blocks: bool = False
) -> DiffusionGenerationConfig:
    """Return the settings of one of our rows; keys and values are kept by the block, so a cache has blocks.

    On a GPU it is compiled, in the warm-up.

    Raises:
        DllmError: an unknown rule or cache, or fewer steps than blocks.
    """
    config = DiffusionGenerationConfig(
        max_new_tokens=setting.new,
        max_denoising_steps=setting.steps,
        sampler_config=rule_of(rule),  # type: ignore[arg-type]
        cache=cache,  # type: ignore[arg-type]
        block_size=min(args.block_size, setting.new) if blocks or cache != "none" else None,
        stop_at_eos=False,
        seed=args.seed,
        compile="always" if on_gpu(args.device) else "never",
    )
    config.require_steps(setting.new)
    return config


# -- rows -------------------------------------------------------------------------------------------------------------


def _ours(models: Models, setting: Setting, config: DiffusionGenerationConfig) -> Row:
    def decode(index: int) -> GenerationOutput:
        prompts = models.prompts(index, setting.batch, setting.prompt)
        return generate(models.backbone, prompts, config if index >= 0 else _shorter(config, WARM_STEPS))

    return Row(decode, _network_tokens(setting, config), config)


def _shorter(config: DiffusionGenerationConfig, steps: int) -> DiffusionGenerationConfig:
    """Return the same in about `steps` steps: a block takes at least one."""
    blocks = -(-config.max_new_tokens // (config.block_size or config.max_new_tokens))
    return replace(config, max_denoising_steps=min(config.max_denoising_steps, max(steps, blocks)))


def _network_tokens(setting: Setting, config: DiffusionGenerationConfig, model_block: int | None = None) -> float:
    """Return the tokens that run through the network; where scores have a say, as many as there can be."""
    if config.cache.kind == "none":
        return setting.units
    if config.sampler_config.name in ADAPTIVE_SAMPLERS:
        config = replace(config, sampler_config="confidence")
    found = inspection.planned(config, [setting.prompt] * setting.batch, model_block=model_block)
    return float(found.total("network_tokens"))


def _plain(models: Models, setting: Setting, *, masked_rows: bool) -> Row:
    def decode(index: int) -> GenerationOutput:
        contract = models.backbone.contract
        return plain_loop.generate(
            models.plain,
            models.prompts(index, setting.batch, setting.prompt),
            max_new_tokens=setting.new,
            steps=setting.steps if index >= 0 else min(setting.steps, WARM_STEPS),
            mask_token_id=contract.mask_token_id,
            num_tokens=contract.num_tokens,
            shifted=contract.alignment == "shifted",
            masked_rows=masked_rows,
        )

    return Row(decode, setting.units)


def _ar_rows(models: Models, setting: Setting, *, compiled: bool) -> dict[str, Row]:
    def row(loop: ArLoop) -> Row:
        def decode(index: int) -> GenerationOutput:
            prompts = models.prompts(index, setting.batch, setting.prompt)
            return loop(prompts, setting.new if index >= 0 else min(setting.new, WARM_TOKENS))

        return Row(decode, float(setting.new))

    def library(prompts: list[Any], new: int) -> GenerationOutput:
        return ar_decode.decode(models.backbone, prompts, SamplingRequest(max_new_tokens=new, num_steps=new))

    rows = {
        "ar": row(library),
        "ar_hf_generate": row(lambda prompts, new: ar_loops.hf_generate(models.base, prompts, new)),
        "ar_dynamic": row(lambda prompts, new: ar_loops.dynamic_cache(models.base, prompts, new)),
        "ar_static": row(lambda prompts, new: ar_loops.static_cache(models.base, prompts, new)),
        "ar_slots": row(lambda prompts, new: ar_loops.slot_cache(models.backbone, prompts, new)),
    }
    if on_gpu(models.device):
        graph = ar_graph.GraphLoop(setting.prompt + setting.new)
        rows["ar_graph"] = row(lambda prompts, new: graph(models.backbone, prompts, new))
    if compiled:
        rows["ar_static_compiled"] = row(_kept_static_cache(models, setting, lambda: models.base_compiled))
        if on_gpu(models.device):
            rows["ar_static_reduce_overhead"] = row(_kept_static_cache(models, setting, lambda: models.base_graphs))
    return rows


def _kept_static_cache(models: Models, setting: Setting, forward: Callable[[], Any]) -> ArLoop:
    """Return a loop over a compiled pass, all calls of which write to one cache, so that the warm-up compiles it."""
    kept: list[StaticCache] = []

    def loop(prompts: list[Any], new: int) -> GenerationOutput:
        if not kept:
            kept.append(StaticCache(config=models.base.config, max_cache_len=setting.prompt + setting.new))
        return ar_loops.static_cache(models.base, prompts, new, forward(), kept[0])

    return loop


# -- parts ------------------------------------------------------------------------------------------------------------


def parts(models: Models, args: Namespace) -> list[Part]:
    """Return the parts that were asked for: those with targets first, then the others from short to long.

    Raises:
        DllmError: settings that cannot be decoded.
    """
    first = Setting(*args.canvases[0], args.batch_sizes[0], args.steps[0])
    if args.product:
        settings = [
            Setting(*canvas, batch, steps)
            for canvas, batch, steps in product(args.canvases, args.batch_sizes, args.steps)
        ]
    else:
        settings = [
            first,
            *(replace(first, steps=steps) for steps in args.steps[1:]),
            *(replace(first, batch=batch) for batch in args.batch_sizes[1:]),
            *(replace(first, prompt=prompt, new=new) for prompt, new in args.canvases[1:]),
        ]
    headline: list[Part] = []
    others: list[Part] = []
    if "sweep" in args.parts:
        headline.append(_sweep(models, first, args, HEADLINE_ROUNDS))
        others += [_sweep(models, setting, args, args.least_rounds) for setting in settings if setting != first]
    if "ar" in args.parts:
        headline.append(_against_ar(models, replace(first, steps=min(AR_STEPS, first.new)), args))
    if "block_causal" in args.parts:
        headline.append(_block_causal(models, args))
    if args.product:
        others += [_variants(models, "product", setting, args, args.rules, args.caches) for setting in settings]
    else:
        at = replace(first, steps=args.variant_steps)
        if "caches" in args.parts:
            others.append(_variants(models, "caches", at, args, ["confidence"], args.caches))
        if "rules" in args.parts:
            others.append(_variants(models, "rules", at, args, args.rules, ["none"]))
    return headline + sorted(others, key=lambda part: sum(row.units for row in part.rows.values()))


def _sweep(models: Models, setting: Setting, args: Namespace, least_rounds: int) -> Part:
    config = ours_config(setting, args)
    rows = {
        "ours": _ours(models, setting, config),
        "masked_rows": _plain(models, setting, masked_rows=True),
        "plain": _plain(models, setting, masked_rows=False),
    }
    pairs = [("ours", "plain"), ("ours", "masked_rows"), ("masked_rows", "plain")]
    if args.compile:
        name, other = ("ours_uncompiled", "never") if on_gpu(models.device) else ("ours_compiled", "always")
        rows[name] = _ours(models, setting, replace(config, compile=other))
        pairs += [(name, "plain"), (name, "ours")]
    return Part("sweep", setting, rows, tuple(pairs), "plain", least_rounds)


def _against_ar(models: Models, setting: Setting, args: Namespace) -> Part:
    """Return our loop, whole and in blocks behind an exact cache, against every autoregressive one."""
    ar = _ar_rows(models, setting, compiled=args.compile)
    rows = {"ours": _ours(models, setting, ours_config(setting, args))}
    if _num_blocks(setting, args.block_size) <= setting.steps:
        rows["block_causal"] = _in_blocks(models, setting, "exact", args)
    pairs = tuple((ours, name) for ours in rows for name in ar)
    return Part("ar", setting, {**rows, **ar}, pairs, "ar", HEADLINE_ROUNDS)


def _num_blocks(setting: Setting, size: int) -> int:
    """Return the model's own blocks that hold a place to fill; each takes a pass at least."""
    return len(split_blocks(range(setting.prompt, setting.prompt + setting.new), None, size))


def _in_blocks(models: Models, setting: Setting, cache: str, args: Namespace) -> Row:
    """Return the block-causal model's row with a cache, or none."""
    config = DiffusionGenerationConfig(
        max_new_tokens=setting.new,
        max_denoising_steps=setting.steps,
        cache=cache,  # type: ignore[arg-type]
        stop_at_eos=False,
        seed=args.seed,
        compile="always" if on_gpu(args.device) else "never",
    )
    short = replace(config, max_denoising_steps=_num_blocks(setting, args.block_size))

    def decode(index: int) -> GenerationOutput:
        prompts = models.prompts(index, setting.batch, setting.prompt)
        return generate(models.in_blocks, prompts, config if index >= 0 else short)

    return Row(decode, _network_tokens(setting, config, args.block_size), config)


def _block_causal(models: Models, args: Namespace) -> Part:
    """Return the exact cache against no cache, in the model's own blocks, with the same steps in every block."""
    setting = Setting(*args.block_causal_canvas, 1, 1)
    steps = min(setting.new, _num_blocks(setting, args.block_size) * args.steps_per_block)
    setting = replace(setting, steps=steps)
    rows = {"exact": _in_blocks(models, setting, "exact", args), "uncached": _in_blocks(models, setting, "none", args)}
    return Part("block_causal", setting, rows, (("exact", "uncached"),), "uncached", HEADLINE_ROUNDS)


def _variants(
    models: Models, name: str, setting: Setting, args: Namespace, rules: Sequence[str], caches: Sequence[str]
) -> Part:
    """Return our loop with each rule and each cache; a cache is compared with the same blocks without one."""
    rows: dict[str, Row] = {}
    pairs: list[tuple[str, str]] = []
    for rule, cache in product(rules, caches):
        plain_name = "ours" if rule == "confidence" else f"ours_{rule}"
        rows[plain_name] = _ours(models, setting, ours_config(setting, args, rule))
        if plain_name != "ours" and "ours" in rows and (plain_name, "ours") not in pairs:
            pairs.append((plain_name, "ours"))
        if cache != "none":
            in_blocks = f"{plain_name}_blocks"
            rows[in_blocks] = _ours(models, setting, ours_config(setting, args, rule, blocks=True))
            rows[f"{plain_name}_{cache}"] = _ours(models, setting, ours_config(setting, args, rule, cache))
            pairs.append((f"{plain_name}_{cache}", in_blocks))
    reference = "ours_blocks" if name == "caches" and "ours_blocks" in rows else next(iter(rows))
    return Part(name, setting, rows, tuple(pairs), reference, args.least_rounds)
