"""Evidence that the noise carries information, on held-out text, whatever it shows. S segments, L slots, D width."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.kernels import token_stats
from dllm_core.methods.protocol import Resources
from dllm_core.methods.segments import Segments, segments_of
from dllm_core.methods.vfm import soft_masks

if TYPE_CHECKING:
    from dllm_core.methods.vfm.method import Method

PASSES = (1, 2, 4, 8)
ACTIVE_VARIANCE = 0.01
"""A dimension is active when the variance of its mean over prompts and slots exceeds this (arXiv:1509.00519)."""
_NGRAM = 4


class _Look:
    """One held-out batch: its noises, and what the map makes of them."""

    def __init__(self, method: Method, batch: Batch, resources: Resources, noise: NoiseSource) -> None:
        self.method, self.batch, self.cut = method, batch, segments_of(batch)
        self.real_SL = self.cut.real_SL
        shape = (batch.length, method.backbone.hidden_size)
        drawn = [self.cut.slots(noise.normal(batch, f"health {i}", shape).to(method.device)) for i in range(2)]
        self.eps_SLD, self.other_eps_SLD = drawn
        self.posterior = method.posterior(batch, self.cut, resources)
        self.ids_SL = self.cut.slots(batch.input_ids_BL)

    def outputs(self, z_SLD: Tensor, passes: int) -> Tensor:
        """Return what the head reads after so many passes; with a frozen base `z` is the mean of the soft masks."""
        method, batch = self.method, self.batch
        if method.options.freeze_base:
            hidden_BLD = soft_masks.hidden_states(method, batch, self.cut, z_SLD, batch.response_BL)
            return hidden_BLD[self.cut.row_S[:, None], self.cut.position_SL - method.shift][self.real_SL]
        hidden_BL = method.hidden_prompt(batch)
        return method.flow.sample(method.backbone, batch, self.cut, z_SLD, passes, method.shift, hidden_BL)

    def nats(self, rows_MD: Tensor) -> float:
        """Return the mean -log p of the true tokens."""
        from dllm_core.kernels.masked_ce import token_losses

        backbone = self.method.backbone
        even_M = torch.full((len(rows_MD),), 1.0 / max(1, len(rows_MD)), device=rows_MD.device)
        losses = token_losses(
            rows_MD, backbone.head_weight_VD, self.ids_SL[self.real_SL], ce_M=even_M, blocked_V=backbone.blocked_V
        )
        return float(losses.nll_M.double().mean())

    def tokens(self, rows_MD: Tensor) -> Tensor:
        """Return the most probable tokens, int64 [M]."""
        backbone = self.method.backbone
        return token_stats.stats(rows_MD, backbone.head_weight_VD, backbone.blocked_V, second=False).argmax_M


def swapped(values_SLD: Tensor, cut: Segments) -> Tensor | None:
    """Return each segment's values replaced by those of the next one, None where there is one segment alone.

    A longer segment fills what the other one lacks with the other's values from the start.
    """
    if len(cut) < 2:
        return None
    lengths = cut.real_SL.sum(1).tolist()
    rows = []
    for s in range(len(cut)):
        other = (s + 1) % len(cut)
        index_L = torch.arange(values_SLD.shape[1], device=values_SLD.device) % lengths[other]
        rows.append(values_SLD[other, index_L])
    return torch.stack(rows)


def repetition_rates(tokens_M: Tensor, cut: Segments) -> tuple[float, float]:
    """Return (share of tokens equal to the one before, share of 4-grams that occurred before in the same response)."""
    pieces = tokens_M.split(cut.real_SL.sum(1).tolist())
    pairs = same = grams = repeated = 0
    for piece in pieces:
        ids = piece.tolist()
        pairs += len(ids) - 1
        same += sum(a == b for a, b in pairwise(ids))
        found = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
        grams += len(found)
        repeated += len(found) - len(set(found))
    return same / max(1, pairs), repeated / max(1, grams)


def _agreement(a_M: Tensor, b_M: Tensor) -> float:
    return float((a_M == b_M).double().mean())


@torch.no_grad()
def health(method: Method, batch: Batch, resources: Resources, noise: NoiseSource) -> dict[str, Any]:
    """Return figures of health, JSON-able.

    one_pass_nats: -log p of the true tokens in one pass from the adapter's noise, from N(0, 1), and from another
    prompt's adapter. sample_agreement: equal tokens of one-pass samples with the adapter's noise and: `normal`, the
    same draw without the adapter; `other_prompt`; `other_draw`, the adapter's with another draw. pass_agreement: equal
    tokens of 1, 2, 4 and 8 passes from the same noise with those of 8. repeated_token, repeated_4gram: by passes.
    kl_nats_per_dim; active_dimensions: share whose mean varies between prompts and slots.
    With a frozen base there is no draw: `normal` is the plain mask, and several passes are not compared.
    """
    look = _Look(method, batch, resources, noise)
    if len(look.cut) == 0:
        return {}
    mean_SLD = look.posterior.mean_SLD
    frozen = method.options.freeze_base
    own = mean_SLD if frozen else look.posterior.sample(look.eps_SLD)
    sources = {"adapter": own, "normal": torch.zeros_like(own) if frozen else look.eps_SLD.float()}
    strange = swapped(own, look.cut)
    if strange is not None:
        sources["other_prompt"] = strange
    once = {name: look.outputs(z_SLD, 1) for name, z_SLD in sources.items()}
    first_M = look.tokens(once["adapter"])
    agreement = {n: _agreement(first_M, look.tokens(rows_MD)) for n, rows_MD in once.items() if n != "adapter"}
    variance_D = mean_SLD[look.real_SL].double().var(0, correction=0)
    found: dict[str, Any] = {
        "one_pass_nats": {name: look.nats(rows_MD) for name, rows_MD in once.items()},
        "sample_agreement": agreement,
        "active_dimensions": float((variance_D > ACTIVE_VARIANCE).double().mean()),
    }
    if frozen:
        passes = {1: first_M}
        found["gate"] = float(method.gate)
    else:
        other_MD = look.outputs(look.posterior.sample(look.other_eps_SLD), 1)
        agreement["other_draw"] = _agreement(first_M, look.tokens(other_MD))
        passes = {k: first_M if k == 1 else look.tokens(look.outputs(own, k)) for k in PASSES}
        last_M = passes[PASSES[-1]]
        found["pass_agreement"] = {str(k): _agreement(tokens_M, last_M) for k, tokens_M in passes.items()}
        found["kl_nats_per_dim"] = float(look.posterior.kl_SL()[look.real_SL].double().mean())
    rates = {str(k): repetition_rates(tokens_M, look.cut) for k, tokens_M in passes.items()}
    found["repeated_token"] = {k: same for k, (same, _) in rates.items()}
    found["repeated_4gram"] = {k: grams for k, (_, grams) in rates.items()}
    return found
