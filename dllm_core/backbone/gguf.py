"""GGUF to safetensors, once. The quantised blocks are unpacked; what was rounded stays rounded.

transformers marks a model that it read from GGUF as quantised, refuses to save it, and needs accelerate for it. So
the tensors are read with the `gguf` package here; config and tokenizer come from transformers' own readers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dllm_core.backbone.families import check_config
from dllm_core.backbone.loading import no_progress_bars
from dllm_core.backbone.sources import check_hash
from dllm_core.errors import MissingExtraError, UnsupportedModelError

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FAMILIES = ("llama", "qwen2", "qwen3")


def convert_gguf(gguf_path: Path | str, out_dir: Path | str, expected_sha256: str | None) -> None:
    """Write a plain fp32 safetensors model with config and tokenizer.

    Args:
        gguf_path: file of a llama, qwen2 or qwen3 model.
        out_dir: directory to write; created.
        expected_sha256: checked before anything else is done; None skips the check.

    Raises:
        DllmError: the file is damaged (both hashes are named).
        MissingExtraError: the gguf package is not installed.
        UnsupportedModelError: another architecture, or tensors that do not fit it.
    """
    path, out = Path(gguf_path), Path(out_dir)
    if expected_sha256 is not None:
        check_hash(path, expected_sha256)
    reader = _reader(path)
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    family = check_config(config.to_dict(), path.name)
    if family.model_type not in _FAMILIES:
        raise UnsupportedModelError(
            f"'{path.name}' is a GGUF of type '{family.model_type}', which is not read here.",
            f"Give safetensors, or a GGUF of: {', '.join(_FAMILIES)}.",
        )
    tensors = _tensors(reader, config)
    config.tie_word_embeddings = "lm_head.weight" not in tensors or torch.equal(
        tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    )
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    config.architectures = [family.architecture]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"The tensors of '{path.name}' do not fit its own description: {str(error).splitlines()[-1].strip()}",
            "The file is unusual or incomplete; give the model as safetensors.",
        ) from error
    with no_progress_bars():
        model.save_pretrained(out)
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(out)


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError(
            f"Reading '{path.name}' needs the package gguf, which is not installed.",
            "Install it: pip install 'dllm-grid[gguf]'",
        ) from error
    return GGUFReader(path)


def _tensors(reader: Any, config: Any) -> dict[str, Tensor]:
    from gguf import dequantize

    tensors = {}
    for entry in reader.tensors:
        stem, _, kind = entry.name.rpartition(".")
        if stem == "rope_freqs":
            continue
        value = torch.tensor(dequantize(entry.data, entry.tensor_type), dtype=torch.float32)
        if config.model_type == "llama" and stem.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if stem.endswith("attn_q") else config.num_key_value_heads
            value = _unpermute(value, heads)
        tensors[f"{_name(stem)}.{kind}"] = value
    return tensors


def _name(stem: str) -> str:
    if stem.startswith("blk."):
        _, number, part = stem.split(".", 2)
        return f"model.layers.{number}.{_BLOCK_NAMES.get(part, part)}"
    return _NAMES.get(stem, stem)


def _unpermute(weight_OD: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of rotary pairs: it interleaves the two halves of each head, transformers does not."""
    half = weight_OD.shape[0] // heads // 2
    return weight_OD.view(heads, half, 2, *weight_OD.shape[1:]).transpose(1, 2).reshape(weight_OD.shape)
