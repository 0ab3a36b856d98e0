"""GGUF against the model it was written from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dllm_core.backbone.gguf import convert_gguf
from dllm_core.errors import DllmError

gguf = pytest.importorskip("gguf")


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of rows: the two halves of each head are interleaved, row by row."""
    rows = weight.shape[0] // heads
    order = [h * rows + p + half * rows // 2 for h in range(heads) for p in range(rows // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(path: Path, model: torch.nn.Module, tokens: list[str]) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b", "b a"])  # transformers 5.17 reads a list of one as a bare string
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.startswith("model.layers."):
            _, _, number, rest = name.removesuffix(".weight").split(".", 3)
            target = f"blk.{number}.{names[rest]}.weight"
            if target.endswith(("attn_q.weight", "attn_k.weight")):
                heads = config.num_attention_heads if "attn_q" in target else config.num_key_value_heads
                value = permute(value, heads)
        else:
            top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            target = f"{top[name.removesuffix('.weight')]}.weight"
        writer.add_tensor(target, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_the_model_it_was_made_from(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = ["<|end|>", "a", "b", "ab", "ba", *(f"t{i}" for i in range(35))]
    write_gguf(tmp_path / "m.gguf", model, tokens)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out", None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.tie_word_embeddings == tied
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == [3]


def test_damaged_file_is_found_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(DllmError, match="is damaged"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out", "0" * 64)
    assert not (tmp_path / "out").exists()
