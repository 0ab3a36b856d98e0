"""Acceptance rules: which drafted tokens stand after a denoising step. B batch, C canvas length.

              +-----------------------+
              | initialize_canvas     |
              | given tokens and [M]s |
              +-----------+-----------+
                          v
              +-----------+-----------+      +-------------------------------+
    +-------->| canvas                |----->| draft: a token and its scores |
    |         +-----------------------+      | for every candidate           |
    |                                        +---------------+---------------+
    |         +-----------------------+                      v
    +---------| renoise: [M] where    |<-----+---------------+---------------+
              | a candidate fails     |      | accept: exact count per row   |
              +-----------------------+      +-------------------------------+

Scores are taken at temperature 1 whatever the sampling temperature, and ties break by position, the left one first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from dllm_core.samplers.config import (
    EntropyBoundSamplerConfig,
    EntropyThresholdSamplerConfig,
    FactorSamplerConfig,
    SamplerConfig,
    ThresholdSamplerConfig,
)


@dataclass(frozen=True)
class Draft:
    """What the denoiser proposes. Values are meaningful at candidates only.

    Attributes:
        candidate_BC: bool; positions that compete for acceptance.
        token_BC: int64; the proposed token, at a placed candidate the token it holds.
        logprob_BC: fp32; log-probability of that token at temperature 1, in nats.
        margin_BC: fp32; probability of the best token minus that of the second best.
        entropy_BC: fp32; entropy of the prediction at temperature 1, in nats.
        priority_BC: fp32; random numbers fixed for the whole decode.
        place_BC: int64; number of the position among those to fill in its block, from 0.
    """

    candidate_BC: Tensor
    token_BC: Tensor
    logprob_BC: Tensor
    margin_BC: Tensor | None = None
    entropy_BC: Tensor | None = None
    priority_BC: Tensor | None = None
    place_BC: Tensor | None = None


def order_candidates(score_BC: Tensor, candidate_BC: Tensor) -> Tensor:
    """Return positions by falling score, int64 [B, C]: candidates first, of equals the left one first."""
    lowest = torch.finfo(score_BC.dtype).min  # so that a score of -inf still ranks above no candidate at all
    ranked_BC = torch.where(candidate_BC, score_BC.clamp(min=lowest), -torch.inf)
    return ranked_BC.argsort(dim=-1, descending=True, stable=True)


def best_candidates(score_BC: Tensor, candidate_BC: Tensor, keep_B: Tensor) -> Tensor:
    """Return the `keep_B` best-scored candidates of each row as bool [B, C]; of equals, the left one."""
    order_BC = order_candidates(score_BC, candidate_BC)
    place_C = torch.arange(score_BC.shape[1], device=score_BC.device)
    rank_BC = torch.empty_like(order_BC).scatter_(1, order_BC, place_C.expand_as(order_BC))
    return candidate_BC & (rank_BC < keep_B[:, None])


class AcceptanceRule(ABC):
    """One way to choose. Stateless; the plan says how many.

    Attributes:
        needs: what the denoiser has to report besides token and log-probability: margin, entropy, priority.
        adaptive: the number accepted depends on the scores; otherwise it is known in advance.
        revises: placed tokens compete again and may be masked anew.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    adaptive: ClassVar[bool] = False
    revises: ClassVar[bool] = False

    def __init__(self, config: SamplerConfig) -> None:
        self.config = config

    def initialize_canvas(self, input_ids_BC: Tensor, to_fill_BC: Tensor, mask_token_id: int) -> Tensor:
        """Return the first canvas: the mask token wherever a token is to be generated."""
        return torch.where(to_fill_BC, mask_token_id, input_ids_BC)

    def candidates(self, masked_BC: Tensor, active_BC: Tensor) -> Tensor:
        """Return the positions that compete in this step, given what is masked and the active blocks."""
        return active_BC if self.revises else active_BC & masked_BC

    @abstractmethod
    def score(self, draft: Draft) -> Tensor:
        """Return fp32 [B, C]; higher is accepted first."""

    def accept(self, draft: Draft, keep_B: Tensor) -> Tensor:
        """Return the candidates that stand, bool [B, C]: exactly `keep_B` of each row."""
        return best_candidates(self.score(draft), draft.candidate_BC, keep_B)

    def renoise(
        self, canvas_BC: Tensor, masked_BC: Tensor, draft: Draft, accepted_BC: Tensor, mask_token_id: int
    ) -> tuple[Tensor, Tensor]:
        """Return the next canvas and its masked positions: candidates that were not accepted carry the mask."""
        placed_BC = torch.where(accepted_BC, draft.token_BC, mask_token_id)
        return (
            torch.where(draft.candidate_BC, placed_BC, canvas_BC),
            torch.where(draft.candidate_BC, ~accepted_BC, masked_BC),
        )


class RandomRule(AcceptanceRule):
    """A random order, drawn once per sample."""

    needs = frozenset({"priority"})

    def score(self, draft: Draft) -> Tensor:
        assert draft.priority_BC is not None
        return draft.priority_BC


class ConfidenceRule(AcceptanceRule):
    """Highest log-probability of the drafted token first (arXiv 2202.04200)."""

    def score(self, draft: Draft) -> Tensor:
        return draft.logprob_BC


class MarginRule(AcceptanceRule):
    """Largest p(best) - p(second best) first (arXiv 2502.06768)."""

    needs = frozenset({"margin"})

    def score(self, draft: Draft) -> Tensor:
        assert draft.margin_BC is not None
        return draft.margin_BC


class EntropyRule(AcceptanceRule):
    """Lowest entropy first (arXiv 2508.15487)."""

    needs = frozenset({"entropy"})

    def score(self, draft: Draft) -> Tensor:
        assert draft.entropy_BC is not None
        return -draft.entropy_BC


class P2Rule(ConfidenceRule):
    """Fresh and placed tokens of the block compete; the count that stands grows with every step (arXiv 2502.03540).

    A placed token's score is its own probability under the present canvas, not that of a new draw; a placed token
    that stands keeps its value. The last step keeps everything.
    """

    revises = True


class AdaptiveRule(AcceptanceRule):
    """Accepts what its scores allow, and `keep_B` in any case, so that every pass gets somewhere."""

    adaptive = True

    @abstractmethod
    def certain(self, draft: Draft) -> Tensor:
        """Return the candidates that the scores alone let through, bool [B, C]."""

    def accept(self, draft: Draft, keep_B: Tensor) -> Tensor:
        """Return the candidates that stand, bool [B, C]: at least the `keep_B` best of each row."""
        return self.certain(draft) | super().accept(draft, keep_B)

    def accept_in_blocks(self, draft: Draft, ahead_BC: Tensor, keep_BK: Tensor) -> Tensor:
        """Return the candidates that stand, bool [B, C]: of the k-th active block at least the `keep_BK[:, k]` best.

        Args:
            draft: candidates of several blocks.
            ahead_BC: int64; by how many blocks each position is ahead of the leftmost active one.
            keep_BK: int64; how many to accept in any case.
        """
        accepted_BC, score_BC = self.certain(draft), self.score(draft)
        for k, keep_B in enumerate(keep_BK.unbind(1)):
            accepted_BC = accepted_BC | best_candidates(score_BC, draft.candidate_BC & (ahead_BC == k), keep_B)
        return accepted_BC


class ThresholdRule(AdaptiveRule, ConfidenceRule):
    """Every token with p >= threshold, and the `keep_B` most confident whatever their p (arXiv 2505.22618)."""

    def certain(self, draft: Draft) -> Tensor:
        assert isinstance(self.config, ThresholdSamplerConfig)
        threshold = self.config.threshold
        if not isinstance(threshold, tuple):
            return draft.candidate_BC & (draft.logprob_BC >= log(threshold))
        assert draft.place_BC is not None
        limit_P = torch.tensor([log(t) for t in threshold]).to(draft.place_BC.device, non_blocking=True)
        return draft.candidate_BC & (draft.logprob_BC >= limit_P[draft.place_BC])


class FactorRule(AdaptiveRule, ConfidenceRule):
    """The n most confident tokens while (n + 1)(1 - p_n) <= factor; the first one in any case (arXiv 2505.22618)."""

    def certain(self, draft: Draft) -> Tensor:
        assert isinstance(self.config, FactorSamplerConfig)
        order_BC = order_candidates(self.score(draft), draft.candidate_BC)
        p_BC = draft.logprob_BC.gather(1, order_BC).exp()
        n_C = torch.arange(1, p_BC.shape[1] + 1, device=p_BC.device)
        allowed_BC = ((n_C + 1) * (1 - p_BC) <= self.config.factor) | (n_C == 1)
        return _prefix(allowed_BC, order_BC) & draft.candidate_BC


class EntropyThresholdRule(AdaptiveRule, EntropyRule):
    """Every token with entropy <= threshold, and the `keep_B` lowest whatever theirs (arXiv 2601.07568)."""

    def certain(self, draft: Draft) -> Tensor:
        assert isinstance(self.config, EntropyThresholdSamplerConfig)
        assert draft.entropy_BC is not None
        return draft.candidate_BC & (draft.entropy_BC <= self.config.entropy_threshold)


class EntropyBoundRule(AdaptiveRule, EntropyRule):
    """The tokens of lowest entropy while the entropies before them sum up to the bound at most (arXiv 2505.24857)."""

    def certain(self, draft: Draft) -> Tensor:
        assert isinstance(self.config, EntropyBoundSamplerConfig)
        assert draft.entropy_BC is not None
        order_BC = order_candidates(self.score(draft), draft.candidate_BC)
        entropy_BC = draft.entropy_BC.double().gather(1, order_BC)
        before_BC = entropy_BC.cumsum(-1) - entropy_BC
        return _prefix(before_BC <= self.config.entropy_bound, order_BC) & draft.candidate_BC


def _prefix(allowed_BC: Tensor, order_BC: Tensor) -> Tensor:
    """Return, at their positions, the entries in order before the first that is not allowed."""
    return torch.zeros_like(allowed_BC).scatter_(1, order_BC, allowed_BC.cumprod(-1).bool())


RULES: dict[str, type[AcceptanceRule]] = {
    "random": RandomRule,
    "confidence": ConfidenceRule,
    "margin": MarginRule,
    "entropy": EntropyRule,
    "p2": P2Rule,
    "threshold": ThresholdRule,
    "factor": FactorRule,
    "entropy_bound": EntropyBoundRule,
    "entropy_threshold": EntropyThresholdRule,
}


def acceptance_rule(config: SamplerConfig) -> AcceptanceRule:
    """Return the rule that the settings name."""
    return RULES[config.name](config)
