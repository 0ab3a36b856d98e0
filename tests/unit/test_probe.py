"""The probe finds exactly the layers that stay causal."""

from __future__ import annotations

import pytest
import torch

from dllm_core.backbone.probe import assert_bidirectional, causal_layers
from dllm_core.errors import UnsupportedModelError
from tests.tiny import tiny_backbone

IMPLEMENTATIONS = ("sdpa", "eager")


def make_causal(backbone, number: int) -> None:
    """Let one block ignore what it is told: its attention gets a causal mask."""
    block = backbone.layers[number - 1]

    def force(module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        length = states.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if backbone.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        if "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": mask}
        return (*args[:2], mask, *args[3:]), kwargs

    attention = getattr(block, backbone.family.attention)
    attention.register_forward_pre_hook(force, with_kwargs=True)


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
def test_all_layers_flip(family: str, attn: str) -> None:
    backbone = tiny_backbone(family, layers=3, attn=attn)
    assert causal_layers(backbone) == []
    assert causal_layers(backbone, causal=True) == [1, 2, 3]
    assert_bidirectional(backbone)


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
@pytest.mark.parametrize("number", [1, 2, 4])
def test_one_causal_layer_is_caught(family: str, attn: str, number: int) -> None:
    """Perturbing the tokens could not find it: the layers below carry what moved up to it."""
    backbone = tiny_backbone(family, layers=4, attn=attn)
    make_causal(backbone, number)
    assert causal_layers(backbone) == [number]
    with pytest.raises(UnsupportedModelError, match=rf"layers \[{number}\] of 4"):
        assert_bidirectional(backbone)


def test_causal_by_module_attribute_is_caught() -> None:
    """The flag on a module does nothing; a keyword forced to True does."""
    backbone = tiny_backbone("llama", layers=3)
    backbone.layers[1].self_attn.is_causal = True
    assert causal_layers(backbone) == []
    backbone.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "is_causal": True}), with_kwargs=True
    )
    assert causal_layers(backbone) == [2]


def test_probe_leaves_no_trace(family: str) -> None:
    backbone = tiny_backbone(family).train()
    ids = torch.randint(0, 97, (1, 9))
    before = backbone.hidden(ids, causal=False)
    assert causal_layers(backbone) == []
    assert backbone.training
    assert torch.equal(backbone.hidden(ids, causal=False), before)
    assert all(p.grad is None for p in backbone.parameters())


def test_probe_in_bf16(family: str) -> None:
    backbone = tiny_backbone(family, layers=3).to(torch.bfloat16)
    assert causal_layers(backbone) == []
    assert causal_layers(backbone, causal=True) == [1, 2, 3]
