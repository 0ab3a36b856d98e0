"""Tiny random models and tokenizers for tests; no files, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from dllm_core.backbone.backbone import Backbone
from dllm_core.backbone.contract import Contract

NUM_TOKENS = 97
ROWS = 128
TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!\n"
    "Fellow citizens of the Senate, the state of the Union is strong; 1790 was long ago, and so was 1861.\n"
)


def tiny_config(
    family: str, *, layers: int = 2, hidden: int = 32, vocab: int = ROWS, tied: bool = True, max_length: int = 64
) -> PreTrainedConfig:
    """Return a small config of one of the four families (grouped-query attention where the family has it)."""
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    if family == "gpt2":
        return GPT2Config(**common, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    gated: dict[str, Any] = {"intermediate_size": 2 * hidden, "num_key_value_heads": 2, **common}
    if family == "llama":
        return LlamaConfig(**gated)
    if family == "qwen2":
        return Qwen2Config(**gated)
    if family == "qwen3":
        return Qwen3Config(**gated, head_dim=16)
    raise ValueError(family)


def tiny_model(family: str = "llama", *, seed: int = 0, attn: str = "sdpa", **config: Any) -> PreTrainedModel:
    """Return a random causal model in evaluation mode, fp32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **config), attn_implementation=attn)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            # norms of one and biases of zero would hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_backbone(
    family: str = "llama", *, alignment: str = "shifted", model_block: int | None = None, **options: Any
) -> Backbone:
    """Return a backbone with NUM_TOKENS real tokens, mask id NUM_TOKENS and ROWS rows; options as for tiny_model.

    With `model_block` it is block-causal, in blocks of that many tokens.
    """
    fields: dict[str, Any] = {"block_size": model_block, "attention": "block_causal"} if model_block else {}
    fields["alignment"] = alignment
    contract = Contract(mask_token_id=NUM_TOKENS, num_tokens=NUM_TOKENS, **fields)
    return Backbone(tiny_model(family, **options), contract)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose tokens are the printable ASCII bytes, newline, and <|end|> (id 0)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted({byte_level.pre_tokenize_str(chr(b))[0][0] for b in [10, *range(32, 127)]})
    vocab = {"<|end|>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def write_source(directory: Path, family: str = "llama", *, seed: int = 0, **config: Any) -> Path:
    """Write a plain causal model with the byte tokenizer (97 ids) to `directory`, as a user would have one."""
    model = tiny_model(family, seed=seed, **{"vocab": NUM_TOKENS, **config})
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory
