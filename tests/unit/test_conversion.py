"""Conversion: mask row, padding, contract, tokenizer, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.conversion import convert, tokenizer_size
from dllm_core.backbone.identity import model_identity, tokenizer_identity
from dllm_core.errors import ContractError, UnsupportedModelError
from tests.tiny import NUM_TOKENS, byte_tokenizer, tiny_model, write_source


@pytest.mark.parametrize("tied", [True, False])
def test_conversion_keeps_the_model_and_adds_a_mask_row(family: str, tied: bool, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", family, tied=tied)
    contract = convert(source, tmp_path / "out", alignment="shifted")
    # transformers' own Qwen2 tokenizer class adds <|endoftext|>, which this model has no row for
    assert contract.num_tokens == contract.mask_token_id == NUM_TOKENS + (family == "qwen2")
    backbone = Backbone.from_pretrained(tmp_path / "out", expect={"alignment": "shifted"})
    assert backbone.contract == contract
    assert backbone.is_tied == tied
    assert backbone.embedding_weight_VD.shape[0] == backbone.head_weight_VD.shape[0] == 128
    plain = AutoModelForCausalLM.from_pretrained(source).eval()
    assert torch.equal(backbone.embedding_weight_VD[:NUM_TOKENS], plain.get_input_embeddings().weight)
    ids = torch.randint(0, NUM_TOKENS, (2, 9))
    with torch.no_grad():
        ours, theirs = backbone.logits(backbone.hidden(ids, causal=True)), plain(ids).logits
    torch.testing.assert_close(ours[..., :NUM_TOKENS], theirs, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["is_causal"] is False
    assert config["dllm"]["alignment"] == "shifted"


def test_mask_row_is_the_mean_plus_two_per_cent_of_rms(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", hidden=256)
    contract = convert(source, tmp_path / "a", alignment="shifted")
    table = Backbone.from_pretrained(tmp_path / "a").embedding_weight_VD.detach()
    real = table[:NUM_TOKENS]
    noise = table[contract.mask_token_id] - real.mean(0)
    assert noise.square().mean().sqrt() / real.square().mean().sqrt() == pytest.approx(0.02, rel=0.15)
    convert(source, tmp_path / "b", alignment="shifted")
    assert torch.equal(Backbone.from_pretrained(tmp_path / "b").embedding_weight_VD, table)
    convert(source, tmp_path / "c", alignment="shifted", seed=1)
    assert not torch.equal(Backbone.from_pretrained(tmp_path / "c").embedding_weight_VD, table)
    assert model_identity(tmp_path / "a") == model_identity(tmp_path / "b") != model_identity(tmp_path / "c")


def test_mask_id_is_used_by_nobody(tmp_path: Path) -> None:
    """Tokens added beyond the model's rows, and padding rows beyond the tokenizer, both keep their ids."""
    for vocab, added in ((97, 3), (120, 0), (120, 3), (128, 0), (90, 0)):
        directory = tmp_path / f"{vocab}-{added}"
        tiny_model("llama", vocab=vocab).save_pretrained(directory)
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([f"<extra{i}>" for i in range(added)])
        tokenizer.save_pretrained(directory)
        assert tokenizer_size(directory) == len(tokenizer) == 97 + added
        contract = convert(directory, directory / "out", alignment="shifted")
        assert contract.num_tokens == len(tokenizer)
        assert contract.mask_token_id == max(vocab, len(tokenizer))
        assert contract.mask_token_id not in AutoTokenizer.from_pretrained(directory / "out").get_vocab().values()
        backbone = Backbone.from_pretrained(directory / "out")
        rows = backbone.embedding_weight_VD.shape[0]
        assert rows % 64 == 0
        assert rows - contract.mask_token_id <= 64
        assert backbone.blocked_V.tolist() == [i >= len(tokenizer) for i in range(rows)]


@pytest.mark.parametrize("text", ["<mask>", "[MASK]", "<|mask|>", "<|MASK|> <|mdm_mask|>"])
def test_literal_mask_string_stays_text(text: str, tiny_source_dir: Path, tmp_path: Path) -> None:
    contract = convert(tiny_source_dir, tmp_path, alignment="shifted")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(f"a {text} b").input_ids
    assert max(ids) < contract.num_tokens
    assert tokenizer.decode(ids) == f"a {text} b"
    assert tokenizer_identity(tmp_path) == tokenizer_identity(tiny_source_dir)


def test_dropout_is_removed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    assert config.resid_pdrop > 0
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", alignment="shifted")
    backbone = Backbone.from_pretrained(tmp_path / "out").train()
    ids = torch.randint(0, 97, (1, 9))
    assert torch.equal(backbone.hidden(ids, causal=False), backbone.hidden(ids, causal=False))


def test_generation_defaults_that_cannot_be_saved_do_not_matter(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    written = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [3, 5]}
    (source / "generation_config.json").write_text(json.dumps(written))
    convert(source, tmp_path / "out", alignment="shifted")
    assert "temperature" not in json.loads((tmp_path / "out" / "generation_config.json").read_text())
    # chat models name all their end tokens there and only there
    assert Backbone.from_pretrained(tmp_path / "out").eos_token_ids == (3, 5)


def test_keeps_the_dtype_of_the_weights(tmp_path: Path) -> None:
    tiny_model("qwen3", vocab=97).bfloat16().save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", alignment="shifted")
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_converted_checkpoints_are_taken_under_their_own_alignment_only(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    first = convert(source, tmp_path / "a", alignment="shifted")
    assert convert(tmp_path / "a", tmp_path / "b", alignment="shifted", seed=5) == first
    assert model_identity(tmp_path / "a") == model_identity(tmp_path / "b")
    with pytest.raises(ContractError, match=r"'shifted'.*'same_position'"):
        convert(tmp_path / "a", tmp_path / "c", alignment="same_position")
    assert not (tmp_path / "c").exists()


def refuse(directory: Path, match: str, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        convert(directory, directory / "out", alignment="shifted")
    assert len(str(caught.value).splitlines()) == 2
    assert not (directory / "out").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "'mamba'"),
        ({"model_type": None}, "'None'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised weights \(gptq\)"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"use_sliding_window": True}, "sliding_attention"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"num_hidden_layers": 3}, "do not fit their config"),
    ],
)
def test_refusals(changes: dict[str, object], match: str, tmp_path: Path) -> None:
    refuse(write_source(tmp_path / "source"), match, **changes)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "evil.py").write_text("raise SystemExit('remote code ran')")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", alignment="shifted")


def test_identity_follows_content_alone(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    memo = tmp_path / "memo.json"
    before = model_identity(source, memo=memo)
    assert model_identity(source) == before == model_identity(source, memo=memo)
    config = json.loads((source / "config.json").read_text())
    config["transformers_version"] = "0"
    (source / "config.json").write_text(json.dumps(config))
    assert model_identity(source, memo=memo) == before
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert model_identity(source, memo=memo) == model_identity(source) != before
