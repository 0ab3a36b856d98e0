"""A small autoregressive model made here: tokenizer, random weights, a short pretraining. Needs no downloads.

B batch, L length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from dllm_core.backbone.loading import load_causal_lm, no_progress_bars
from dllm_core.errors import DataError, DllmError, did_you_mean
from dllm_core.kernels.masked_ce import token_losses

END = "<|endoftext|>"
POSITIONS = 2048
ARCHITECTURES = ("llama", "qwen3", "gpt2")


def train_tokenizer(texts: Iterable[str], vocab: int, out_dir: Path | str) -> int:
    """Train a byte-level BPE tokenizer, save it as transformers loads it, and return its number of tokens.

    All 256 bytes are tokens, so that any text can be spelt; id 0 ends a text. Little text gives fewer tokens.

    Args:
        texts: what to learn merges from.
        vocab: tokens wanted, at least 257.
        out_dir: directory to write; created.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    wrapped.save_pretrained(str(out_dir))
    return len(wrapped)


def build_scratch(shape: Mapping[str, Any], num_tokens: int, out_dir: Path | str, *, seed: int) -> None:
    """Write a causal model with random weights, beside the tokenizer that lies there.

    Args:
        shape: architecture, layers, hidden, heads, kv_heads, ffn.
        num_tokens: of the tokenizer.
        out_dir: directory to write; created.
        seed: of the weights.

    Raises:
        DllmError: unknown architecture.
    """
    config = _config(shape, num_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with no_progress_bars():
        model.save_pretrained(str(out_dir))


def pretrain_scratch(
    model_dir: Path | str,
    token_batches: Iterable[Tensor],
    steps: int,
    lr: float,
    on_step: Callable[[int, int, float], None] | None = None,
) -> float:
    """Train a causal model on next-token prediction for a while, and save it where it was.

    AdamW, fp32, 10 % warm-up, cosine to a tenth, clipped at norm 1. Deterministic given the weights and the batches.

    Args:
        model_dir: what `build_scratch` wrote.
        token_batches: int64 ids [B, L]; at least `steps` of them.
        steps: optimiser steps.
        lr: peak learning rate.
        on_step: called with (steps done, steps in all, mean CE in nats per token).

    Returns:
        Mean CE in nats per token over the last tenth of the steps.

    Raises:
        DataError: fewer batches than steps.
    """
    model = load_causal_lm(model_dir, dtype=torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _factor(step, steps))
    losses: list[float] = []
    for ids_BL in token_batches:
        if len(losses) == steps:
            break
        loss = _next_token_loss(model, ids_BL)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if on_step:
            on_step(len(losses), steps, losses[-1])
    if len(losses) < steps:
        raise DataError(
            f"The text gives {len(losses)} batches, but model.scratch.steps={steps} were asked for.",
            "Lower model.scratch.steps, or give more text.",
        )
    with no_progress_bars():
        model.save_pretrained(str(model_dir))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _next_token_loss(model: Any, ids_BL: Tensor) -> Tensor:
    states_BLD = model.base_model(input_ids=ids_BL, is_causal=True, use_cache=False).last_hidden_state
    targets_M = ids_BL[:, 1:].reshape(-1)
    weights_M = torch.full(targets_M.shape, 1.0 / len(targets_M))
    hidden_MD = states_BLD[:, :-1].flatten(0, 1)
    return token_losses(hidden_MD, model.get_output_embeddings().weight, targets_M, ce_M=weights_M).total


def _factor(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _config(shape: Mapping[str, Any], num_tokens: int) -> PreTrainedConfig:
    architecture = shape["architecture"]
    common: dict[str, Any] = {
        "vocab_size": num_tokens,
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if architecture == "gpt2":
        return GPT2Config(**common, n_inner=shape["ffn"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    gated = {**common, "intermediate_size": shape["ffn"], "num_key_value_heads": shape["kv_heads"]}
    if architecture == "llama":
        return LlamaConfig(**gated)
    if architecture == "qwen3":
        return Qwen3Config(**gated, head_dim=shape["hidden"] // shape["heads"])
    raise DllmError(f"Unknown architecture '{architecture}'.", did_you_mean(str(architecture), ARCHITECTURES))
