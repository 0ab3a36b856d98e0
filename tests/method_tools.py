"""Tools for tests of the rooms: steps, splits, a table in place of a network, naive losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor, nn

from dllm_core.backbone.contract import Contract
from dllm_core.corruption.noise import NoiseSource
from dllm_core.data.batch import Batch
from dllm_core.methods.protocol import Corrupted, LossOutput, Method, Resources, StepInfo


def step_info(phase: str = "train", step: int = 0, steps: int = 10, start: int = 0, batch_size: int = 4) -> StepInfo:
    """Return a step `step` (within its phase of `steps`) of a phase that began at step `start`."""
    return StepInfo(start + step, start + steps, phase, step, steps, start, batch_size)


def corrupt(
    method: Method, batch: Batch, info: StepInfo | None = None, seed: int = 0
) -> tuple[Corrupted, dict[str, float]]:
    corrupted = method.corrupt(batch, info or step_info(), NoiseSource(seed))
    return corrupted, method.totals(corrupted)


def split_losses(
    method: Method,
    corrupted: Corrupted,
    totals: dict[str, float],
    sizes: Sequence[int],
    resources: Resources | None = None,
    info: StepInfo | None = None,
) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Return loss, parts and gradients added up over micro-batches of the given sizes."""
    method.zero_grad()
    loss, parts, start = 0.0, {}, 0
    for size in sizes:
        piece = corrupted.rows(start, start + size)
        out: LossOutput = method.loss(piece, totals, info or step_info(), resources or Resources())
        out.loss.backward()
        loss += float(out.loss.detach())
        for name, value in out.parts.items():
            parts[name] = parts.get(name, 0.0) + float(value)
        start += size
    assert start == len(corrupted.clean)
    return loss, parts, {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


class DictAnchors:
    """A store that answers `gather` from tensors in memory."""

    def __init__(self, states: dict[str, dict[str, Tensor]]) -> None:
        self.states = states

    def gather(self, keys: Sequence[str], layers: Sequence[str], rows: Sequence[Tensor]) -> dict[str, Tensor]:
        pairs = list(zip(keys, rows, strict=True))
        return {layer: torch.cat([self.states[key][layer][index] for key, index in pairs]) for layer in layers}


class DictTrajectories:
    """A store that answers `read` from tensors in memory."""

    def __init__(self, steps: dict[str, Tensor]) -> None:
        self.steps = steps

    def read(self, keys: Sequence[str], response_BL: Tensor | None = None) -> Tensor:
        return torch.stack([self.steps[key] for key in keys])


class TableBackbone(nn.Module):
    """A network that knows a joint distribution over `length` tokens exactly: logits are log conditionals.

    The state at the predictor of position j holds log p(x_j | unmasked tokens), the head is the identity. One extra id
    is the mask token.
    """

    num_layers, hidden_size = 1, 0

    def __init__(self, joint: Tensor, *, noise: float = 0.0) -> None:
        super().__init__()
        self.joint = joint.double() / joint.sum()
        self.vocab, self.length = joint.shape[0], joint.dim()
        self.contract = Contract(mask_token_id=self.vocab, num_tokens=self.vocab)
        self.head = nn.Parameter(torch.eye(self.vocab + 1, dtype=torch.float64))
        self.register_buffer("blocked_V", torch.arange(self.vocab + 1) >= self.vocab)
        generator = torch.Generator().manual_seed(1)
        # with noise the conditionals are those of no joint distribution, as in a trained network
        shape = ((self.vocab + 1,) * self.length) + (self.length, self.vocab)
        self.error = noise * torch.randn(shape, generator=generator, dtype=torch.float64)

    @property
    def head_weight_VD(self) -> Tensor:
        return self.head

    @property
    def device(self) -> torch.device:
        return self.head.device

    def flops_forward(self, *_: object) -> float:
        return 0.0

    @contextmanager
    def capture(self, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        yield {}

    def log_conditional(self, tokens: Sequence[int], position: int) -> Tensor:
        """Return log p(x_position | the unmasked of the others) over the vocabulary."""
        index = tuple(slice(None) if t == self.vocab or j == position else t for j, t in enumerate(tokens))
        axis = sum(isinstance(i, slice) for i in index[:position])
        table = self.joint[index]
        weight_V = table.sum(dim=[d for d in range(table.dim()) if d != axis]) if table.dim() > 1 else table
        context = [self.vocab if j == position else t for j, t in enumerate(tokens)]
        return (weight_V.log() + self.error[(*context, position)]).log_softmax(-1)

    def hidden(self, input_ids_BL: Tensor, *, causal: bool, **_: object) -> Tensor:
        hidden_BLD = torch.zeros(*input_ids_BL.shape, self.vocab + 1, dtype=torch.float64)
        for row, tokens in enumerate(input_ids_BL.tolist()):
            for position in range(1, len(tokens)):
                hidden_BLD[row, position - 1, : self.vocab] = self.log_conditional(tokens, position)
        return hidden_BLD

    def bound(self, tokens: Sequence[int], first: int) -> float:
        """Return the exact NELBO of tokens[first:] given tokens[:first], by enumerating all masks.

        In the form of discrete-time absorbing diffusion: integral over t of 1/t E[sum of masked nll], done in closed
        form: integral of t^(k-1) (1-t)^(n-k) is (k-1)! (n-k)! / n!.
        """
        free = range(first, len(tokens))
        size, total = len(free), 0.0
        for bits in product((False, True), repeat=size):
            masked = [j for j, bit in zip(free, bits, strict=True) if bit]
            if not masked:
                continue
            noisy = [self.vocab if j in masked else t for j, t in enumerate(tokens)]
            weight = math.factorial(len(masked) - 1) * math.factorial(size - len(masked)) / math.factorial(size)
            total -= weight * sum(float(self.log_conditional(noisy, j)[tokens[j]]) for j in masked)
        return total


def nll_rows(method: Method, batch: Batch, noisy_BL: Tensor, masked_BL: Tensor) -> list[dict[int, Tensor]]:
    """Return per row {token position: log-probabilities [V] in float64}, one row and one forward at a time."""
    backbone = method.backbone
    shift = 1 if backbone.contract.alignment == "shifted" else 0
    found = []
    for row in range(len(batch)):
        hidden_LD = backbone.hidden(
            noisy_BL[row : row + 1],
            causal=False,
            document_BL=batch.document_BL[row : row + 1],
            position_BL=batch.position_BL[row : row + 1],
        )[0]
        logits_LV = (hidden_LD.double() @ backbone.head_weight_VD.double().T)[:, : backbone.contract.num_tokens]
        logp_LV = logits_LV.log_softmax(-1)
        found.append({j: logp_LV[j - shift] for j in masked_BL[row].nonzero().flatten().tolist()})
    return found
