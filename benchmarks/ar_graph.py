"""Greedy decoding with one CUDA graph for a token: the loop to beat on a GPU, where launching kernels is what costs.

A step reads and writes buffers that stay where they are and asks the host for nothing, so a graph of it can be replayed
token after token; the tokens are read back once, at the end. It sees the whole cache under a mask, as transformers'
preallocated cache has it, because a graph's shapes cannot grow. B batch, P prompt, M slots, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.slot_cache import SlotCache
from dllm_core.methods.protocol import GenerationOutput

WARM_UPS = 3
"""Steps before one is captured: libraries allocate their workspaces in the first ones."""


class StaticStep:
    """One token of every row, chosen and fed back without a word from the host.

    Args:
        backbone: the model.
        batch: B.
        capacity: M; prompt and new tokens of a row.
    """

    def __init__(self, backbone: Backbone, batch: int, capacity: int) -> None:
        self.backbone, device = backbone, backbone.device
        self.head_WD = backbone.head_weight_VD[: backbone.contract.num_tokens]
        self.cache = SlotCache(backbone.num_layers, capacity)
        self.slot_M = torch.arange(capacity, device=device)
        self.at_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.tokens_BM = torch.zeros(batch, capacity, dtype=torch.long, device=device)

    def begin(self, prompt_BP: Tensor) -> None:
        """Take prompts and choose what follows them."""
        length = prompt_BP.shape[1]
        states_BPD = self.backbone.hidden(prompt_BP, causal=True, cache=self.cache.at(0))
        self.tokens_BM[:, :length] = prompt_BP
        self.at_1.fill_(length - 1)
        self._choose(states_BPD)

    def __call__(self) -> None:
        """Feed the tokens chosen last and choose the next ones."""
        states_B1D = self.backbone.hidden(
            self.ids_B1,
            causal=False,
            position_BL=self.at_1[None],
            attention_mask_B1LM=(self.slot_M <= self.at_1)[None, None, None],
            cache=self.cache.at(self.at_1),
        )
        self._choose(states_B1D)

    def _choose(self, states_BLD: Tensor) -> None:
        token_B1 = (states_BLD[:, -1] @ self.head_WD.T).argmax(-1, keepdim=True)
        self.ids_B1.copy_(token_B1)
        self.at_1.add_(1)
        self.tokens_BM.index_copy_(1, self.at_1, token_B1)


def captured(step: StaticStep) -> Callable[[], None]:
    """Return what replays a graph of the step; `begin` afterwards, since what the warm-up wrote is left behind."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step.at_1.zero_()
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class GraphLoop:
    """Decodes through a step that is captured at the first call, so that a warm-up pays for it.

    Args:
        capacity: prompt and most new tokens of a row.
        capture: False runs the step as it is: for a device without graphs.
    """

    def __init__(self, capacity: int, *, capture: bool = True) -> None:
        self.capacity, self.capture = capacity, capture
        self._steps: dict[int, tuple[StaticStep, Callable[[], None]]] = {}

    @torch.no_grad()
    def __call__(self, backbone: Backbone, prompts: Sequence[Tensor], new_tokens: int) -> GenerationOutput:
        """Continue prompts of one length, at least one token each; the same model in every call."""
        start = time.perf_counter()
        prompt_BP = torch.stack(list(prompts)).to(backbone.device)
        batch, length = prompt_BP.shape
        if batch not in self._steps:
            step = StaticStep(backbone, batch, self.capacity)
            step.begin(prompt_BP)  # makes the buffers of the cache, whose addresses a graph keeps
            self._steps[batch] = step, captured(step) if self.capture else step
        step, run = self._steps[batch]
        step.begin(prompt_BP)
        if prompt_BP.is_cuda:
            torch.cuda.synchronize()
        first_token_s = time.perf_counter() - start
        for _ in range(new_tokens - 1):
            run()
        return GenerationOutput(
            sequences=list(step.tokens_BM[:, : length + new_tokens].cpu()),
            new_tokens=[new_tokens] * batch,
            num_forwards=new_tokens,
            first_token_s=first_token_s,
        )
