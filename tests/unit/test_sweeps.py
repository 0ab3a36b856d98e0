"""Sweeps over steps and rules on tiny models: against naive decodes in plain loops, one text at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dllm_core.backbone.backbone import Backbone
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.evals.frontier import frontier
from dllm_core.evals.gaps import Gaps, middle_gaps, random_gaps
from dllm_core.evals.judge import BaseJudge
from dllm_core.evals.parallelism import ParallelismSweep, parallelism
from dllm_core.evals.prompts import Prompts, prompts_of
from dllm_core.evals.step_sweep import StepSweep, step_sweep
from dllm_core.methods.protocol import Method
from dllm_core.methods.registry import room_method, room_options
from tests.sequences import random_sequences
from tests.tiny import NUM_TOKENS, tiny_backbone

PROMPT, NEW, GAP = 8, 16, 8
GROUPS = (0, 0, 1, 1)


def method_of(room: str, backbone: Backbone, **options: object) -> Method:
    return room_method(room)(backbone, room_options(room)(**options)).eval()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_sequences(4, PROMPT + NEW, PROMPT, NUM_TOKENS, seed=3).batch_of(range(4))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


# -- texts that the model gets right in part --------------------------------------------------------------------------


def confident(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor, per_pass: list[int]) -> torch.Tensor:
    """Fill masks by confidence, so many tokens a pass, with the plain forward and float64 probabilities."""
    canvas, open_places = ids.clone(), mask.clone()
    for count in per_pass:
        canvas[open_places] = backbone.contract.mask_token_id
        p, best = _predict(backbone, canvas)
        order = sorted(open_places.nonzero()[:, 0].tolist(), key=lambda i: (-float(p[i]), i))
        for place in order[:count]:
            canvas[place] = best[place]
            open_places[place] = False
    return canvas[mask]


def _predict(backbone: Backbone, canvas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (largest probability, its token) of every place; the state before a place predicts it."""
    with torch.no_grad():
        logits = backbone.logits(backbone.hidden(canvas[None], causal=False)[0]).double()
    p, best = logits.softmax(-1).max(-1)
    return torch.cat((p[:1], p[:-1])), torch.cat((best[:1], best[:-1]))


def partly_known(backbone: Backbone, gaps: Gaps) -> Gaps:
    """Put what the model writes at two tokens a pass into every other missing place: what is missing is not read."""
    texts = []
    for ids, mask in zip(gaps.ids, gaps.masks, strict=True):
        written = confident(backbone, ids, mask, [2] * (int(mask.sum()) // 2))
        truth = torch.where(torch.arange(len(written)) % 2 == 0, written, ids[mask])
        texts.append(ids.masked_scatter(mask, truth))
    return replace(gaps, ids=tuple(texts))


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gaps(backbone: Backbone, batch: Batch) -> Gaps:
    return partly_known(backbone, middle_gaps(batch, GAP, GROUPS))


@pytest.fixture(scope="module")
def prompts(batch: Batch) -> Prompts:
    return replace(prompts_of(batch, prompt_tokens=PROMPT, response_tokens=NEW, limit=4), groups=GROUPS)


SWEEP = StepSweep(steps=(2, 4, 64), temperatures=(0.7,), new_tokens=NEW, batch_size=3)


def swept(method: Method, prompts: Prompts, gaps: Gaps, sweep: StepSweep = SWEEP, **more: Any) -> dict[str, Any]:
    return step_sweep(method, prompts, gaps, BaseJudge(tiny_backbone("llama", seed=1)), NoiseSource(0), sweep, **more)


def test_text_is_that_of_the_frontier_at_each_number_of_steps(backbone: Backbone, prompts: Prompts, gaps: Gaps) -> None:
    method = method_of("random_mask", backbone)
    found = swept(method, prompts, gaps)
    assert list(found["frontier"]) == ["2", "4", "16"], "more steps than tokens are one a token"
    for steps, (point,) in found["frontier"].items():
        other = frontier(
            method,
            prompts,
            BaseJudge(tiny_backbone("llama", seed=1)),
            NoiseSource(0),
            temperatures=[0.7],
            new_tokens=NEW,
            steps=int(steps),
            batch_size=3,
        ).points[0]
        assert {k: v for k, v in point.items() if k in other} == {k: v for k, v in other.items() if k in point}
        assert set(other) - set(point) == {"steps"}
        assert point["num_forwards"] == int(steps)
        assert point["tokens_per_forward"] == NEW / int(steps)
        assert point["eval_tokens_per_s"] > 0
    assert json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(("steps", "per_pass"), [("2", [8]), ("4", [4, 4]), ("16", [1] * 8)])
def test_gaps_are_filled_at_the_tokens_per_forward_of_the_steps(
    backbone: Backbone, prompts: Prompts, gaps: Gaps, steps: str, per_pass: list[int]
) -> None:
    """4 steps for 16 tokens are 4 a pass, so 8 missing ones take 2 passes."""
    point = swept(method_of("random_mask", backbone), prompts, gaps)["infill"][steps]
    right = sum(
        int((confident(backbone, ids, mask, per_pass) == ids[mask]).sum())
        for ids, mask in zip(gaps.ids, gaps.masks, strict=True)
    )
    assert right > 0
    assert point["accuracy"]["value"] == right / (4 * GAP)
    assert (point["num_forwards"], point["tokens_per_forward"]) == (len(per_pass), GAP / len(per_pass))
    assert point["accuracy_gain"]["value"] == pytest.approx(point["accuracy"]["value"] - point["accuracy_other"])


def test_a_row_that_knows_its_text_fills_it_in(backbone: Backbone, prompts: Prompts, gaps: Gaps) -> None:
    """A model that cannot be wrong: the accuracy is 1, the control stays where chance puts it."""
    method = method_of("random_mask", backbone)
    answers = dict(enumerate(gaps.ids))

    def cheat(texts: Any, masks: Any, config: Any, *, sample_ids: Any = None) -> Any:
        output = type(method).fill(method, texts, masks, config, sample_ids=sample_ids)
        output.sequences = [answers[i].clone() for i in sample_ids]
        return output

    method.fill = cheat  # type: ignore[method-assign]
    for point in swept(method, prompts, gaps)["infill"].values():
        assert point["accuracy"] == {"value": 1.0, "se": 0.0}
        assert point["accuracy_other"] < 0.2
        assert point["overlap_1"] == 1.0


def test_a_causal_row_knows_no_steps(backbone: Backbone, prompts: Prompts, gaps: Gaps) -> None:
    found = swept(method_of("ar", backbone, tuned=True), prompts, gaps)
    assert list(found["frontier"]) == list(found["infill"]) == ["ar"]
    assert found["infill_context"] == "left"
    assert found["infill"]["ar"]["tokens_per_forward"] == found["frontier"]["ar"][0]["tokens_per_forward"] == 1.0


def timeless(found: dict[str, Any]) -> str:
    kept = json.loads(json.dumps(found))
    for points in kept["frontier"].values():
        for point in points:
            del point["eval_tokens_per_s"]
    return json.dumps({k: v for k, v in kept.items() if k != "batch_size"})


@pytest.mark.parametrize("room", ["random_mask", "block_causal", "ar"])
def test_the_same_seed_gives_the_same_in_any_batch(room: str, prompts: Prompts, gaps: Gaps) -> None:
    options = {"block_causal": {"block_size": 4}, "ar": {"tuned": True}}.get(room, {})
    method = method_of(room, tiny_backbone("llama", model_block=options.get("block_size")), **options)
    first = swept(method, prompts, gaps)
    assert timeless(swept(method, prompts, gaps)) == timeless(first)
    alone = swept(method, prompts, gaps, replace(SWEEP, batch_size=1))
    for steps, gap in first["infill"].items():
        assert alone["infill"][steps]["accuracy"] == pytest.approx(gap["accuracy"])
        assert alone["infill"][steps]["num_forwards"] == gap["num_forwards"]
    assert [p["judge_ppl"] for v in alone["frontier"].values() for p in v] == pytest.approx(
        [p["judge_ppl"] for v in first["frontier"].values() for p in v]
    )


def test_work_is_counted_beforehand(backbone: Backbone, prompts: Prompts, gaps: Gaps) -> None:
    for room, options in (("random_mask", {}), ("ar", {"tuned": True})):
        method, done = method_of(room, backbone, **options), []
        swept(method, prompts, gaps, on_done=done.append)
        assert sum(done) == SWEEP.work(method.capabilities, prompts, gaps)


# -- rules ------------------------------------------------------------------------------------------------------------

RULES = ParallelismSweep(
    tokens_per_forward=(1, 4, 8),
    thresholds=(0.9, 0.06, 0.03),
    factors=(1.9, 6.0),
    entropy_thresholds=(3.6, 4.2),
    block_size=4,
    block_add_thresholds=(1.0, 0.25),
    batch_size=3,
)


@pytest.fixture(scope="module")
def tasks(backbone: Backbone, batch: Batch, gaps: Gaps) -> dict[str, Gaps]:
    return {"masked": partly_known(backbone, random_gaps(batch, 0.5, NoiseSource(0), GROUPS)), "infill": gaps}


@pytest.fixture(scope="module")
def curves(backbone: Backbone, tasks: dict[str, Gaps]) -> dict[str, Any]:
    return parallelism(method_of("random_mask", backbone), tasks, RULES)


def naive(
    backbone: Backbone,
    ids: torch.Tensor,
    mask: torch.Tensor,
    accepts: Callable[[list[tuple[float, float, int]]], int],
    by_entropy: bool = False,
    block: int | None = None,
) -> tuple[torch.Tensor, int]:
    """Fill masks with a rule that says how many of the best candidates stand; return the tokens and the passes."""
    canvas, passes = ids.clone(), 0
    places = mask.nonzero()[:, 0].tolist()
    canvas[mask] = backbone.contract.mask_token_id
    size = block or len(places)
    for start in range(0, len(places), size):
        left = places[start : start + size]
        while left:
            with torch.no_grad():
                logits = backbone.logits(backbone.hidden(canvas[None], causal=False)[0])[:, :NUM_TOKENS].double()
            p_LV = logits.softmax(-1)
            told = []
            for place in left:
                p_V = p_LV[place - 1]
                told.append((float(p_V.max()), float(-(p_V * p_V.log()).sum()), place))
            told.sort(key=lambda t: (t[1] if by_entropy else -t[0], t[2]))
            passes += 1
            for _, _, place in told[: max(1, accepts(told))]:
                canvas[place] = int(p_LV[place - 1].argmax())
                left.remove(place)
    return canvas[mask], passes


def _by_factor(factor: float) -> Callable[[list[tuple[float, float, int]]], int]:
    def accepts(told: list[tuple[float, float, int]]) -> int:
        count = 0
        while count < len(told) and (count + 2) * (1 - told[count][0]) <= factor:
            count += 1
        return count

    return accepts


ORACLES: dict[str, Callable[[float], dict[str, Any]]] = {
    "fixed": lambda k: {"accepts": lambda told: int(k)},
    "threshold": lambda t: {"accepts": lambda told: sum(p >= t for p, _, _ in told)},
    "factor": lambda f: {"accepts": _by_factor(f)},
    "blocks": lambda h: {"accepts": lambda told: sum(e <= h for _, e, _ in told), "by_entropy": True, "block": 4},
}


@pytest.mark.parametrize("task", ["masked", "infill"])
@pytest.mark.parametrize("rule", list(ORACLES))
def test_every_point_is_that_of_a_plain_loop(
    backbone: Backbone, tasks: dict[str, Gaps], curves: dict[str, Any], rule: str, task: str
) -> None:
    """Overlapping blocks are the samplers' own business and tested there: here the next block joins at 1."""
    gaps = tasks[task]
    (curve,) = [
        c
        for c in curves["curves"]
        if (c["rule"], c["task"]) == (rule, task) and c["block_add_threshold"] in (None, 1.0)
    ]
    passes_seen, right_seen = set(), set()
    for point in curve["points"]:
        done = [
            naive(backbone, ids, mask, **ORACLES[rule](point["setting"]))
            for ids, mask in zip(gaps.ids, gaps.masks, strict=True)
        ]
        right = [float((t == ids[mask]).sum()) for (t, _), ids, mask in zip(done, gaps.ids, gaps.masks, strict=True)]
        assert point["per_sequence"]["right"] == right
        assert point["per_sequence"]["forwards"] == [passes for _, passes in done]
        assert point["accuracy"]["value"] == pytest.approx(sum(right) / (4 * GAP))
        assert point["tokens_per_forward"]["value"] == pytest.approx(4 * GAP / sum(p for _, p in done))
        passes_seen.add(sum(p for _, p in done))
        right_seen.add(sum(right))
    assert len(passes_seen) > 1, "the setting makes a difference"
    assert max(right_seen) > 0


def test_blocks_that_join_early_need_no_more_passes(curves: dict[str, Any]) -> None:
    by_join: dict[float, list[float]] = {}
    for curve in curves["curves"]:
        if curve["rule"] == "blocks":
            told = [p["tokens_per_forward"]["value"] for p in curve["points"]]
            by_join.setdefault(curve["block_add_threshold"], []).extend(told)
    assert all(early >= late for early, late in zip(by_join[0.25], by_join[1.0], strict=True))
    assert sum(by_join[0.25]) > sum(by_join[1.0])


def test_errors_are_clustered_by_document(curves: dict[str, Any]) -> None:
    point = curves["curves"][0]["points"][0]
    right, tokens = point["per_sequence"]["right"], point["per_sequence"]["tokens"]
    share = sum(right) / sum(tokens)
    residuals = [sum(right[i] - share * tokens[i] for i in range(4) if GROUPS[i] == g) for g in (0, 1)]
    assert point["accuracy"]["se"] == pytest.approx(math.sqrt(2 * sum(r * r for r in residuals)) / sum(tokens))
    assert point["per_sequence"]["groups"] == list(GROUPS)


def test_what_does_not_apply_is_absent_with_a_reason(backbone: Backbone, tasks: dict[str, Gaps]) -> None:
    found = parallelism(method_of("ar", backbone, tuned=True), tasks, RULES)
    assert found["curves"] == []
    assert "token by token" in found["absent"]
    assert RULES.work(method_of("ar", backbone, tuned=True).capabilities, tasks) == 0


def test_a_block_causal_row_has_curves_of_its_own_kind(tasks: dict[str, Gaps]) -> None:
    method = method_of("block_causal", tiny_backbone("llama", model_block=4), block_size=4)
    done: list[int] = []
    found = parallelism(method, tasks, RULES, done.append)
    assert found["context"] == "left and own block"
    assert len(found["curves"]) == 2 * 5
    assert sum(done) == RULES.work(method.capabilities, tasks)


def test_empty_lists_give_no_curve() -> None:
    few = replace(RULES, thresholds=(), tokens_per_forward=(), block_add_thresholds=())
    assert [c.rule for c in few.curves] == ["factor"]
