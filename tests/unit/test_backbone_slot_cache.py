"""Passes over pieces, with keys and values kept in slots, against one pass over everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.slot_cache import SlotCache
from dllm_core.errors import DllmError
from tests.tiny import NUM_TOKENS, tiny_backbone

LENGTH, BLOCK = 18, 5
IMPLEMENTATIONS = ("sdpa", "eager")


def ids(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(0, NUM_TOKENS, (batch, length), generator=torch.Generator().manual_seed(seed))


def block_causal_mask(length: int = LENGTH, block: int = BLOCK) -> Tensor:
    """[1, 1, L, L] by two loops."""
    rows = [[key // block <= query // block for key in range(length)] for query in range(length)]
    return torch.tensor(rows)[None, None]


def cache_for(backbone: Backbone, capacity: int = LENGTH) -> SlotCache:
    return SlotCache(backbone.num_layers, capacity)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
def test_blocks_one_after_the_other_equal_one_block_causal_pass(family: str, attn: str) -> None:
    backbone = tiny_backbone(family, attn=attn)
    whole = backbone.hidden(ids(), causal=False, attention_mask_B1LM=block_causal_mask())
    cache = cache_for(backbone, LENGTH + 7)  # more room than is used must not matter
    for start in range(0, LENGTH, BLOCK):
        stop = min(start + BLOCK, LENGTH)
        piece = backbone.hidden(ids()[:, start:stop], causal=False, cache=cache.at(start))
        close(piece, whole[:, start:stop])


def test_prefix_of_several_blocks_in_one_pass_under_a_mask(family: str) -> None:
    """L queries over M keys with a mask of its own: the prefix is block-causal inside, what follows sees all of it."""
    backbone = tiny_backbone(family)
    mask = block_causal_mask()
    whole = backbone.hidden(ids(), causal=False, attention_mask_B1LM=mask)
    cache = cache_for(backbone)
    for start, stop in ((0, 10), (10, LENGTH)):
        piece = backbone.hidden(
            ids()[:, start:stop],
            causal=False,
            attention_mask_B1LM=mask[:, :, start:stop, :stop],
            cache=cache.at(start),
        )
        close(piece, whole[:, start:stop])


def test_tries_of_a_block_leave_nothing_behind(family: str) -> None:
    backbone = tiny_backbone(family)
    whole = backbone.hidden(ids(), causal=False, attention_mask_B1LM=block_causal_mask())
    cache = cache_for(backbone)
    for start in range(0, LENGTH, BLOCK):
        for seed in (7, 8):
            backbone.hidden(ids(seed=seed)[:, start : start + BLOCK], causal=False, cache=cache.at(start))
        piece = backbone.hidden(ids()[:, start : start + BLOCK], causal=False, cache=cache.at(start))
        close(piece, whole[:, start : start + BLOCK])


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
def test_causal_pieces_equal_a_causal_pass(family: str, attn: str) -> None:
    backbone = tiny_backbone(family, attn=attn)
    whole = backbone.hidden(ids(), causal=True)
    cache = cache_for(backbone)
    for start, stop in ((0, 7), (7, 8), (8, LENGTH)):
        close(backbone.hidden(ids()[:, start:stop], causal=True, cache=cache.at(start)), whole[:, start:stop])


def test_replacing_a_stretch_in_the_middle(family: str) -> None:
    """One layer: keys and values are functions of token and position alone, so a replacement is exact."""
    backbone = tiny_backbone(family, layers=1)
    changed = ids()
    changed[:, 6:11] = ids(seed=9)[:, 6:11]
    cache = cache_for(backbone)
    close(backbone.hidden(ids(), causal=False, cache=cache.at(0)), backbone.hidden(ids(), causal=False))
    whole = backbone.hidden(changed, causal=False)
    slots_L = torch.arange(6, 11)
    close(backbone.hidden(changed[:, 6:11], causal=False, cache=cache.at(6, visible=LENGTH)), whole[:, 6:11])
    # the same slots again, given one by one, in any order
    back = slots_L.flip(0)
    close(backbone.hidden(changed[:, back], causal=False, cache=cache.at(back)), whole[:, back])
    close(backbone.hidden(changed[:, :6], causal=False, cache=cache.at(0, visible=LENGTH)), whole[:, :6])


def test_rows_may_write_at_slots_of_their_own(family: str) -> None:
    backbone = tiny_backbone(family, layers=1)
    slot_BL = torch.tensor([[2, 3, 4], [17, 0, 9]])
    changed = ids().scatter(1, slot_BL, ids(length=3, seed=4))
    cache = cache_for(backbone)
    backbone.hidden(ids(), causal=False, cache=cache.at(0))
    piece = backbone.hidden(changed.gather(1, slot_BL), causal=False, cache=cache.at(slot_BL))
    whole = backbone.hidden(changed, causal=False)
    close(piece, whole.gather(1, slot_BL[..., None].expand_as(piece)))
    changed[0, 0] = 3
    alone = backbone.hidden(changed, causal=False, cache=cache.at(0))
    close(alone, backbone.hidden(changed, causal=False))


def test_positions_may_differ_from_slots(family: str) -> None:
    """Rows padded on the left: their tokens sit at higher slots than their positions."""
    backbone = tiny_backbone(family)
    row, pad = ids(1, 12), 4
    whole = backbone.hidden(row, causal=False, attention_mask_B1LM=block_causal_mask(12, 4))
    cache = cache_for(backbone)
    real_M = torch.arange(LENGTH) >= pad
    backbone.hidden(ids(1, pad, seed=5), causal=False, cache=cache.at(0))
    for start in range(0, 12, 4):
        piece = backbone.hidden(
            row[:, start : start + 4],
            causal=False,
            position_BL=torch.arange(start, start + 4)[None],
            attention_mask_B1LM=real_M[None, None, None, : pad + start + 4].expand(1, 1, 4, -1),
            cache=cache.at(pad + start),
        )
        close(piece, whole[:, start : start + 4])


def test_keeping_rows_is_having_had_only_those() -> None:
    backbone = tiny_backbone()
    cache = cache_for(backbone)
    backbone.hidden(ids(3, 6), causal=False, cache=cache.at(0))
    cache.keep_rows(torch.tensor([2, 0]))
    found = backbone.hidden(ids(3)[[2, 0], 6:], causal=False, cache=cache.at(6))
    other = cache_for(backbone)
    backbone.hidden(ids(3, 6)[[2, 0]], causal=False, cache=other.at(0))
    close(found, backbone.hidden(ids(3)[[2, 0], 6:], causal=False, cache=other.at(6)))


def test_buffers_are_made_once() -> None:
    backbone = tiny_backbone()
    cache = cache_for(backbone)
    backbone.hidden(ids(length=6), causal=False, cache=cache.at(0))
    first = [layer.keys.data_ptr() for layer in cache.layers]
    backbone.hidden(ids(length=6), causal=False, cache=cache.at(6))
    assert [layer.keys.data_ptr() for layer in cache.layers] == first
    assert all(tuple(layer.values.shape) == (2, 2, LENGTH, 8) for layer in cache.layers)


def test_slots_that_do_not_exist_are_refused() -> None:
    backbone = tiny_backbone()
    with pytest.raises(DllmError, match=r"Slots 16\.\.19 do not fit a cache of 18"):
        backbone.hidden(ids(length=4), causal=False, cache=cache_for(backbone).at(16))
    with pytest.raises(DllmError, match="19 visible slots"):
        cache_for(backbone).at(0, visible=19)


def test_positions_and_not_the_row_length_must_fit_the_model() -> None:
    """[clean | noisy] layouts are twice as long as their positions run."""
    backbone = tiny_backbone()
    position = torch.arange(40).repeat(2)[None]
    mask = torch.ones(1, 1, 80, 80, dtype=torch.bool)
    hidden = backbone.hidden(ids(1, 80), causal=False, position_BL=position, attention_mask_B1LM=mask)
    assert hidden.shape == (1, 80, 32)
    with pytest.raises(DllmError, match="65 tokens"):
        backbone.hidden(ids(1, 3), causal=False, position_BL=torch.tensor([[0, 1, 64]]), attention_mask_B1LM=mask)
