"""Exact likelihood of autoregressive rows, on the same tokens that the bounds score."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dllm_core.data.batch import Batch
from dllm_core.evals.estimates import SequenceSums
from dllm_core.evals.views import device_of
from dllm_core.methods.protocol import Method


@torch.no_grad()
def exact_nll(
    method: Method, batch: Batch, *, batch_size: int = 8, on_views: Callable[[int], None] | None = None
) -> SequenceSums:
    """Return -log p(response | prompt) of every sequence in nats, from a room with capability `exact_likelihood`.

    The first token of a document is never a response token, so it is not scored here either.
    """
    device = device_of(method)
    sums: list[float] = []
    for start in range(0, len(batch), batch_size):
        rows = batch.rows(start, start + batch_size)
        tokens = method.token_nll(rows.to(device))
        assert torch.equal(tokens.scored_BL.cpu(), rows.response_BL), "every response token is scored, and no other"
        sums += tokens.nll_BL.double().sum(1).tolist()
        if on_views:
            on_views(len(rows))
    return SequenceSums(tuple(sums), tuple(batch.response_BL.sum(1).double().tolist()))
