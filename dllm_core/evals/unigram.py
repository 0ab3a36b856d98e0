"""The floor that everything must beat: tokens drawn independently from the training frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.evals.estimates import SequenceSums


def unigram_nll(batch: Batch, counts_V: Tensor, num_tokens: int) -> SequenceSums:
    """Return the nats of every sequence's response tokens under add-one smoothed training frequencies.

    Args:
        batch: held-out sequences.
        counts_V: how often each id occurs among the training response tokens; ids beyond its end count 0.
        num_tokens: ids that can occur (mask and padding rows left out).
    """
    counts = torch.zeros(num_tokens, dtype=torch.float64)
    known = min(num_tokens, counts_V.shape[0])
    counts[:known] = counts_V[:known].double()
    nll_V = torch.log(counts.sum() + num_tokens) - torch.log(counts + 1.0)
    nll_BL = nll_V[batch.input_ids_BL.clamp(max=num_tokens - 1)] * batch.response_BL
    return SequenceSums.of(nll_BL.sum(1), batch.response_BL.sum(1))
