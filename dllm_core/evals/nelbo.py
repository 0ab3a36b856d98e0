"""Upper bounds on the negative log-likelihood of masked diffusion models, in nats.

They describe unmasking in random order (whole response, or block after block), not confidence decoding. Per sequence
the estimators are unbiased with any number of samples; nothing forces a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.evals.estimates import SequenceSums
from dllm_core.evals.views import (
    Views,
    block_of,
    counts_from,
    fixed_count,
    fixed_rate,
    score,
    stratified,
)
from dllm_core.methods.protocol import Method

OnViews = Callable[[int], None] | None


def _sums(method: Method, batch: Batch, parts: Iterator[Views], batch_size: int, on_views: OnViews) -> SequenceSums:
    nats_B, _ = score(method, batch, parts, batch_size=batch_size, on_views=on_views)
    return SequenceSums.of(nats_B, batch.response_BL.sum(1))


def _all_rows(batch: Batch, masked_BL: Tensor, weight_BL: Tensor) -> Views:
    return Views(torch.arange(len(batch)), masked_BL, weight_BL)


def count_views(batch: Batch, samples: int, noise: NoiseSource) -> Iterator[Views]:
    """Yield `samples` views of every sequence with stratified mask counts k and weights size / (k samples)."""
    size_B = batch.response_BL.sum(1)
    uniform_BS = stratified(noise.uniform(batch, "nelbo/offset"), samples)
    for s in range(samples):
        key_BL = noise.uniform(batch, f"nelbo/order {s}", (batch.length,))
        masked_BL, weight_BL = fixed_count(batch.response_BL, counts_from(uniform_BS[:, s], size_B), key_BL)
        yield _all_rows(batch, masked_BL, weight_BL / samples)


def rate_views(batch: Batch, samples: int, noise: NoiseSource) -> Iterator[Views]:
    """Yield `samples` views of every sequence with stratified mask rates t and weights 1 / (t samples)."""
    rate_BS = 1.0 - stratified(noise.uniform(batch, "nelbo/rate offset"), samples)  # in (0, 1]
    for s in range(samples):
        key_BL = noise.uniform(batch, f"nelbo/rate {s}", (batch.length,))
        masked_BL, weight_BL = fixed_rate(batch.response_BL, rate_BS[:, s], key_BL)
        yield _all_rows(batch, masked_BL, weight_BL / samples)


def block_views(batch: Batch, samples: int, block_size: int, noise: NoiseSource) -> Iterator[Views]:
    """Yield views for the block-wise bound: earlier blocks clean, later ones hidden, k of the block's tokens hidden.

    The samples are spread evenly over the blocks, at least one for each; counts are stratified within a block.
    """
    block_BL = block_of(batch, block_size)
    num_blocks = int(block_BL.max()) + 1
    each = max(1, samples // max(1, num_blocks))
    for b in range(num_blocks):
        later_BL = block_BL > b
        for s in range(each):
            masked_BL = later_BL.clone()
            weight_BL = torch.zeros(block_BL.shape, dtype=torch.float64)
            for document in range(int(batch.document_BL.max()) + 1):
                inside_BL = (block_BL == b) & (batch.document_BL == document)
                stream = f"block nelbo/{b} of {document}"
                uniform_BS = stratified(noise.uniform(batch, f"{stream} offset"), each)
                key_BL = noise.uniform(batch, f"{stream} order {s}", (batch.length,))
                count_B = counts_from(uniform_BS[:, s], inside_BL.sum(1))
                hidden_BL, share_BL = fixed_count(inside_BL, count_B, key_BL)
                masked_BL |= hidden_BL
                weight_BL += share_BL / each
            yield _all_rows(batch, masked_BL, weight_BL)


def num_block_views(batch: Batch, samples: int, block_size: int) -> int:
    """Return an upper bound on the views that `block_nelbo` scores (rows without a block are skipped)."""
    num_blocks = int(block_of(batch, block_size).max()) + 1
    return len(batch) * num_blocks * max(1, samples // max(1, num_blocks))


def nelbo(
    method: Method, batch: Batch, *, samples: int, noise: NoiseSource, batch_size: int = 8, on_views: OnViews = None
) -> SequenceSums:
    """Return the NELBO of every sequence in nats: k ~ U{1..n} of the n response tokens hidden, weight n / k.

    -log p(x) <= E_k [ n / k * sum over hidden i of -log p(x_i | visible) ]  (arXiv:2502.09992, eq. 6). Counts are
    stratified over the samples of a sequence. Cost: `samples` forwards a sequence.

    Args:
        method: a room with capability `nelbo`.
        batch: held-out sequences; only response tokens are hidden or scored.
        samples: Monte Carlo samples a sequence; 64 or more for a published number.
        noise: keys counts and orders per sequence; pass the same to every row so that differences are paired.
        batch_size: views a forward pass.
        on_views: called with the number of views done.
    """
    return _sums(method, batch, count_views(batch, samples, noise), batch_size, on_views)


def nelbo_by_rate(
    method: Method, batch: Batch, *, samples: int, noise: NoiseSource, batch_size: int = 8, on_views: OnViews = None
) -> SequenceSums:
    """Return the same bound by its continuous-time form, t ~ U(0, 1] stratified, weight 1 / t: a cross-check.

    Same expectation as `nelbo` (arXiv:2406.07524, eq. 11), larger variance.
    """
    return _sums(method, batch, rate_views(batch, samples, noise), batch_size, on_views)


def block_nelbo(
    method: Method,
    batch: Batch,
    *,
    samples: int,
    block_size: int,
    noise: NoiseSource,
    batch_size: int = 8,
    on_views: OnViews = None,
) -> SequenceSums:
    """Return the block-wise NELBO of every sequence in nats, the bound for block-by-block decoding.

    sum over blocks b of E_k [ n_b / k * sum over hidden i in b of -log p(x_i | earlier blocks, visible of b) ], later
    blocks fully hidden (arXiv:2503.09573, eq. 7, for a network that sees mask tokens to its right). The last block
    may be ragged. `samples` are shared by the blocks. Block size 1 is the exact left-to-right likelihood.
    """
    parts = block_views(batch, samples, block_size, noise)
    return _sums(method, batch, parts, batch_size, on_views)
