"""The quick pass against transformers' modules: same states, and it steps aside where it would not give them."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dllm_core.backbone import attention
from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.passes import choice, quick_weights
from dllm_core.backbone.passes.plain import PlainPass
from dllm_core.backbone.passes.quick import QuickPass
from dllm_core.backbone.slot_cache import SlotCache
from dllm_core.kernels import dispatch, token_stats
from tests.decoder_models import (
    CHANGES,
    GATED,
    VARIANTS,
    attention_masks,
    close,
    decoder,
    decodes_beside_training,
    in_place,
)
from tests.tiny import NUM_TOKENS, tiny_backbone


def ids(*shape: int) -> Tensor:
    return torch.randint(NUM_TOKENS, shape, generator=torch.Generator().manual_seed(len(shape)))


def quick(backbone: Backbone) -> QuickPass:
    found = choice.pass_for(backbone)
    assert isinstance(found, QuickPass), choice.obstacle(backbone)
    return found


# -- the same states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [*GATED, *VARIANTS])
def test_states_are_those_of_the_modules(kind: str, batch: int) -> None:
    backbone = decoder(kind)
    run, canvas = quick(backbone), ids(batch, 11)
    asked = torch.tensor([0, 10, 3, batch * 11 - 1])
    for mask in attention_masks(batch, 11):
        with torch.no_grad():
            expected = backbone.hidden(canvas, causal=False, attention_mask_B1LM=mask)
        close(run(canvas, attention_mask_B1LM=mask), expected)
        close(run(canvas, attention_mask_B1LM=mask, row_M=asked), expected.flatten(0, 1)[asked])


@pytest.mark.parametrize("kind", GATED)
def test_states_from_a_cache_are_those_of_the_modules(kind: str) -> None:
    """A prefix, a stretch behind it, and rows that stand at different places; each after what came before."""
    backbone = tiny_backbone(kind, layers=3)
    caches = [SlotCache(backbone.num_layers, 16) for _ in range(2)]
    run, canvas = quick(backbone), ids(2, 16)
    scattered = torch.stack((torch.arange(3, 8), torch.arange(9, 14)))
    some = torch.rand(2, 1, 5, 16, generator=torch.Generator().manual_seed(1)) < 0.7
    some[..., 0] = True
    for at, visible, position, mask in (
        (0, 9, torch.arange(9)[None], None),
        (9, 16, torch.arange(9, 16)[None], None),
        (9, 16, torch.arange(9, 14)[None], some),
        (scattered, None, scattered, some),
        (scattered, None, scattered, None),
    ):
        length = position.shape[1]
        tokens = canvas[:, :length]
        slots = [cache.at(at, visible=visible) for cache in caches]
        with torch.no_grad():
            expected = backbone.hidden(
                tokens, causal=False, position_BL=position, attention_mask_B1LM=mask, cache=slots[0]
            )
        found = run(tokens, position_BL=position, attention_mask_B1LM=mask, cache=slots[1])
        close(found, expected)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        close(other.keys, one.keys)
        close(other.values, one.values)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", GATED)
def test_bf16_is_as_close_to_float64_as_the_modules_are(kind: str, batch: int) -> None:
    """Over many canvases, since roundings are a matter of luck; plain attention in groups, with and without masks."""
    backbone = tiny_backbone(kind, layers=3).to(torch.bfloat16)
    exact = copy.deepcopy(backbone).double()
    run = quick(backbone)
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(12):
        canvas = torch.randint(NUM_TOKENS, (batch, 13), generator=torch.Generator().manual_seed(seed))
        for mask in attention_masks(batch, 13):
            with torch.no_grad():
                expected = exact.hidden(canvas, causal=False, attention_mask_B1LM=mask)
                usual = backbone.hidden(canvas, causal=False, attention_mask_B1LM=mask)
            found = run(canvas, attention_mask_B1LM=mask)
            errors += torch.stack([(x.double() - expected).square().sum() for x in (found, usual)])
            assert (found.double() - expected).norm() < 0.2 * expected.norm()
    assert errors[0] < 1.3 * errors[1]


def test_a_long_canvas_takes_the_kernel_for_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("qwen3").to(torch.bfloat16)
    canvas = ids(2, 13)
    short = quick(backbone)(canvas)
    calls = []
    sdpa = attention.sdpa_attention_forward
    monkeypatch.setattr("dllm_core.layers.attention.LONGEST_PLAIN", 12)
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: (calls.append(1), sdpa(*a, **k))[1])
    long = quick(backbone)(canvas)
    assert len(calls) == backbone.num_layers
    assert (long.float() - short.float()).norm() < 0.05 * short.float().norm()


@pytest.mark.parametrize("largest", [0, quick_weights.LARGEST_COPY])
def test_weights_are_copied_up_to_a_size(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_weights, "LARGEST_COPY", largest)
    backbone, canvas = tiny_backbone("qwen2"), ids(2, 9)
    run = quick(backbone)
    if quick_weights.layout(backbone.device, torch.float32, 1)(torch.zeros(4, 4)).is_mkldnn:
        assert run.weights.blocks[0].up.weight.is_mkldnn == (largest > 0)
        assert run.head_WD.is_mkldnn == (largest > 0)
    with torch.no_grad():
        close(run(canvas), backbone.hidden(canvas, causal=False))
    reads_out_as_the_model(run, backbone)


def reads_out_as_the_model(run: QuickPass, backbone: Backbone) -> None:
    """Compare what is read through the pass's head with the distribution of the model's own logits."""
    states = torch.randn(7, backbone.hidden_size, generator=torch.Generator().manual_seed(4)).to(torch.float32)
    found = token_stats.stats(states.to(backbone.head_weight_VD.dtype), run.head_WD, entropy=True)
    logp = backbone.logits(states.to(backbone.head_weight_VD.dtype)).double().log_softmax(-1)[:, :NUM_TOKENS]
    assert torch.equal(found.argmax_M, logp.argmax(-1))
    close(found.top_logprob_M.double(), logp.amax(-1))
    assert found.entropy_M is not None
    close(found.entropy_M.double(), -(logp.exp() * logp).sum(-1))


# -- weights that change ----------------------------------------------------------------------------------------------


def _the_head(backbone: Backbone) -> None:
    backbone.model.get_output_embeddings().weight.data[::3] *= 1.3


def _cast(backbone: Backbone) -> None:
    backbone.to(torch.float64)


@pytest.mark.parametrize("change", [*CHANGES, _cast])
def test_changed_weights_are_laid_out_anew(change: Any) -> None:
    backbone, canvas = tiny_backbone("qwen3"), ids(1, 9)
    before = quick(backbone)(canvas)
    assert quick(backbone).weights is quick(backbone).weights, "weights that did not change are laid out once"
    change(backbone)
    after = quick(backbone)(canvas)
    with torch.no_grad():
        expected = backbone.hidden(canvas, causal=False)
    close(after, expected)
    assert not torch.allclose(before.to(after.dtype), after, atol=1e-3) or change is _cast


@pytest.mark.parametrize("tied", [True, False])
def test_a_changed_head_is_laid_out_anew(tied: bool) -> None:
    backbone = tiny_backbone("llama")
    if not tied:
        backbone.model.lm_head.weight = nn.Parameter(backbone.head_weight_VD.detach().flip(0).clone())
    reads_out_as_the_model(quick(backbone), backbone)
    _the_head(backbone)
    reads_out_as_the_model(quick(backbone), backbone)


def test_training_between_decodes_shows() -> None:
    found = decodes_beside_training(tiny_backbone("llama"))
    assert found[0] != found[1]


def test_what_is_laid_out_belongs_to_nobody_else() -> None:
    backbone, canvas = tiny_backbone("llama"), ids(1, 9)
    names = set(backbone.state_dict())
    quick(backbone)(canvas)
    other = copy.deepcopy(backbone)
    assert set(backbone.state_dict()) == names
    in_place(other)
    with torch.no_grad():
        close(quick(other)(canvas), other.hidden(canvas, causal=False))
        close(quick(backbone)(canvas), backbone.hidden(canvas, causal=False))
    gone = weakref.ref(quick(backbone).weights)
    del backbone
    gc.collect()
    assert gone() is None


# -- stepping aside ---------------------------------------------------------------------------------------------------


def _hooked(backbone: Backbone, _: pytest.MonkeyPatch) -> None:
    backbone.layers[1].register_forward_hook(lambda *_: None)


def _eager(backbone: Backbone, _: pytest.MonkeyPatch) -> None:
    backbone.model.set_attn_implementation("eager")


def _compiled(backbone: Backbone, _: pytest.MonkeyPatch) -> None:
    backbone.layers[0].compile(backend="eager")


def _another_activation(backbone: Backbone, _: pytest.MonkeyPatch) -> None:
    backbone.config.hidden_act = "gelu"
    for block in backbone.layers:
        block.mlp.act_fn = nn.GELU()


def _adapter(backbone: Backbone, _: pytest.MonkeyPatch) -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    backbone.layers[0].mlp.up_proj.__class__ = Adapted


def _asked(_: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLLM_KERNELS", "reference")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "modules have hooks"),
        (_eager, "attention is set to eager"),
        (_compiled, "the decoder is compiled"),
        (_another_activation, "not written for gelu"),
        (_adapter, "not plain ones"),
        (_asked, "DLLM_KERNELS=reference"),
    ],
)
def test_it_steps_aside_where_it_would_not_give_the_same(
    change: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, canvas = tiny_backbone("llama"), ids(2, 9)
    change(backbone, monkeypatch)
    assert reason in str(choice.obstacle(backbone))
    run = choice.pass_for(backbone)
    assert isinstance(run, PlainPass)
    with torch.no_grad():
        expected = backbone.hidden(canvas, causal=False)
        close(run(canvas, row_M=torch.tensor([4, 11])), expected.flatten(0, 1)[[4, 11]])


def test_other_families_and_autocast_take_the_modules() -> None:
    assert "not written for gpt2" in str(choice.obstacle(tiny_backbone("gpt2")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choice.obstacle(tiny_backbone("llama")) == "autocast is on"
    assert isinstance(choice.pass_for(tiny_backbone("llama"), quick=False), PlainPass)


def test_which_pass_runs_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.announce.cache_clear()
    with caplog.at_level("INFO", dispatch.__name__):
        for _ in range(2):
            choice.pass_for(tiny_backbone("llama"))
            choice.pass_for(tiny_backbone("gpt2"))
    assert caplog.messages == [
        "decoder pass runs its quick implementation (llama on a CPU)",
        "decoder pass runs its reference implementation (it is not written for gpt2)",
    ]
