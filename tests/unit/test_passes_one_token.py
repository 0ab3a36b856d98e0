"""The quick pass as left-to-right decoding uses it: a prompt, then one token a row behind what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_core.backbone import attention, masks
from dllm_core.backbone.passes.joined import JoinedPass
from dllm_core.backbone.passes.joined_weights import Joined
from dllm_core.backbone.passes.plain import PlainPass
from dllm_core.backbone.passes.quick import QuickPass
from dllm_core.backbone.slot_cache import SlotCache
from dllm_core.layers import gated_parts
from tests.decoder_models import GATED, close
from tests.tiny import NUM_TOKENS, tiny_backbone


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", GATED)
def test_single_tokens_behind_a_prompt_give_the_states_of_the_whole(kind: str, batch: int) -> None:
    backbone = tiny_backbone(kind, layers=3)
    canvas = torch.randint(NUM_TOKENS, (batch, 14), generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = backbone.hidden(canvas, causal=True)
    run, cache = QuickPass(backbone), SlotCache(backbone.num_layers, 14)
    prompt = run(canvas[:, :9], attention_mask_B1LM=masks.causal_mask(9, canvas.device), cache=cache.at(0))
    close(prompt, expected[:, :9])
    for at in range(9, 14):
        found = run(canvas[:, at : at + 1], position_BL=torch.tensor([[at]]), cache=cache.at(at))
        close(found, expected[:, at : at + 1])


def test_a_single_token_sees_what_its_row_may_see() -> None:
    backbone = tiny_backbone("llama", layers=3)
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(NUM_TOKENS, (4, 10), generator=generator)
    seen = torch.rand(4, 1, 1, 10, generator=generator) < 0.6
    seen[..., -1] = True
    caches = [SlotCache(backbone.num_layers, 10) for _ in range(2)]
    place = torch.tensor([[9], [6], [2], [0]])
    with torch.no_grad():
        for cache in caches:
            backbone.hidden(canvas[:, :9], causal=False, cache=cache.at(0))
        expected = backbone.hidden(
            canvas[:, 9:], causal=False, position_BL=place, attention_mask_B1LM=seen, cache=caches[0].at(9)
        )
    found = QuickPass(backbone)(canvas[:, 9:], position_BL=place, attention_mask_B1LM=seen, cache=caches[1].at(9))
    close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_keys_are_copied_for_a_single_token(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers' kernel gets a copy of the keys for every query head")

    backbone = tiny_backbone("llama").to(dtype)
    cache = SlotCache(backbone.num_layers, 8)
    run = QuickPass(backbone)
    run(torch.arange(7)[None], cache=cache.at(0))
    monkeypatch.setattr(attention, "sdpa_attention_forward", refused)
    states = run(torch.tensor([[7]]), position_BL=torch.tensor([[7]]), cache=cache.at(7))
    assert states.isfinite().all()


@pytest.mark.parametrize("slots", [5, torch.tensor([5, 7, 6]), torch.tensor([[5, 6, 7], [7, 5, 6]])])
def test_positions_are_the_slots_where_none_are_given(slots: int | Tensor) -> None:
    backbone = tiny_backbone("llama")
    canvas = torch.randint(NUM_TOKENS, (2, 8), generator=torch.Generator().manual_seed(3))
    states = []
    for run in (PlainPass(backbone), QuickPass(backbone), JoinedPass(backbone, Joined(backbone), gated_parts.eager())):
        cache = SlotCache(backbone.num_layers, 8)
        with torch.no_grad():
            run(canvas[:, :5], cache=cache.at(0))
            states.append(run(canvas[:, 5:], cache=cache.at(slots)))
    close(states[1], states[0])
    close(states[2], states[0])
