"""From hidden states to drafted tokens and their scores. M scored rows, V vocabulary, K kept tokens.

The head runs on the scored rows alone, a few rows at a time, so that no [M, V] tensor exists. Scores are always those
of the model's own distribution (temperature 1); temperature, top-k and top-p shape only what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_core.kernels import token_stats

if TYPE_CHECKING:
    from dllm_core.backbone.backbone import Backbone
    from dllm_core.samplers.config import DiffusionGenerationConfig

GROUP = 64  # tokens per group in the two-level inverse of the cumulative distribution
CHUNK_ROWS = 32
COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures beyond these are taken as these: fp32 would divide by 0 or by infinity, and blocked ids become NaN."""


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens of M rows.

    Attributes:
        token_M: int64.
        logprob_M: fp32 log-probability of the token at temperature 1, in nats.
        margin_M: fp32; p(best) - p(second best).
        entropy_M: fp32, in nats.
    """

    token_M: Tensor
    logprob_M: Tensor
    margin_M: Tensor | None
    entropy_M: Tensor | None


def propose(
    backbone: Backbone,
    hidden_MD: Tensor,
    config: DiffusionGenerationConfig,
    needs: frozenset[str],
    *,
    uniform_M: Tensor | None = None,
    placed_M: Tensor | None = None,
    unconditional_MD: Tensor | None = None,
    temperature_M: Tensor | None = None,
    head_WD: Tensor | None = None,
) -> Proposal:
    """Draft a token for every row and score it.

    Args:
        backbone: reads the states out.
        hidden_MD: states that predict the rows.
        config: temperature, top_k, top_p.
        needs: "margin" and "entropy" where the rule wants them.
        uniform_M: float64 in [0, 1), one draw per row; needed at temperature > 0.
        placed_M: int64; token a row already holds, which is scored instead of a new draft, -1 for none.
        unconditional_MD: with guidance, the states of the canvas without its given tokens.
        temperature_M: fp32 > 0, in place of `config.temperature`; for schedules.
        head_WD: rows of the head that stand for tokens, as a decoder pass has them: lets one pass over the vocabulary
            find token and scores where that is all there is to do.
    """
    if head_WD is not None and config.is_greedy and placed_M is None and unconditional_MD is None:
        return _most_probable(head_WD, hidden_MD, needs)
    parts = []
    for start in range(0, len(hidden_MD), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logits_MV = read_out(backbone, hidden_MD, unconditional_MD, config.guidance_scale, rows)
        token_M = draw_tokens(
            logits_MV,
            config,
            None if uniform_M is None else uniform_M[rows],
            None if temperature_M is None else temperature_M[rows],
        )
        if placed_M is not None:
            token_M = torch.where(placed_M[rows] >= 0, placed_M[rows], token_M)
        parts.append(_score(logits_MV, token_M, needs))
    token, logprob, margin, entropy = zip(*parts, strict=True)
    return Proposal(
        torch.cat(token),
        torch.cat(logprob),
        torch.cat(margin) if "margin" in needs else None,
        torch.cat(entropy) if "entropy" in needs else None,
    )


def read_out(
    backbone: Backbone, hidden_MD: Tensor, unconditional_MD: Tensor | None, scale: float, rows: slice
) -> Tensor:
    """Return fp32 logits of some rows, guided where there are unconditional states; blocked rows are -inf."""
    logits_MV = backbone.logits(hidden_MD[rows])
    if unconditional_MD is not None:
        # of real tokens alone: blocked ones are -inf on both sides, whose difference is NaN
        real_MV = logits_MV[:, : backbone.contract.num_tokens]
        real_MV.sub_(without_MV := backbone.logits(unconditional_MD[rows])[:, : real_MV.shape[1]])
        real_MV.mul_(scale).add_(without_MV)
    return logits_MV


def _most_probable(head_WD: Tensor, hidden_MD: Tensor, needs: frozenset[str]) -> Proposal:
    stats = token_stats.stats(hidden_MD, head_WD, second="margin" in needs, entropy="entropy" in needs)
    margin_M = None
    if stats.second_logprob_M is not None:
        margin_M = stats.top_logprob_M.exp() - stats.second_logprob_M.exp()
    return Proposal(stats.argmax_M, stats.top_logprob_M, margin_M, stats.entropy_M)


def _score(logits_MV: Tensor, token_M: Tensor, needs: frozenset[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse_M = logits_MV.logsumexp(-1)
    logprob_M = logits_MV.gather(1, token_M[:, None])[:, 0] - lse_M
    margin_M = entropy_M = logprob_M
    if "margin" in needs:
        best_M2 = (logits_MV.topk(2, dim=-1).values - lse_M[:, None]).exp()
        margin_M = best_M2[:, 0] - best_M2[:, 1]
    if "entropy" in needs:
        logp_MV = logits_MV - lse_M[:, None]
        # 0 * log 0 = 0: blocked rows hold -inf
        entropy_M = -(logp_MV.exp() * logp_MV.clamp(min=torch.finfo(logp_MV.dtype).min)).sum(-1)
    return token_M, logprob_M, margin_M, entropy_M


def draw_tokens(
    logits_MV: Tensor,
    config: DiffusionGenerationConfig,
    uniform_M: Tensor | None,
    temperature_M: Tensor | None = None,
) -> Tensor:
    """Draw a token per row at the config's temperature, or at one for each row; the most probable one at 0."""
    if config.is_greedy:
        return logits_MV.argmax(-1)
    assert uniform_M is not None
    temperature: float | Tensor = min(max(config.temperature, COLDEST), HOTTEST)
    if temperature_M is not None:
        temperature = temperature_M[:, None].clamp(COLDEST, HOTTEST)
    if config.top_k is None and config.top_p is None:
        scaled_MV = (logits_MV - logits_MV.amax(-1, keepdim=True)) / temperature
        return invert_cdf(scaled_MV.exp(), uniform_M)
    kept = min(config.top_k or logits_MV.shape[1], logits_MV.shape[1])
    logits_MK, ids_MK = logits_MV.topk(kept, dim=-1)
    p_MK = (logits_MK / temperature).softmax(-1)
    if config.top_p is not None:
        # keep a token when what comes before it has not yet reached top_p: the first always stays
        before_MK = p_MK.double().cumsum(-1) - p_MK
        p_MK = torch.where(before_MK < config.top_p, p_MK, 0)
    return ids_MK.gather(1, invert_cdf(p_MK, uniform_M)[:, None])[:, 0]


def invert_cdf(weight_MV: Tensor, uniform_M: Tensor) -> Tensor:
    """Return the index at which the cumulative weight first exceeds `uniform` times the total.

    One draw per row instead of one per token; float64 sums, first over groups and then inside one, so that rounding
    moves no probability that a test could see. An index of weight 0 is never returned.

    Args:
        weight_MV: fp32, >= 0, not all 0 in a row; need not be normalised.
        uniform_M: float64 in [0, 1).
    """
    rows, width = weight_MV.shape
    weight_MGg = F.pad(weight_MV, (0, -width % GROUP)).view(rows, -1, GROUP)
    groups_MG = weight_MGg.sum(-1, dtype=torch.float64).cumsum(-1)
    group_M, below_M, target_M = _first_above(groups_MG, uniform_M * groups_MG[:, -1])
    inside_Mg = weight_MGg[torch.arange(rows, device=weight_MV.device), group_M].double().cumsum(-1)
    token_M, _, _ = _first_above(inside_Mg, target_M - below_M)
    return group_M * GROUP + token_M


def _first_above(cumulative_MN: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first index whose cumulative value exceeds the target, the value before it, and the target used."""
    total_M = cumulative_MN[:, -1]
    target_M = target_M.clamp(min=0).minimum(total_M.nextafter(torch.zeros_like(total_M)))
    # a row of nan (a diverged model) has nothing above its target: index 0 then, which is a real token
    index_M1 = torch.searchsorted(cumulative_MN, target_M[:, None], right=True) % cumulative_MN.shape[1]
    below_M = F.pad(cumulative_MN, (1, 0)).gather(1, index_M1)[:, 0]
    return index_M1[:, 0], below_M, target_M
