"""A denoiser small enough to enumerate: a table over all sequences of a few tokens, with naive oracles."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.methods.protocol import Method, ScoredTokens
from dllm_core.methods.requirements import Capabilities, RoomOptions

VOCAB = 3


class ToyOptions(RoomOptions):
    def capabilities(self) -> Capabilities:
        return Capabilities(nelbo=True)


class TableDenoiser(Method):
    """Predicts each hidden token from the visible response tokens of its document.

    With `skew` 0 its predictions are the exact conditionals of one joint distribution; otherwise each set of visible
    positions has predictions of its own, as in a real network, and the bound lies above -log p.
    """

    def __init__(self, length: int, skew: float = 0.0, seed: int = 0) -> None:
        super().__init__(None, ToyOptions())  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(*(VOCAB,) * length, generator=generator, dtype=torch.float64) + 0.05
        self.joint = weights / weights.sum()
        self.length, self.skew, self.calls = length, skew, 0

    def conditional(self, tokens: list[int], visible: tuple[int, ...], position: int) -> Tensor:
        """Return p(token at position | tokens at the visible positions), [VOCAB]."""
        index = tuple(tokens[i] if i in visible else slice(None) for i in range(self.length))
        rest = self.joint[index]
        hidden = [i for i in range(self.length) if i not in visible]
        axes = [a for a, i in enumerate(hidden) if i != position]
        p_V = rest.sum(axes) if axes else rest
        p_V = p_V / p_V.sum()
        bend_V = torch.tensor([math.sin(7.0 * v + 3.0 * position + sum(2**i for i in visible)) for v in range(VOCAB)])
        return torch.softmax(p_V.log() + self.skew * bend_V, 0)

    def masked_nll(self, batch: Batch, masked_BL: Tensor) -> ScoredTokens:
        self.calls += 1
        scored_BL = masked_BL & batch.response_BL
        nll_BL = torch.zeros(scored_BL.shape, dtype=torch.float64)
        correct_BL = torch.zeros_like(scored_BL)
        for b, i in scored_BL.nonzero().tolist():
            document = batch.document_BL[b, i]
            # the prompt token of a document (position 0) is not part of the table
            members = ((batch.document_BL[b] == document) & (batch.position_BL[b] > 0)).nonzero()[:, 0].tolist()
            tokens = [int(batch.input_ids_BL[b, m]) for m in members]
            visible = tuple(n for n, m in enumerate(members) if not masked_BL[b, m])
            p_V = self.conditional(tokens, visible, members.index(i))
            nll_BL[b, i] = -p_V[tokens[members.index(i)]].log()
            correct_BL[b, i] = int(p_V.argmax()) == tokens[members.index(i)]
        return ScoredTokens(nll_BL, correct_BL, scored_BL)

    def nll(self, tokens: list[int], visible: tuple[int, ...], position: int) -> float:
        return float(-self.conditional(tokens, visible, position)[tokens[position]].log())

    def order_bound(self, tokens: list[int], orders: list[tuple[int, ...]]) -> float:
        """Oracle: mean over orders of the chain rule's sum. Knows nothing of mask counts or weights."""
        total = 0.0
        for order in orders:
            total += sum(self.nll(tokens, tuple(sorted(order[:n])), i) for n, i in enumerate(order))
        return total / len(orders)

    def exact_bound(self, tokens: list[int]) -> float:
        return self.order_bound(tokens, list(itertools.permutations(range(self.length))))

    def exact_block_bound(self, tokens: list[int], block_size: int) -> float:
        blocks = [tuple(range(s, min(s + block_size, self.length))) for s in range(0, self.length, block_size)]
        each = [list(itertools.permutations(b)) for b in blocks]
        return self.order_bound(tokens, [tuple(itertools.chain(*choice)) for choice in itertools.product(*each)])

    def log_p(self, tokens: list[int]) -> float:
        return float(self.joint[tuple(tokens)].log())

    # the rest of the protocol is not measured here
    def corrupt(self, *_: object) -> None:  # type: ignore[override]
        raise NotImplementedError

    totals = loss = sample = save_pretrained = from_pretrained = corrupt  # type: ignore[assignment]


def toy_batch(rows: list[list[list[int]]]) -> Batch:
    """Return one row per list of documents; each document gets a prompt token in front; short rows are padded."""
    ids, response, document, position = [], [], [], []
    for documents in rows:
        ids.append([t for d in documents for t in (0, *d)])
        response.append([p > 0 for d in documents for p in range(len(d) + 1)])
        document.append([n for n, d in enumerate(documents) for _ in range(len(d) + 1)])
        position.append([p for d in documents for p in range(len(d) + 1)])
    width = max(map(len, ids))

    def padded(values: list[list], fill: int) -> Tensor:
        return torch.tensor([v + [fill] * (width - len(v)) for v in values])

    return Batch(
        padded(ids, 0),
        padded(response, False),
        padded(document, -1),
        padded(position, 0),
        tuple(range(len(rows))),
        (0,) * len(rows),
        tuple(map(str, range(len(rows)))),
    )
