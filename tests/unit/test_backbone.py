"""The backbone against transformers' own forward, family by family."""

from __future__ import annotations

import json

import pytest
import torch

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.contract import read_contract
from dllm_core.errors import ContractError, DllmError, UnsupportedModelError
from tests.tiny import NUM_TOKENS, ROWS, tiny_backbone, tiny_model, write_source

IMPLEMENTATIONS = ("sdpa", "eager")


def ids(batch: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, NUM_TOKENS, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
def test_causal_equals_transformers(family: str, attn: str) -> None:
    backbone = tiny_backbone(family, attn=attn)
    with torch.no_grad():
        # a cache makes the keys contiguous, which moves the last bit of the eager product
        theirs = backbone.model(ids(), is_causal=True, use_cache=False).logits
        ours = backbone.logits(backbone.hidden(ids(), causal=True))
    assert torch.equal(ours[..., :NUM_TOKENS], theirs[..., :NUM_TOKENS].float())
    assert (ours[..., NUM_TOKENS:] == -torch.inf).all()


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
def test_causal_sees_no_future_and_bidirectional_sees_all(family: str, attn: str) -> None:
    backbone = tiny_backbone(family, attn=attn)
    changed = ids()
    changed[:, -1] = (changed[:, -1] + 1) % NUM_TOKENS
    with torch.no_grad():
        for causal in (True, False):
            moved = (backbone.hidden(ids(), causal=causal) - backbone.hidden(changed, causal=causal)).abs()
            assert (moved[:, :-1].amax(-1) > 1e-4).all() != causal
            assert not causal or moved[:, :-1].max() == 0


def test_sdpa_and_eager_agree(family: str) -> None:
    sdpa, eager = (tiny_backbone(family, attn=attn) for attn in IMPLEMENTATIONS)
    documents = torch.tensor([[0] * 4 + [1] * 7, [0] * 8 + [-1] * 3])
    with torch.no_grad():
        for causal in (True, False):
            for document_BL in (None, documents):
                a = sdpa.hidden(ids(), causal=causal, document_BL=document_BL)
                b = eager.hidden(ids(), causal=causal, document_BL=document_BL)
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_independent(family: str, attn: str, causal: bool) -> None:
    backbone = tiny_backbone(family, attn=attn)
    parts = [ids(1, n, seed=n) for n in (5, 3, 6)]
    pad = torch.full((1, 2), 7)
    row = torch.cat([*parts, pad], dim=1)
    document = torch.tensor([[0] * 5 + [1] * 3 + [2] * 6 + [-1] * 2])
    position = torch.tensor([[*range(5), *range(3), *range(6), 0, 0]])
    with torch.no_grad():
        packed = backbone.hidden(row, causal=causal, document_BL=document, position_BL=position)
        alone = torch.cat([backbone.hidden(part, causal=causal) for part in parts], dim=1)
    assert torch.isfinite(packed).all()
    torch.testing.assert_close(packed[:, :14], alone, rtol=1e-5, atol=1e-5)


def test_padding_is_never_seen(family: str) -> None:
    backbone = tiny_backbone(family)
    document = torch.tensor([[0] * 8 + [-1] * 3] * 2)
    other = ids()
    other[:, 8:] = 3
    with torch.no_grad():
        a, b = (backbone.hidden(x, causal=False, document_BL=document) for x in (ids(), other))
    assert torch.equal(a[:, :8], b[:, :8])


def test_positions_alone_never_make_documents(family: str) -> None:
    """transformers reads restarting positions as packing when no mask is given; documents say so here, alone."""
    backbone = tiny_backbone(family)
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]] * 2)
    changed = ids()
    changed[:, 0] = (changed[:, 0] + 1) % NUM_TOKENS
    with torch.no_grad():
        a, b = (backbone.hidden(x, causal=True, position_BL=position) for x in (ids(), changed))
    assert (a - b)[:, -1].abs().max() > 1e-4


def test_given_mask_replaces_the_others(tiny_backbone: Backbone) -> None:
    mask = torch.ones(1, 1, 11, 11, dtype=torch.bool).tril()
    with torch.no_grad():
        a = tiny_backbone.hidden(ids(), causal=False, attention_mask_B1LM=mask)
        b = tiny_backbone.hidden(ids(), causal=True)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_embeddings_in_place_of_ids(family: str) -> None:
    backbone = tiny_backbone(family)
    with torch.no_grad():
        embeds = backbone.embedding_weight_VD[ids()]
        a = backbone.hidden(inputs_embeds_BLD=embeds, causal=False)
        assert torch.equal(a, backbone.hidden(ids(), causal=False))


def test_plain_batches_give_no_mask_to_the_blocks(family: str) -> None:
    backbone = tiny_backbone(family)
    seen = []
    backbone.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("attention_mask", args[2] if len(args) > 2 else None)),
        with_kwargs=True,
    )
    zeros, position = torch.zeros(2, 11, dtype=torch.long), torch.arange(11).expand(2, 11)
    for causal in (True, False):
        backbone.hidden(ids(), causal=causal, document_BL=zeros, position_BL=position)
    assert seen == [None, None]


def test_capture_equals_transformers_hidden_states(family: str) -> None:
    backbone = tiny_backbone(family, layers=3)
    names = ["embed", "1", "2", "final"]
    with torch.no_grad():
        theirs = backbone.model(ids(), is_causal=False, output_hidden_states=True).hidden_states
        with backbone.capture(names) as states:
            out = backbone.hidden(ids(), causal=False)
    assert list(states) == names
    for name, expected in zip(names, theirs, strict=True):
        assert torch.equal(states[name], expected), name
    assert torch.equal(states["final"], out)
    before = dict(states)
    backbone.hidden(ids(seed=5), causal=False)
    assert all(states[name] is before[name] for name in names), "hooks must be gone after the context"


def test_capture_refuses_unknown_layers(tiny_backbone: Backbone) -> None:
    for name in ("0", "2", "finale", "-1"):
        with pytest.raises(DllmError, match=name), tiny_backbone.capture([name]):
            pass


@pytest.mark.parametrize("freeze", [(), ("embeddings",)])
def test_capture_under_activation_checkpointing(family: str, freeze: tuple[str, ...]) -> None:
    """Same states, same gradients, nothing captured again while the backward pass recomputes."""
    grads, losses = [], []
    for checkpointing in (False, True):
        backbone = tiny_backbone(family, layers=3).train()
        backbone.freeze(freeze)
        if checkpointing:
            backbone.enable_activation_checkpointing()
        with backbone.capture(["embed", "1", "2", "final"]) as states:
            out = backbone.hidden(ids(), causal=False)
            kept = dict(states)
            loss = sum(((s - 1) ** 2).mean() * (k + 1) for k, s in enumerate(states.values())) + out.sin().sum()
            loss.backward()
            assert all(states[name] is kept[name] for name in kept)
        losses.append(loss.detach())
        grads.append({n: p.grad for n, p in backbone.named_parameters() if p.requires_grad and p.grad is not None})
    assert losses[0] == losses[1]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_equal(family: str, tied: bool, tmp_path) -> None:
    backbone = tiny_backbone(family, tied=tied, alignment="same_position")
    assert backbone.is_tied == tied
    backbone.save_pretrained(tmp_path)
    again = Backbone.from_pretrained(tmp_path, expect={"alignment": "same_position"})
    assert again.contract == backbone.contract == read_contract(tmp_path)
    assert again.is_tied == tied
    ours, theirs = backbone.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    with torch.no_grad():
        for causal in (True, False):
            assert torch.equal(backbone.hidden(ids(), causal=causal), again.hidden(ids(), causal=causal))
    assert again.config.is_causal is False


def test_other_contract_is_refused_with_both_values(tiny_backbone: Backbone, tmp_path) -> None:
    tiny_backbone.save_pretrained(tmp_path)
    with pytest.raises(ContractError, match=r"alignment='shifted'.*'same_position'"):
        Backbone.from_pretrained(tmp_path, expect={"alignment": "same_position"})
    with pytest.raises(ContractError, match=r"mask_token_id=97.*12"):
        Backbone.from_pretrained(tmp_path, expect={"mask_token_id": 12})


@pytest.mark.parametrize("wrong", [{"attention": "block_causal"}, {"block_size": 0}, {"attention": "sideways"}])
def test_a_contract_that_contradicts_itself_is_refused(tiny_backbone: Backbone, tmp_path, wrong) -> None:
    tiny_backbone.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["dllm"] |= wrong
    path.write_text(json.dumps(config))
    with pytest.raises(ContractError, match="not understood"):
        read_contract(tmp_path)


def test_plain_model_and_missing_directory_are_refused(tmp_path) -> None:
    write_source(tmp_path / "plain")
    with pytest.raises(ContractError, match="no 'dllm' contract"):
        Backbone.from_pretrained(tmp_path / "plain")
    with pytest.raises(ContractError, match="no readable config"):
        Backbone.from_pretrained(tmp_path / "nothing")


def test_missing_weights_are_refused(tiny_backbone: Backbone, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_backbone.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"do not fit their config: model\.layers\.1\.mlp\.up_proj"):
        Backbone.from_pretrained(tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5, 32)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"do not fit their config: model\.layers\.1\.mlp\.up_proj"):
        Backbone.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnsupportedModelError, match="cannot be loaded"):
        Backbone.from_pretrained(tmp_path)


def test_freezing_rules(family: str) -> None:
    backbone = tiny_backbone(family, tied=False)
    backbone.freeze(["embeddings", "mlp"])
    frozen = {n for n, p in backbone.model.named_parameters() if not p.requires_grad}
    assert frozen == {
        n for n, _ in backbone.model.named_parameters() if ".mlp." in n or any(e in n for e in ("embed_", "wte", "wpe"))
    }
    assert backbone.num_parameters(trainable_only=True) == backbone.num_parameters() - sum(
        p.numel() for n, p in backbone.model.named_parameters() if n in frozen
    )
    with pytest.raises(DllmError, match="Did you mean 'mlp'"):
        backbone.freeze(["mlps"])


def test_rotary_frequencies_stay_fp32(tiny_backbone: Backbone, tmp_path) -> None:
    tiny_backbone.save_pretrained(tmp_path)
    frequencies = tiny_backbone.decoder.rotary_emb.inv_freq.clone()
    tiny_backbone.to(torch.bfloat16)
    assert torch.equal(tiny_backbone.decoder.rotary_emb.inv_freq, frequencies)
    assert tiny_backbone.embedding_weight_VD.dtype == torch.bfloat16
    loaded = Backbone.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded.hidden(ids(), causal=False), tiny_backbone.hidden(ids(), causal=False))


def test_too_long_a_sequence_is_refused(family: str) -> None:
    with pytest.raises(DllmError, match="65 tokens"):
        tiny_backbone(family).hidden(ids(1, 65), causal=False)


def test_flops_by_hand(family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    backbone = tiny_backbone(family, attn="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.logits(backbone.hidden(ids(2, 11), causal=False)[:, :5].reshape(10, -1))
    counted = counter.get_total_flops()
    rotary = 0 if family == "gpt2" else 2 * (16 if family == "qwen3" else 8) // 2 * 11
    assert backbone.flops_forward(22, 11, 10) == pytest.approx(counted, abs=2 * rotary)


def test_mask_token_inside_the_real_tokens_is_refused() -> None:
    from dllm_core.backbone.contract import Contract

    with pytest.raises(ContractError, match="mask token id"):
        Backbone(tiny_model(), Contract(mask_token_id=5, num_tokens=NUM_TOKENS))
    with pytest.raises(ContractError, match="mask token id"):
        Backbone(tiny_model(), Contract(mask_token_id=ROWS, num_tokens=NUM_TOKENS))
