"""Proof, layer by layer, that attention runs both ways.

Perturbing the tokens would prove only the first bidirectional layer: everything above inherits what moved below.
Therefore each block is run on its own recorded input, with one row of that input perturbed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dllm_core.backbone.backbone import Backbone
from dllm_core.errors import UnsupportedModelError

_ROWS, _ROW = 12, 8
_THRESHOLD = 1e-6


@torch.no_grad()
def causal_layers(backbone: Backbone, *, causal: bool = False) -> list[int]:
    """Return the 1-indexed layers in which no attention output above row j moves when row j of the input does.

    Costs one forward pass over 12 tokens and each block once more.

    Args:
        backbone: in any mode; it is probed in evaluation mode and left as it was.
        causal: how to run it; with True every layer should be listed.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        calls = _record_calls(backbone, causal)
        return [
            number
            for number, (block, call) in enumerate(zip(backbone.layers, calls, strict=True), start=1)
            if _movement(getattr(block, backbone.family.attention), block, call) <= _THRESHOLD
        ]
    finally:
        backbone.train(was_training)


def assert_bidirectional(backbone: Backbone) -> None:
    """Raise unless every layer's attention runs both ways.

    Raises:
        UnsupportedModelError: naming the layers that still run left to right.
    """
    found = causal_layers(backbone)
    if found:
        raise UnsupportedModelError(
            f"Attention still runs left to right in layers {found} of {backbone.num_layers}.",
            "This architecture, or this version of transformers, does not support the flip; choose another model.",
        )


def _record_calls(backbone: Backbone, causal: bool) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for block in backbone.layers
    ]
    generator = torch.Generator().manual_seed(0)
    ids_1L = torch.randint(0, backbone.contract.num_tokens, (1, _ROWS), generator=generator)
    try:
        backbone.hidden(ids_1L.to(backbone.device), causal=causal)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _movement(attention: nn.Module, block: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> float:
    """Return the largest change of the attention output above row j, relative to its largest value."""
    args, kwargs = call
    states_1LD = args[0] if args else kwargs["hidden_states"]
    generator = torch.Generator().manual_seed(1)
    noise_D = torch.randn(states_1LD.shape[-1], generator=generator).to(states_1LD)
    moved_1LD = states_1LD.clone()
    moved_1LD[:, _ROW] += noise_D * states_1LD[:, _ROW].float().square().mean().sqrt().to(states_1LD)
    outputs: list[Tensor] = []
    handle = attention.register_forward_hook(
        lambda _, __, output: outputs.append((output[0] if isinstance(output, tuple) else output).float())
    )
    try:
        for value_1LD in (states_1LD, moved_1LD):
            block(value_1LD, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
    finally:
        handle.remove()
    before, after = (output[:, :_ROW] for output in outputs)
    return float((after - before).abs().max() / before.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
