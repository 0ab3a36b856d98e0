"""The model families that can be converted, and where their parts live. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dllm_core.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Attribute names inside a transformers `*ForCausalLM` of one family.

    Attributes:
        model_type: `model_type` of the config.
        architecture: class name in the config's `architectures`.
        base: the decoder without its head.
        layers, norm: block list and final norm, inside the base.
        attention, mlp: inside a block.
        embeddings: token (first) and position embeddings, inside the base.
        dropouts: config fields that must be zero, because noise is keyed per sample here.
        is_gated: blocks are llama's (RMS norms, rotary heads that may share keys, a gated MLP), which `passes` run
            without transformers' modules; norms of heads and biases may be there or not.
    """

    model_type: str
    architecture: str
    base: str = "model"
    layers: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    dropouts: tuple[str, ...] = ("attention_dropout",)
    is_gated: bool = True


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", architecture="LlamaForCausalLM"),
        Family(model_type="qwen2", architecture="Qwen2ForCausalLM"),
        Family(model_type="qwen3", architecture="Qwen3ForCausalLM"),
        Family(
            model_type="gpt2",
            architecture="GPT2LMHeadModel",
            base="transformer",
            layers="h",
            norm="ln_f",
            attention="attn",
            embeddings=("wte", "wpe"),
            dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
            is_gated=False,
        ),
    )
}


def check_config(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a model config (the content of config.json).

    Args:
        config: the parsed JSON.
        where: what the user called the model, for messages.

    Raises:
        UnsupportedModelError: not a causal language model, another family, sliding-window layers, or weights that
            are quantised.
    """
    known = ", ".join(FAMILIES)
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(
            f"'{where}' is a model of type '{model_type}', which cannot be made bidirectional here.",
            f"Choose a causal language model of one of these families: {known}.",
        )
    if architectures and family.architecture not in architectures:
        raise UnsupportedModelError(
            f"'{where}' is not a causal language model: its config names {', '.join(architectures)}.",
            f"Choose a checkpoint saved as {family.architecture}.",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise UnsupportedModelError(
            f"'{where}' holds quantised weights ({method}), which cannot be trained.",
            "Choose the unquantised checkpoint of the same model.",
        )
    _check_attention(config, where)
    return family


def _check_attention(config: Mapping[str, Any], where: str) -> None:
    kinds = {kind for kind in config.get("layer_types") or [] if kind != "full_attention"}
    if config.get("use_sliding_window") and not config.get("layer_types"):
        kinds.add("sliding_attention")
    if kinds:
        raise UnsupportedModelError(
            f"'{where}' has layers of type {', '.join(sorted(kinds))}; only full attention can be converted.",
            "Choose a checkpoint in which every layer uses full attention (use_sliding_window: false).",
        )
    if config.get("add_cross_attention") or config.get("is_encoder_decoder"):
        raise UnsupportedModelError(
            f"'{where}' has cross-attention; only decoders on their own can be converted.",
            "Choose a plain decoder.",
        )
