"""How well hidden tokens are recovered at given mask ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.evals.estimates import SequenceSums
from dllm_core.evals.views import Views, device_of, fixed_count, score
from dllm_core.methods.protocol import Method


@dataclass(frozen=True)
class MaskedScore:
    """Result at one mask ratio: summed nats and right tokens of each sequence over its hidden tokens."""

    nll: SequenceSums
    accuracy: SequenceSums


def exact_ratio_mask(batch: Batch, ratio: float, noise: NoiseSource) -> Tensor:
    """Hide round(ratio * size) of each row's response tokens, at least one; masks of growing ratio are nested."""
    size_B = batch.response_BL.sum(1)
    count_B = torch.minimum((ratio * size_B).round().long().clamp(min=1), size_B)
    masked_BL, _ = fixed_count(batch.response_BL, count_B, noise.uniform(batch, "mask ratio", (batch.length,)))
    return masked_BL


def masked_accuracy(
    method: Method,
    batch: Batch,
    *,
    ratios: Sequence[float],
    noise: NoiseSource,
    batch_size: int = 8,
    on_views: Callable[[int], None] | None = None,
) -> dict[float, MaskedScore]:
    """Return nats and accuracy per hidden token at each ratio. Exact counts, the same masks for every row."""
    results = {}
    for ratio in ratios:
        masked_BL = exact_ratio_mask(batch, ratio, noise)
        views = Views(torch.arange(len(batch)), masked_BL, masked_BL.double())
        nats_B, right_B = score(method, batch, [views], batch_size=batch_size, on_views=on_views)
        tokens_B = masked_BL.sum(1)
        results[ratio] = MaskedScore(SequenceSums.of(nats_B, tokens_B), SequenceSums.of(right_B, tokens_B))
    return results


@torch.no_grad()
def prediction_strip(method: Method, batch: Batch, *, ratio: float, noise: NoiseSource) -> list[str]:
    """Return "given", "right" or "wrong" for every token of the first sequence (padding left out)."""
    row = batch.rows(0, 1)
    masked_BL = exact_ratio_mask(row, ratio, noise)
    device = device_of(method)
    right_BL = method.masked_nll(row.to(device), masked_BL.to(device)).correct_BL.cpu()
    states = []
    for masked, right, document in zip(
        masked_BL[0].tolist(), right_BL[0].tolist(), row.document_BL[0].tolist(), strict=True
    ):
        if document >= 0:
            states.append("given" if not masked else "right" if right else "wrong")
    return states
