"""Oracles for block-causal diffusion, as plain as possible: masks by loops, one forward per block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, product

import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.data.batch import Batch
from dllm_core.methods.block_causal.method import Method
from dllm_core.methods.block_causal.options import Options
from tests.method_tools import TableBackbone


def documents(batch: Batch, row: int) -> list[list[int]]:
    """Return the positions of each document of a row."""
    found: dict[int, list[int]] = {}
    for i, document in enumerate(batch.document_BL[row].tolist()):
        if document >= 0:
            found.setdefault(document, []).append(i)
    return list(found.values())


def blocks_of(batch: Batch, row: int, size: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Yield (positions before the block, positions of it, response tokens among them) for blocks with a response."""
    response_L = batch.response_BL[row].tolist()
    for places in documents(batch, row):
        for start in range(0, len(places), size):
            block = places[start : start + size]
            scored = [i for i in block if response_L[i]]
            if scored:
                yield places[:start], block, scored


def block_log_probs(backbone: Backbone, prefix: Sequence[int], block: Sequence[int], size: int) -> Tensor:
    """Return log p [n, V] of a block's tokens given its clean prefix and its noisy ids, by one forward of both."""
    ids = [*prefix, *block]
    sees = torch.tensor([[j // size <= i // size for j in range(len(ids))] for i in range(len(ids))])
    bias = torch.zeros(sees.shape, dtype=backbone.embedding_weight_VD.dtype).masked_fill(~sees, -torch.inf)
    logits = backbone.model(torch.tensor([ids]), attention_mask=bias[None, None], use_cache=False).logits[0]
    log_p = logits[:, : backbone.contract.num_tokens].log_softmax(-1)
    if backbone.contract.alignment == "shifted":
        log_p = torch.cat((log_p[:1], log_p[:-1]))  # the first row predicts nothing
    return log_p[len(prefix) :]


def naive_nll(method: Method, batch: Batch, masked_BL: Tensor, row: int) -> dict[int, Tensor]:
    """Return {position: -log p} of the masked response tokens of a row, one forward per block, with gradient."""
    found, ids = {}, batch.input_ids_BL[row].tolist()
    for prefix, block, scored in blocks_of(batch, row, method.options.block_size):
        noisy = [method.backbone.contract.mask_token_id if masked_BL[row, i] else ids[i] for i in block]
        log_p = block_log_probs(method.backbone, [ids[i] for i in prefix], noisy, method.options.block_size)
        found |= {i: -log_p[block.index(i), ids[i]] for i in scored if masked_BL[row, i]}
    return found


def block_bound(method: Method, batch: Batch, row: int = 0) -> float:
    """Return the exact block-wise NELBO of a row in nats: the integral over t of 1 / t E[masked nll] of every block.

    The integral of t^(k-1) (1-t)^(n-k) is (k-1)! (n-k)! / n!, for each of the masks of a block by enumeration.
    """
    total = 0.0
    for _, _, scored in blocks_of(batch, row, method.options.block_size):
        n = len(scored)
        for bits in product((False, True), repeat=n):
            masked = [i for i, bit in zip(scored, bits, strict=True) if bit]
            if not masked:
                continue
            masked_BL = torch.zeros_like(batch.response_BL)
            masked_BL[row, masked] = True
            weight = math.factorial(len(masked) - 1) * math.factorial(n - len(masked)) / math.factorial(n)
            nll = naive_nll(method, batch, masked_BL, row)
            total += weight * sum(float(nll[i].detach()) for i in masked)
    return total


def mask_draws(batch: Batch, size: int, *, from_zero: bool) -> Iterator[tuple[Tensor, float]]:
    """Yield every (masked_BL, probability) that training can draw for a batch of one row: k uniform, subsets alike."""
    choices = []
    for _, _, scored in blocks_of(batch, 0, size):
        n, least = len(scored), 0 if from_zero else 1
        choices.append(
            [
                (chosen, 1 / (n + 1 - least) / math.comb(n, k))
                for k in range(least, n + 1)
                for chosen in combinations(scored, k)
            ]
        )
    for of_blocks in product(*choices):
        masked_BL = torch.zeros_like(batch.response_BL)
        masked_BL[0, [i for chosen, _ in of_blocks for i in chosen]] = True
        yield masked_BL, math.prod(p for _, p in of_blocks)


class SeeingTable(TableBackbone):
    """An exact joint distribution behind a mask: a row knows the tokens that its attention shows it, and no others.

    Works on any layout, since what a row sees is read off the mask and the positions.
    """

    @contextmanager
    def capture(self, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        yield {}

    def hidden(self, input_ids_BL: Tensor, *, causal: bool, **given: Tensor) -> Tensor:
        position_BL, mask_B1LM = given["position_BL"], given["attention_mask_B1LM"]
        hidden_BLD = torch.zeros(*input_ids_BL.shape, self.vocab + 1, dtype=torch.float64)
        for row, ids in enumerate(input_ids_BL.tolist()):
            for query in range(len(ids)):
                target = int(position_BL[row, query]) + 1
                if target == self.length:
                    continue
                known = [self.vocab] * self.length
                for key in mask_B1LM[min(row, len(mask_B1LM) - 1), 0, query].nonzero().flatten().tolist():
                    if ids[key] != self.vocab:
                        known[int(position_BL[row, key])] = ids[key]
                hidden_BLD[row, query, : self.vocab] = self.log_conditional(known, target)
        return hidden_BLD


def block_causal(backbone: Backbone, **options: object) -> Method:
    """Return the method with blocks of 4 unless said otherwise."""
    return Method(backbone, Options(**{"block_size": 4, **options}))  # type: ignore[arg-type]
