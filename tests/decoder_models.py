"""Gated decoders for tests of passes: families and unusual shapes, what their modules give, and ways to change one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dllm_core.backbone import masks
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.contract import Contract
from dllm_core.backbone.passes.plain import PlainPass
from dllm_core.samplers.config import DiffusionGenerationConfig
from dllm_core.samplers.loop import generate
from tests.tiny import NUM_TOKENS, tiny_backbone, tiny_config

GATED = ("llama", "qwen2", "qwen3")
VARIANTS: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "stretched positions": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 12},
}


def decoder(kind: str) -> Backbone:
    """Return a model of three blocks: of a family, or a variant of llama."""
    if kind in GATED:
        return tiny_backbone(kind, layers=3)
    config = tiny_config("llama")
    for key, value in VARIANTS[kind].items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Backbone(model, Contract(mask_token_id=NUM_TOKENS, num_tokens=NUM_TOKENS, alignment="shifted"))


@torch.no_grad()
def modules(backbone: Backbone, canvas_BL: Tensor, row_M: Tensor | None = None, **options: Any) -> Tensor:
    """Return the states that transformers' modules give."""
    return PlainPass(backbone)(canvas_BL, row_M=row_M, **options)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def attention_masks(batch: int, length: int) -> list[Tensor | None]:
    documents = torch.zeros(batch, length, dtype=torch.long)
    documents[-1, length // 2 :] = -1
    block = torch.arange(length) // 4
    blocks = (block[:, None] >= block)[None, None]
    padded = masks.document_mask(documents, causal=False)
    return [None, padded, blocks, blocks & padded]


# -- changes that a pass has to see -----------------------------------------------------------------------------------


def in_place(backbone: Backbone) -> None:
    with torch.no_grad():
        backbone.layers[1].mlp.up_proj.weight[3, 4] += 2.0


def replaced(backbone: Backbone) -> None:
    weight = backbone.layers[0].self_attn.k_proj.weight
    weight.data = weight.data + 0.5


def gate_behind_the_counter(backbone: Backbone) -> None:
    backbone.layers[1].mlp.gate_proj.weight.data.mul_(1.5)


def down_behind_the_counter(backbone: Backbone) -> None:
    backbone.layers[1].mlp.down_proj.weight.data.mul_(1.5)


def a_head_norm(backbone: Backbone) -> None:
    backbone.layers[0].self_attn.k_norm.weight.data.mul_(1.7)


def a_norm(backbone: Backbone) -> None:
    backbone.layers[0].input_layernorm.weight.data = torch.full((32,), 0.7)


def another_module(backbone: Backbone) -> None:
    backbone.layers[0].mlp.down_proj = copy.deepcopy(backbone.layers[1].mlp.down_proj)


def loaded(backbone: Backbone) -> None:
    backbone.load_state_dict(tiny_backbone("qwen3", seed=9).state_dict())


CHANGES: tuple[Callable[[Backbone], None], ...] = (
    in_place,
    replaced,
    gate_behind_the_counter,
    down_behind_the_counter,
    a_head_norm,
    a_norm,
    another_module,
    loaded,
)
"""Each changes what a qwen3 gives."""


def decodes_beside_training(backbone: Backbone) -> list[list[int]]:
    """Return what a prompt becomes before and after each of two optimiser steps, every pass verified."""
    generator = torch.Generator().manual_seed(1)
    prompt, canvas_BL = (torch.randint(NUM_TOKENS, shape, generator=generator) for shape in ((5,), (2, 7)))
    config = DiffusionGenerationConfig(max_new_tokens=9, max_denoising_steps=4, stop_at_eos=False, verify=True)
    found = [generate(backbone, [prompt], config).sequences[0].tolist()]
    optimiser = torch.optim.AdamW(backbone.parameters(), lr=0.05)
    for _ in range(2):
        backbone.logits(backbone.hidden(canvas_BL, causal=False))[..., :NUM_TOKENS].square().mean().backward()
        optimiser.step()
        found.append(generate(backbone, [prompt], config).sequences[0].tolist())
    return found
