"""What decoding promises under any settings: it ends, wastes no pass, never says a mask, and keeps what was given."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.errors import DllmError
from dllm_core.samplers.blocks import split_blocks
from dllm_core.samplers.config import ADAPTIVE_SAMPLERS, SAMPLERS, DiffusionGenerationConfig
from dllm_core.samplers.loop import generate
from tests.generation_tools import Recorder, easy, prompts, settings_of, watch_passes
from tests.tiny import NUM_TOKENS, ROWS, tiny_backbone
from tests.unit import sampler_oracle

MAX_LENGTH = 64
"""Positions of the tiny models."""
APPROXIMATE: list[dict[str, Any]] = [
    {"kind": "prefix"},
    {"kind": "dual", "refresh_every": 2},
    {"kind": "delayed", "delay": 2, "refresh_every": 4},
]
settings = settings_of(max_new_tokens=12, max_denoising_steps=5)


@dataclass
class Case:
    """Something to decode, and how.

    Attributes:
        backbone: of any family, bidirectional or block-causal.
        rows: ids; some are ids that no text holds.
        infill: which of them to write anew; None continues the rows.
        options: settings.
    """

    backbone: Backbone
    rows: list[Tensor]
    infill: list[Tensor] | None
    options: dict[str, Any]

    @property
    def places(self) -> list[list[int]]:
        """Positions to fill, row by row."""
        if self.infill is not None:
            return [mask.nonzero()[:, 0].tolist() for mask in self.infill]
        return [list(range(len(r), len(r) + self.options["max_new_tokens"])) for r in self.rows]

    def decode(self, row: int | None = None, **more: Any) -> Any:
        """Return the output of all rows, or of one alone."""
        config = settings(**self.options)
        chosen = range(len(self.rows)) if row is None else [row]
        infill = None if self.infill is None else [self.infill[r] for r in chosen]
        rows = [self.rows[r] for r in chosen]
        return generate(self.backbone, rows, config, infill_mask=infill, sample_ids=list(chosen), **more)


@torch.no_grad()
def loud(backbone: Backbone) -> Backbone:
    """Make the rows of mask and padding the likeliest by far, whatever the state."""
    noise = torch.randn(ROWS - NUM_TOKENS, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    backbone.head_weight_VD[NUM_TOKENS:] = 100 * noise
    return backbone


def fuzzed(trial: int) -> Case:
    """Return a random model, random rows and any settings that go together."""
    chooser = random.Random(trial)
    model_block = chooser.choice([None, None, 3, 5])
    backbone = tiny_backbone(
        chooser.choice(["llama", "qwen2", "qwen3"]),
        alignment=chooser.choice(["shifted", "same_position"]),
        model_block=model_block,
        layers=1,
        tied=False,
        seed=trial,
    )
    rows = prompts(*(chooser.randint(1, 9) for _ in range(chooser.randint(1, 3))), seed=trial)
    infill = None
    if chooser.random() < 0.3:
        rows = prompts(*(chooser.randint(6, 18) for _ in rows), seed=trial)
        infill = [
            torch.rand(len(r), generator=torch.Generator().manual_seed(trial + n)) < 0.5 for n, r in enumerate(rows)
        ]
        for mask in infill:
            mask[0], mask[-2] = False, True
        if len(infill) > 1:
            infill[1][:] = False  # nothing to do in this one
    for row in rows:
        # not the first: on a canvas of masks alone every state is the same, and rounding would break the ties
        row[1:][torch.rand(len(row) - 1, generator=torch.Generator().manual_seed(trial)) < 0.3] = NUM_TOKENS
        if len(row) > 1 and chooser.random() < 0.2:
            row[-1] = ROWS - 1
    case = Case(loud(backbone), rows, infill, {"max_new_tokens": chooser.randint(1, 16)})
    longest = max(map(len, case.places))
    rule = chooser.choice(list(SAMPLERS))
    size = chooser.choice([None, *range(1, longest + 1)])
    blocks = max(len(split_blocks(p, size, model_block)) for p in case.places)
    case.options |= {
        "block_size": size,
        "max_denoising_steps": chooser.choice([blocks, chooser.randint(blocks, 24 + blocks)]),
        "sampler_config": easy(rule),
        "cache": chooser.choice(["none", "exact"] if model_block else ["none", *APPROXIMATE]),
        "guidance_scale": chooser.choice([1.0, 1.0, 0.5, 2.5]),
        "stop_at_eos": chooser.choice([True, False]),
        "eos_token_id": tuple(range(0, NUM_TOKENS, chooser.choice([5, 17]))),
        "stability_threshold": chooser.choice([None, None, 1, 2]),
        "seed": trial,
    }
    case.options |= chooser.choice(
        [{}, {"temperature": 1.5}, {"temperature": 4.0, "top_k": 120, "top_p": 0.99}, {"t_max": 3.0, "t_min": 0.0}]
    )
    if rule in ADAPTIVE_SAMPLERS and chooser.random() < 0.5:
        case.options["multi_block"] = {"block_add_threshold": chooser.choice([0.1, 0.5, 1.0])}
    if case.options["stability_threshold"] and chooser.random() < 0.5:
        case.options["confidence_threshold"] = 4.0
    return case


EDGES = ("limit", "nothing to fill", "all to fill")


def at_the_edge(trial: int) -> tuple[str, Case]:
    """Return a fuzzed case pushed to an edge: a row of as many tokens as the model has positions, no masks, all masks.

    With both thresholds of the pipeline drawn, and the drift of approximate caches measured in half of the cases.
    """
    case, chooser = fuzzed(trial), random.Random(10_000 + trial)
    edge = EDGES[trial % len(EDGES)]
    if edge == "limit":
        row = chooser.randrange(len(case.rows))
        length = MAX_LENGTH - (case.options["max_new_tokens"] if case.infill is None else 0)
        more = length - len(case.rows[row])
        case.rows[row] = torch.cat((*prompts(more, seed=trial), case.rows[row]))
        if case.infill is not None:
            case.infill[row] = torch.nn.functional.pad(case.infill[row], (more, 0))
    else:
        case.infill = [torch.full((len(row),), edge == "all to fill") for row in case.rows]
        for mask in case.infill:
            mask[0] = False
    model_block = case.backbone.contract.block_size
    longest = max(map(len, case.places))
    size = chooser.choice([None, *range(1, longest + 1)])
    blocks = max(1, *(len(split_blocks(p, size, model_block)) for p in case.places))
    case.options |= {
        "block_size": size,
        "max_denoising_steps": chooser.choice([blocks, blocks + chooser.randint(0, 24)]),
    }
    if "multi_block" in case.options:
        case.options["multi_block"]["decoded_token_threshold"] = chooser.choice([0.1, 0.5, 1.0])
    case.options["measure_drift"] = isinstance(case.options["cache"], dict) and chooser.random() < 0.5
    return edge, case


@pytest.mark.parametrize("trial", range(120))
def test_any_settings_keep_the_promises(trial: int) -> None:
    keeps_the_promises(fuzzed(trial))


@pytest.mark.parametrize("trial", range(1000, 1060))
def test_edges_keep_them_too(trial: int) -> None:
    edge, case = at_the_edge(trial)
    if edge == "limit":
        new = 0 if case.infill is not None else case.options["max_new_tokens"]
        assert max(map(len, case.rows)) + new == case.backbone.config.max_position_embeddings
    keeps_the_promises(case)
    if edge == "nothing to fill":
        assert case.decode().num_forwards == 0


def keeps_the_promises(case: Case) -> None:
    """Decode a case and check everything that is promised."""
    standing = [
        [len(row) - len(places) * (case.infill is not None) for row, places in zip(case.rows, case.places, strict=True)]
    ]
    drafts: list[Tensor] = []

    def watch(canvas_BC: Tensor, committed_BC: Tensor) -> None:
        standing.append(committed_BC.sum(-1).tolist())
        drafts.append(canvas_BC.clone())

    with watch_passes(case.backbone) as passes:
        out = case.decode(on_draft=watch)

    # it ends within its steps, and runs the network once a pass
    longest, steps = max(map(len, case.places)), case.options["max_denoising_steps"]
    assert len(drafts) == out.num_forwards <= min(steps, longest)
    if not case.options.get("measure_drift"):  # which makes full passes beside
        assert len(passes.tokens) == out.num_forwards
    rule = case.options["sampler_config"]["name"]
    if rule not in ADAPTIVE_SAMPLERS and not case.options["stop_at_eos"] and not case.options["stability_threshold"]:
        assert out.num_forwards == min(steps, longest)

    # no pass is wasted: each brings every row that is not done nearer to its end
    gains = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(standing)]
    assert all(max(gain) > 0 for gain in gains)
    for gains_of_row in zip(*gains, strict=True):
        active = [gain > 0 for gain in gains_of_row]
        assert min(gains_of_row) >= 0
        assert active == sorted(active, reverse=True), "a row rested for a pass and then went on"

    # new tokens are tokens, given ones are as they were given
    for row, (ids, places, found) in enumerate(zip(case.rows, case.places, out.sequences, strict=True)):
        new = [p for p in places if p < len(found)]
        assert out.new_tokens[row] == len(new)
        assert all(int(found[p]) < NUM_TOKENS for p in new)
        given = [p for p in range(min(len(ids), len(found))) if p not in new]
        assert found[given].tolist() == ids[given].tolist()
        assert case.infill is None or case.options["stop_at_eos"] or len(found) == len(ids)

    # a row alone, streamed, is what it is among others
    for row, places in enumerate(case.places):
        if isinstance(case.options["cache"], dict) and 0 < len(places) < (case.options["block_size"] or 0):
            continue  # such a block is refused where no other row fills it
        recorder = Recorder()
        alone = case.decode(row, streamer=recorder)
        assert torch.equal(alone.sequences[0], out.sequences[row])
        assert recorder.final == alone.sequences[0].tolist()
        assert recorder.ended


def test_the_loud_model_would_say_a_mask_if_it_could() -> None:
    backbone = fuzzed(0).backbone
    hidden_MD = torch.randn(200, backbone.hidden_size)
    assert bool(((hidden_MD @ backbone.head_weight_VD.T).argmax(-1) >= NUM_TOKENS).all())
    assert bool((backbone.logits(hidden_MD).argmax(-1) < NUM_TOKENS).all())


def test_the_fuzzed_settings_cover_every_kind() -> None:
    cases = [fuzzed(trial) for trial in range(120)]
    assert {c.options["sampler_config"]["name"] for c in cases} == set(SAMPLERS)
    assert {settings(**c.options).cache.kind for c in cases} == {"none", "exact", "prefix", "dual", "delayed"}
    for wanted in ("multi_block", "t_max", "top_p", "confidence_threshold"):
        assert sum(c.options.get(wanted) is not None for c in cases) >= 5, wanted
    assert sum(c.infill is not None for c in cases) >= 20
    assert sum(any(bool((r == NUM_TOKENS).any()) for r in c.rows) for c in cases) >= 20


@pytest.mark.parametrize("rule", SAMPLERS)
@pytest.mark.parametrize("cache", ["none", "exact", *APPROXIMATE], ids=lambda c: c if isinstance(c, str) else c["kind"])
def test_mask_ids_among_the_given_tokens_are_data(rule: str, cache: Any) -> None:
    """The float64 decoder knows what is given by a list of positions, never by looking at ids."""
    backbone = tiny_backbone(model_block=4 if cache == "exact" else None)
    (row,) = prompts(18, seed=3)
    row[[2, 3, 7, 12, 17]] = NUM_TOKENS
    infill = torch.zeros(18, dtype=torch.bool)
    infill[[4, 5, 6, 8, 9, 13, 14, 15]] = True
    config = settings(sampler_config=easy(rule), cache=cache, block_size=3, max_denoising_steps=8)
    out = generate(backbone, [row], config, infill_mask=[infill])
    tokens, _, _ = sampler_oracle.decode(backbone, row, ~infill, config)
    assert out.sequences[0].tolist() == tokens
    assert out.new_tokens == [8]
    changed = row.clone()
    changed[7] = 5
    other = generate(backbone, [changed], config, infill_mask=[infill])
    assert not torch.equal(other.sequences[0][infill], out.sequences[0][infill]), "the model reads it like any token"


@pytest.mark.parametrize("rule", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_model_ends_too_and_says_tokens(rule: str, temperature: float) -> None:
    for model_block, cache in ((None, "none"), (None, "dual"), (4, "exact")):
        backbone = tiny_backbone(model_block=model_block, layers=1)
        with torch.no_grad():
            for parameter in backbone.layers.parameters():
                parameter.fill_(torch.nan)
        for more in ({}, {"top_k": 3}, {"guidance_scale": 2.0}, {"stability_threshold": 1}):
            config = settings(sampler_config=easy(rule), temperature=temperature, cache=cache, block_size=4, **more)
            out = generate(backbone, prompts(3, 5), config)
            assert out.num_forwards <= 5
            assert [int(s.max()) < NUM_TOKENS and int(s.min()) >= 0 for s in out.sequences] == [True, True]
            assert out.new_tokens == [12, 12]


def _mask(length: int, *places: int) -> Tensor:
    mask = torch.zeros(length, dtype=torch.bool)
    mask[list(places)] = True
    return mask


LONG = torch.ones(65, dtype=torch.long)


@pytest.mark.parametrize(
    ("model_block", "options", "rows", "infill", "problem"),
    [
        # a prompt longer than the model's context of 64, however it is decoded
        (None, {}, [LONG], None, "has 64 positions"),
        (None, {}, [LONG], [_mask(65, 3)], "has 64 positions"),
        (None, {"cache": "delayed"}, [LONG], None, "has 64 positions"),
        (4, {"max_denoising_steps": 12}, [LONG], None, "has 64 positions"),
        (4, {"cache": "exact", "max_denoising_steps": 12}, [LONG], None, "has 64 positions"),
        (4, {"cache": "exact", "max_denoising_steps": 12}, [torch.ones(3).long(), LONG], None, "has 64 positions"),
        # caches that the model or the blocks do not allow, when infilling too
        (None, {"cache": "exact"}, [torch.ones(9).long()], [_mask(9, 4)], "needs a block-causal model"),
        (
            None,
            {"cache": "dual", "block_size": 3},
            [torch.ones(9).long()],
            [_mask(9, 4, 5)],
            "block_size=3 is more than",
        ),
        (4, {"cache": "prefix"}, [torch.ones(9).long()], [_mask(9, 4)], "gives exactly"),
        # steps
        (4, {"max_denoising_steps": 1}, [torch.ones(16).long()], [_mask(16, 2, 9)], "too few for the 2 blocks"),
        (None, {"block_size": 2, "max_denoising_steps": 1}, [torch.ones(9).long()], [_mask(9, 1, 4, 5)], "too few"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_any_pass(
    model_block: int | None, options: dict[str, Any], rows: list[Tensor], infill: list[Tensor] | None, problem: str
) -> None:
    backbone = tiny_backbone(model_block=model_block)
    with watch_passes(backbone) as passes, pytest.raises(DllmError) as caught:
        generate(backbone, rows, settings(**options), infill_mask=infill)
    first, second = str(caught.value).split("\n")
    assert problem in first
    assert second
    assert passes.tokens == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_denoising_steps": 0}, "max_denoising_steps=0"),
        ({"max_denoising_steps": -3}, "max_denoising_steps=-3"),
        ({"max_denoising_steps": True}, "max_denoising_steps=True"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"sampler_config": "greedy"}, "Unknown sampler 'greedy'"),
        ({"sampler_config": {"name": "nothing", "threshold": 0.5}}, "Unknown sampler 'nothing'"),
        ({"cache": "exactly"}, "Unknown cache 'exactly'"),
        ({"block_size": 0}, "block_size=0"),
    ],
)
def test_settings_that_no_model_takes_are_refused_by_themselves(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(DllmError) as caught:
        DiffusionGenerationConfig(**options)
    first, second = str(caught.value).split("\n")
    assert problem in first
    assert second


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "delayed"])
def test_nothing_to_fill_is_no_error_whatever_the_blocks(cache: str) -> None:
    (row,) = prompts(5)
    out = generate(
        tiny_backbone(layers=1),
        [row],
        settings(cache=cache, block_size=4),
        infill_mask=[torch.zeros(5, dtype=torch.bool)],
    )
    assert (out.num_forwards, out.new_tokens) == (0, [0])
    assert torch.equal(out.sequences[0], row)
