"""Acceptance rules and token drawing on their own."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.contract import Contract
from dllm_core.backbone.passes.protocol import real_head
from dllm_core.samplers.acceptance import RULES, Draft, acceptance_rule, best_candidates
from dllm_core.samplers.config import SAMPLERS, DiffusionGenerationConfig, sampler_config
from dllm_core.samplers.denoise import invert_cdf, propose


class Head:
    """The part of a backbone that `propose` reads: the states are the logits."""

    def __init__(self, rows: int, num_tokens: int) -> None:
        self.head_weight_VD = torch.eye(rows)
        self.contract = Contract(mask_token_id=num_tokens, num_tokens=num_tokens)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        blocked_V = torch.arange(len(self.head_weight_VD)) >= self.contract.num_tokens
        return F.linear(hidden_MD, self.head_weight_VD).masked_fill(blocked_V, -torch.inf)


def head(rows: int = 130, num_tokens: int = 97) -> Backbone:
    return cast(Backbone, Head(rows, num_tokens))


def draft(score: list[float], candidate: list[bool] | None = None) -> Draft:
    """Return a one-row draft in which every score says the same."""
    score_BC = torch.tensor([score])
    candidate_BC = torch.ones_like(score_BC, dtype=torch.bool) if candidate is None else torch.tensor([candidate])
    token_BC = torch.arange(len(score))[None] + 10
    return Draft(candidate_BC, token_BC, score_BC, score_BC, -score_BC, score_BC)


def test_ties_break_by_position_left_first() -> None:
    kept = best_candidates(torch.zeros(1, 200), torch.arange(200)[None] % 3 == 1, torch.tensor([5]))
    assert kept[0].nonzero()[:, 0].tolist() == [1, 4, 7, 10, 13]


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
def test_count_is_exact_whatever_the_scores(bad: float) -> None:
    """A diverged model gives nan or -inf; the loop must still end, so the count must still be met."""
    score_BC = torch.full((2, 9), bad)
    candidate_BC = torch.arange(9).expand(2, 9) >= 4
    assert best_candidates(score_BC, candidate_BC, torch.tensor([3, 5])).sum(-1).tolist() == [3, 5]


@pytest.mark.parametrize("rule", [r for r in SAMPLERS if not RULES[r].adaptive])
def test_scheduled_rules_accept_exactly_the_count(rule: str) -> None:
    found = acceptance_rule(sampler_config(rule)).accept(draft([-3.0, -1.0, -2.0, -0.5]), torch.tensor([2]))
    assert found.tolist() == [[False, True, False, True]]


def test_threshold_takes_all_above_and_always_the_best() -> None:
    rule = acceptance_rule(sampler_config({"name": "threshold", "threshold": 0.5}))
    logs = torch.tensor([0.6, 0.4, 0.5, 0.7]).log().tolist()
    assert rule.accept(draft(logs), torch.tensor([1])).tolist() == [[True, False, True, True]]
    assert rule.accept(draft([-5.0, -4.0, -6.0]), torch.tensor([1])).tolist() == [[False, True, False]]
    candidate = [False, True, True, False]
    assert rule.accept(draft(logs, candidate), torch.tensor([1])).tolist() == [[False, False, True, False]]


def test_renoise_masks_rejected_candidates_and_touches_nothing_else() -> None:
    rule = acceptance_rule(sampler_config("p2"))
    proposal = draft([-1.0, -2.0, -3.0, -4.0], [True, True, False, False])
    canvas, masked = rule.renoise(
        torch.tensor([[1, 2, 3, 99]]),
        torch.tensor([[False, False, False, True]]),
        proposal,
        torch.tensor([[True, False, False, False]]),
        99,
    )
    assert canvas.tolist() == [[10, 99, 3, 99]]
    assert masked.tolist() == [[False, True, False, True]]


# -- drafting ---------------------------------------------------------------------------------------------------

NEEDS = frozenset({"margin", "entropy"})


def test_scores_are_those_of_temperature_one() -> None:
    logits = 3 * torch.randn(40, 130)
    oracle = torch.distributions.Categorical(logits=logits[:, :97].double())
    best = oracle.probs.topk(2).values
    for temperature, rows in ((0.0, None), (0.0, real_head(head())), (0.3, None), (2.0, None)):
        found = propose(
            head(),
            logits,
            DiffusionGenerationConfig(temperature=temperature),
            NEEDS,
            uniform_M=torch.rand(40, dtype=torch.float64),
            head_WD=rows,
        )
        assert found.margin_M is not None
        assert found.entropy_M is not None
        torch.testing.assert_close(found.logprob_M.double(), oracle.log_prob(found.token_M), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.margin_M.double(), best[:, 0] - best[:, 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.entropy_M.double(), oracle.entropy(), atol=1e-5, rtol=1e-5)


def test_temperature_does_not_change_the_order_of_confidences() -> None:
    """At a low temperature the draw is the argmax, and its confidence must not have been sharpened."""
    logits = 3 * torch.randn(40, 130)
    cold, greedy = (
        propose(
            head(), logits, DiffusionGenerationConfig(temperature=t), NEEDS, uniform_M=torch.rand(40).double()
        ).logprob_M
        for t in (1e-3, 0.0)
    )
    torch.testing.assert_close(cold, greedy)
    assert cold.exp().max() < 0.999


def test_placed_tokens_are_scored_and_kept() -> None:
    logits = torch.randn(3, 130)
    placed = torch.tensor([5, -1, 96])
    found = propose(head(), logits, DiffusionGenerationConfig(), frozenset(), placed_M=placed)
    expected = logits[:, :97].log_softmax(-1)
    assert found.token_M.tolist() == [5, int(expected[1].argmax()), 96]
    torch.testing.assert_close(found.logprob_M, expected[range(3), found.token_M])


@pytest.mark.parametrize("options", [{}, {"top_k": 200}, {"top_p": 1.0}, {"top_k": 97, "top_p": 1.0}])
def test_draws_follow_the_distribution_and_never_leave_the_real_tokens(options: dict[str, float]) -> None:
    """Systematic draws (one per stratum) hit each token within one of its expected number."""
    count = 20_000
    logits = torch.randn(1, 130)
    logits[:, 97:] = 30.0  # blocked rows would win everything
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    config = DiffusionGenerationConfig(temperature=0.7, **options)  # type: ignore[arg-type]
    token = propose(head(), logits.expand(count, 130), config, frozenset(), uniform_M=uniform).token_M
    expected = count * (logits[0, :97].double() / 0.7).softmax(-1)
    assert int(token.max()) < 97
    assert ((torch.bincount(token, minlength=97) - expected).abs() <= 1.01).all()


@pytest.mark.parametrize("options", [{}, {"top_k": 97}, {"top_p": 1.0}])
@pytest.mark.parametrize("scheduled", [False, True])
def test_temperatures_that_fp32_cannot_hold(options: dict[str, float], scheduled: bool) -> None:
    """The coldest draws the most probable token, the hottest every real one equally often."""
    count = 97 * 40
    logits = torch.randn(1, 130)
    logits[:, 97:] = 30.0
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for temperature in (1e-46, 1e-300, 1e39, 1e300):
        config = DiffusionGenerationConfig(temperature=temperature, **options)  # type: ignore[arg-type]
        of_rows = torch.tensor([temperature]).expand(count) if scheduled else None
        token = propose(
            head(), logits.expand(count, 130), config, frozenset(), uniform_M=uniform, temperature_M=of_rows
        ).token_M
        if temperature < 1:
            assert token.unique().tolist() == [int(logits[0, :97].argmax())]
        else:
            assert ((torch.bincount(token, minlength=97) - 40).abs() <= 1).all()


def test_inverse_of_the_cumulative_at_its_ends() -> None:
    """Rounding must not select an index of weight 0, at 0 or just below 1, in any group."""
    weight = torch.zeros(1, 300)
    weight[0, [70, 71, 200]] = torch.tensor([1e-30, 1.0, 3e-8])
    last = 1 - 2**-53
    found = [int(invert_cdf(weight, torch.tensor([u], dtype=torch.float64))) for u in (0.0, 1e-31, 0.5, last)]
    assert found == [70, 70, 71, 200]
    uniform = torch.linspace(0, last, 4001, dtype=torch.float64)
    found = invert_cdf(weight.expand(4001, 300), uniform).tolist()
    assert set(found) <= {70, 71, 200}
    assert all(a <= b for a, b in pairwise(found))


@pytest.mark.parametrize("options", [{}, {"top_k": 5}])
def test_a_diverged_model_still_gives_real_tokens(options: dict[str, int]) -> None:
    """All nan: no index lies above the target, and the loop must neither crash nor emit a blocked id."""
    config = DiffusionGenerationConfig(temperature=1.0, **options)  # type: ignore[arg-type]
    logits = torch.full((3, 130), torch.nan)
    found = propose(head(), logits, config, frozenset(), uniform_M=torch.rand(3, dtype=torch.float64))
    assert int(found.token_M.max()) < 97


def test_top_k_and_top_p_keep_what_they_say() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    uniform = torch.linspace(0, 0.999, 200, dtype=torch.float64)

    def kept(**options: float) -> set[int]:
        config = DiffusionGenerationConfig(temperature=1.0, **options)  # type: ignore[arg-type]
        rows = logits.expand(200, 4)
        return set(propose(head(4, 4), rows, config, frozenset(), uniform_M=uniform).token_M.tolist())

    assert kept(top_k=2) == {0, 1}
    assert kept(top_p=0.5) == {0}
    assert kept(top_p=0.51) == {0, 1}
    assert kept(top_p=1e-9) == {0}
    assert kept(top_k=3, top_p=0.9) == {0, 1, 2}
    assert kept() == {0, 1, 2, 3}
